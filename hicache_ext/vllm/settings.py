"""What `--kv-transfer-config` says to us: our configuration, and the adapter's few keys beside it.

Belongs here: kv_connector_extra_config and what must hold of vLLM's own settings. Does not belong here: tiers
(hicache_ext.config).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError

from hicache_ext.config import Config, ConfigError, explain, read_file


class Options(BaseModel):
    """Keys of kv_connector_extra_config beside `config`.

    load_timeout: seconds after which a page that has not arrived is recomputed.
    lookup_timeout: seconds that a request waits for a server to say what it holds.
    save_bytes: memory for pages on their way to the first tier; beyond it pages are not stored (on a GPU: wait, as long
    as nobody else needs their blocks).
    load_bytes: on a GPU, pinned memory for pages on their way to their blocks.
    device_staging_bytes: on a GPU, its own memory for pages, half for loads and half for saves, taken where a tier
    reaches that; at most a quarter of what is free, since vLLM has sized its blocks already and its CUDA graphs come
    later. Four parts of 32 MiB keep the bus busy, and four more are filled meanwhile. 0: none, pages go by host memory.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    load_timeout: float = Field(default=10.0, gt=0)
    lookup_timeout: float = Field(default=1.0, gt=0)
    save_bytes: ByteSize = Field(default=ByteSize(256 << 20), ge=1 << 20)
    load_bytes: ByteSize = Field(default=ByteSize(256 << 20), ge=1 << 20)
    device_staging_bytes: ByteSize = Field(default=ByteSize(512 << 20), ge=0)


@dataclass(frozen=True)
class Settings:
    """config: the tiers. saves, loads: what this engine's role allows."""

    config: Config
    options: Options
    saves: bool
    loads: bool

    @classmethod
    def of(cls, transfer: Any) -> Settings:
        """From vLLM's KVTransferConfig. Raises ConfigError, which names the key and the fix."""
        extra = dict(transfer.kv_connector_extra_config)
        source = extra.pop("config", None)
        if source is None:
            raise ConfigError(
                "kv_connector_extra_config.config: missing. "
                'Fix: add "config": "hicache.yaml" (or the keys themselves), see examples/config'
            )
        try:
            options = Options.model_validate(extra)
        except ValidationError as error:
            raise ConfigError(explain(error, Options, extra, "kv_connector_extra_config.")) from error
        # Without it vLLM fails the request of a page that was lost meanwhile; a cache must never do that.
        policy = getattr(transfer, "kv_load_failure_policy", "fail")
        if policy != "recompute":
            raise ConfigError(
                f"kv_load_failure_policy = {policy!r}: a page that cannot be loaded would fail its request. "
                'Fix: add "kv_load_failure_policy": "recompute" to --kv-transfer-config'
            )
        values = source if isinstance(source, Mapping) else read_file(Path(source))
        return cls(Config.load(values), options, bool(transfer.is_kv_producer), bool(transfer.is_kv_consumer))
