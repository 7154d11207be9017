"""What `linker_extra_config` may hold: our configuration, or the file that holds it, and the linker's own few keys.

Belongs here: keys, defaults, and errors that name them. Does not belong here: what the values do (linker).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError

from hicache_ext.config import Config, ConfigError, explain

_WHERE = "linker_extra_config."


class LinkerOptions(BaseModel):
    """config: path of the file with `tiers` and the rest; empty where they stand beside these keys.

    staging_bytes: host memory between device pools and tiers, half of it for loads and half for offloads.
    device_staging_bytes: as much in device memory, taken where a tier reaches that (gds).
    load_timeout: seconds that a load may take, and a second more for each GiB; SGLang aborts the requests of a load
    that takes longer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str = ""
    staging_bytes: ByteSize = Field(default=ByteSize(512 << 20), ge=2 << 20)
    device_staging_bytes: ByteSize = Field(default=ByteSize(128 << 20), ge=2 << 20)
    load_timeout: float = Field(default=10.0, gt=0)


def read(extra: Mapping[str, Any] | None) -> tuple[LinkerOptions, Config]:
    """The linker's options and our configuration. Raises ConfigError."""
    given = dict(extra or {})
    own = {key: given.pop(key) for key in LinkerOptions.model_fields if key in given}
    try:
        options = LinkerOptions.model_validate(own)
    except ValidationError as error:
        raise ConfigError(explain(error, LinkerOptions, own, _WHERE)) from error
    if options.config and given:
        raise ConfigError(
            f"{_WHERE}config: {sorted(given)[0]!r} stands beside it. "
            "Fix: keep either the file, or all of its keys in its place"
        )
    if not options.config and not given:
        raise ConfigError(f'{_WHERE}config: missing. Fix: add "config": the path of a file with `tiers`')
    return options, Config.load(options.config or given)
