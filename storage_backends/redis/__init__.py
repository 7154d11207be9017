"""A tier in Redis or Valkey: one server, behind sentinels, or a cluster. Needs the extra `redis`."""

from storage_backends.redis.backend import RedisBackend, RedisOptions

__all__ = ["RedisBackend", "RedisOptions"]
