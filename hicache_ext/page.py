"""What a page is: its identity (Namespace, PageKey) and its shape (PageLayout, Shard).

Belongs here: the facts that decide whether stored bytes may be reused, and how they become keys.
Does not belong here: where a page lies (storage_backends), or how an engine names its pools (adapters).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

KEY_BYTES = 32
NAMESPACE_BYTES = 16
#: A parent key of zeroes means "parent unknown": the page counts as a root until a later call links it.
NO_PARENT = bytes(KEY_BYTES)

_DOMAIN = b"hicache-ext namespace v1\0"
_STRING_KEY_DOMAIN = b"hicache-ext string key v1\0"


@dataclass(frozen=True)
class PageLayout:
    """Shape of one page as its pool holds it.

    kind: attention family or state kind ("mha", "mla", "mamba", ...).
    order: memory order of the pool ("layer_first", "page_first", "page_first_direct", "page_head", "canonical").
    dtype: element type as stored ("bfloat16", "float8_e4m3fn", ...).
    page_size: tokens in a page.
    buffer_lengths: bytes of each buffer of a page, in the order in which the pool gives their addresses.
    geometry: everything else that shapes the bytes, by name (layers, heads, head_dim, layer range, ...).
    """

    kind: str
    order: str
    dtype: str
    page_size: int
    buffer_lengths: tuple[int, ...]
    geometry: tuple[tuple[str, int | str], ...] = ()

    def __post_init__(self) -> None:
        if self.page_size <= 0:
            raise ValueError(f"page_size must be positive, got {self.page_size}")
        if not self.buffer_lengths or min(self.buffer_lengths) <= 0:
            raise ValueError(f"buffer_lengths must be positive, got {self.buffer_lengths}")

    @property
    def payload_bytes(self) -> int:
        """Bytes of one page, all buffers together."""
        return sum(self.buffer_lengths)


@dataclass(frozen=True)
class Shard:
    """Which part of the model's KV this rank holds. Pools that are replicated over tp keep tp at (0, 1)."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    dcp_rank: int = 0
    dcp_size: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "cp", "dcp"):
            rank, size = getattr(self, f"{name}_rank"), getattr(self, f"{name}_size")
            if not 0 <= rank < size:
                raise ValueError(f"{name}_rank {rank} is outside its group of {size}")


@dataclass(frozen=True)
class Namespace:
    """Everything that must match for stored bytes to be reusable. Two that differ in any field never share a key.

    model: sha256 (hex) of the resolved model config, overrides included. Never the served name.
    weights: fingerprint of the weights (revision, or names, sizes and times of files; seed for dummy weights).
    quantisation: weight and KV quantisation as the engine resolved it.
    salt, lora: tenant salt and the LoRA adapter's content id; empty when there is none.
    pool: "kv", "mamba", "swa", "indexer", ...
    tag: format tag: the engine whose bytes these are, or "canonical".
    """

    model: str
    weights: str
    layout: PageLayout
    shard: Shard = Shard()
    quantisation: str = ""
    salt: str = ""
    lora: str = ""
    pool: str = "kv"
    tag: str = ""

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that stand for all the fields."""
        return hashlib.sha256(_DOMAIN + self._canonical(asdict(self))).digest()[:NAMESPACE_BYTES]

    @cached_property
    def description(self) -> bytes:
        """JSON of the fields for people and tools, salt and LoRA replaced by a short digest (they may be secrets)."""
        fields = asdict(self)
        for name in ("salt", "lora"):
            if fields[name]:
                fields[name] = "sha256:" + hashlib.sha256(fields[name].encode()).hexdigest()[:16]
        return self._canonical(fields)

    @staticmethod
    def _canonical(fields: dict[str, object]) -> bytes:
        # JSON with sorted keys is injective over these types: strings are quoted, lists keep their order.
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    def for_pool(self, pool: str, layout: PageLayout, shard: Shard | None = None) -> Namespace:
        """The same model and tenant, another pool of it."""
        return replace(self, pool=pool, layout=layout, shard=self.shard if shard is None else shard)

    def with_weights(self, weights: str) -> Namespace:
        """The same model after a weight update."""
        return replace(self, weights=weights)

    def __repr__(self) -> str:
        return f"Namespace({self.digest.hex()}, pool={self.pool!r}, payload={self.layout.payload_bytes})"


@dataclass(frozen=True)
class PageKey:
    """One page's full identity: its namespace and its chain hash (32 bytes)."""

    namespace: Namespace
    hash: bytes

    def __post_init__(self) -> None:
        if len(self.hash) != KEY_BYTES:
            raise ValueError(f"a page hash has {KEY_BYTES} bytes, got {len(self.hash)}")

    @property
    def packed(self) -> bytes:
        """48 bytes, unique over namespaces and pages."""
        return self.namespace.digest + self.hash


def pack_keys(keys: Sequence[str]) -> bytes:
    """Engine key strings to n x 32 packed bytes.

    A 64-digit hex string is its 32 bytes; any other string (engines append suffixes such as ".draft") is
    hashed under a domain of its own, so that it can never equal a page hash.
    """
    try:
        packed = bytes.fromhex("".join(keys))
        if len(packed) == KEY_BYTES * len(keys) and all(len(key) == 2 * KEY_BYTES for key in keys):
            return packed
    except ValueError:
        pass
    return b"".join(map(pack_key, keys))


def pack_key(key: str) -> bytes:
    """One engine key string to 32 bytes; see pack_keys."""
    if len(key) == 2 * KEY_BYTES:
        try:
            packed = bytes.fromhex(key)
            if len(packed) == KEY_BYTES:
                return packed
        except ValueError:
            pass
    return hashlib.sha256(_STRING_KEY_DOMAIN + key.encode()).digest()


def split_keys(packed: bytes) -> list[bytes]:
    """n x 32 packed bytes to n keys."""
    return [packed[i : i + KEY_BYTES] for i in range(0, len(packed), KEY_BYTES)]


def chain_parents(packed: bytes, parent: bytes | None) -> bytes:
    """Parents of a contiguous chain of pages: `parent` (or unknown) for the first, its predecessor for each other."""
    if not packed:
        return b""
    return (parent or NO_PARENT) + packed[:-KEY_BYTES]
