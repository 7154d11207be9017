"""The cascade: tiers in order, what to read from where, and one outcome per page. Knows no engine and no backend."""

from hicache_ext.store.tiered import NO_TIER, TieredStore

__all__ = ["NO_TIER", "TieredStore"]
