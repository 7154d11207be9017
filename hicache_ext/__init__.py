"""Storage tiers for SGLang's hierarchical KV cache: the package that users import and configure.

Only the version belongs here. No imports: `hicache_ext.config` must load without torch, an engine or
a compiled module.
"""

__version__ = "0.1.0"
