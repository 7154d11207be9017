"""The one configuration schema, for every engine: from a dict, or a JSON, YAML or TOML file.

Belongs here: keys, their meaning, and errors that name the key and the fix. Does not belong here: a backend's own
options (each backend has its `Options`), or what an engine does with the result.
"""

from __future__ import annotations

import json
import re
import reprlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError

from storage_backends.base import Backend, BackendOptions, OptionError
from storage_backends.registry import backend_class

#: SGLang reads these from the same dictionary (some it removes, some it leaves). Accepted at top level, never ours.
SGLANG_KEYS = frozenset(
    {
        "prefetch_threshold",
        "prefetch_timeout_base",
        "prefetch_timeout_per_ki_token",
        "prefetch_timeout_max",
        "hicache_storage_pass_prefix_keys",
        "tp_lcm_size",
        "backend_name",
        "module_path",
        "class_name",
        "interface_v1",
        "allocator",
    }
)


_SHORT, _PROBLEMS = 300, 20
#: Keys that a user may put a secret under, rightly or not, and the user part of an address: never shown.
_SECRET_KEY = re.compile(r"passw|secret|token|credential|(^|_)key(_id)?$", re.IGNORECASE)
_SECRET_INSIDE = re.compile(r"passw|secret|token|credential|key", re.IGNORECASE)
_IN_ADDRESS = re.compile(r"//[^/\s]*@")
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120


class ConfigError(ValueError):
    """A user's mistake. `str()` is everything that needs to be said: one line per problem, with the fix."""


class ModelConfig(BaseModel):
    """Identity of the model, for engines or set-ups that cannot say it themselves. Empty: ask the engine.

    path: local folder of the model (config and weight files are fingerprinted).
    revision: name of the weights' version; replaces the fingerprint of the files (needed to share between hosts
    whose copies differ in time stamps).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = ""
    revision: str = ""


class TierConfig(BaseModel):
    """One tier: its backend's name (`type`), a name of its own for logs and metrics, and the backend's options.

    write, write_hits: which pages reach a tier that is not the first, always in the background: "through", every page
    that is written; "evicted", those that the tier before, local or memory, is about to evict; "hits", those read
    `write_hits` times.
    promote: which pages that are read from such a tier go up to the first: "always", "second_hit", "never".
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str
    name: str = ""
    write: Literal["through", "evicted", "hits"] = "through"
    write_hits: int = Field(default=2, ge=1)
    promote: Literal["always", "second_hit", "never"] = "always"

    @property
    def options(self) -> dict[str, Any]:
        """The keys that are the backend's."""
        return dict(self.__pydantic_extra__ or {})

    @property
    def label(self) -> str:
        return self.name or self.type


class Config(BaseModel):
    """The whole configuration. tiers: fast to slow."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tiers: tuple[TierConfig, ...] = Field(min_length=1)
    model: ModelConfig = ModelConfig()
    salt: str = ""
    """Keeps this server's pages apart from others' with another salt."""
    share: Literal["engine", "engines"] = "engine"
    """Whose pages these are: this engine's, as it lays them out, or canonical ones that SGLang and vLLM both read."""
    share_page: int = Field(default=64, ge=1, le=4096)
    """With `share: engines`, the tokens of a page: a multiple or a whole part of each engine's own page or block."""
    host_huge_pages: bool = True
    """SGLang's host pool in huge pages, prefaulted (with the plugin, when our backend is on the command line)."""
    background_bytes: ByteSize = Field(default=ByteSize(512 << 20), ge=1 << 20)
    """Memory, for each tier, that may hold copies of pages on their way to it in the background."""
    event_costs: bool = False
    """KV events of stored pages say what loading them costs, once the tier's reads have been measured (`load_cost`)."""

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any]) -> Config:
        """From a mapping, or the path of a .json, .yaml, .yml or .toml file. Raises ConfigError."""
        values = source if isinstance(source, Mapping) else read_file(Path(source))
        ours = {key: value for key, value in values.items() if key not in SGLANG_KEYS}
        try:
            config = cls.model_validate(ours)
        except ValidationError as error:
            raise ConfigError(explain(error, cls, ours)) from error
        for i in range(len(config.tiers)):
            config.backend(i)
        for i, (above, below) in enumerate(zip(config.tiers, config.tiers[1:], strict=False), start=1):
            if below.write == "evicted" and not backend_class(above.type).foresees:
                raise ConfigError(
                    f"tiers[{i}].write = 'evicted': a {above.type} tier does not say what it will evict. "
                    "Fix: use through, or hits"
                )
        for key in ("write", "write_hits", "promote"):
            if key in config.tiers[0].model_fields_set:
                raise ConfigError(
                    f"tiers[0].{key}: the first tier gets every page. Fix: remove it, or set it on a further tier"
                )
        labels = [tier.label for tier in config.tiers]
        for label in labels:
            if labels.count(label) > 1:
                raise ConfigError(f"tiers: two are called {label!r}. Fix: give each a `name` of its own")
        return config

    def backend(self, tier: int) -> tuple[type[Backend], BackendOptions]:
        """The backend class and validated options of tier number `tier`. Raises ConfigError."""
        chosen = self.tiers[tier]
        where = f"tiers[{tier}]"
        try:
            found = backend_class(chosen.type)
            options = found.Options.model_validate(chosen.options)
            found.check(options)
        except OptionError as error:
            raise ConfigError(f"{where}.{error}") from error
        except ValidationError as error:
            raise ConfigError(explain(error, found.Options, chosen.options, where + ".")) from error
        except (OSError, ValueError, OverflowError) as error:  # a path or number that the system refuses to look at
            raise ConfigError(
                f"{where}: cannot be checked: {_short(str(error))}. Fix: name what this user may use"
            ) from error
        return found, options


def read_file(path: Path) -> Mapping[str, Any]:
    """What a configuration file holds, unchecked. Raises ConfigError where it holds no keys at all."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}. Fix: check the path and its permissions") from error
    try:
        match path.suffix.lower():
            case ".json":
                values = json.loads(text)
            case ".yaml" | ".yml":
                values = yaml.safe_load(text)
            case ".toml":
                values = tomllib.loads(text)
            case other:
                raise ConfigError(f"{path}: ending {other!r} is unknown. Fix: use .json, .yaml, .yml or .toml")
    except ConfigError:
        raise
    except Exception as error:  # parsers raise more than their own errors: of recursion, of numbers, of YAML's tags
        said = _short(" ".join(str(error).split()))  # YAML's errors come with the lines around them
        raise ConfigError(f"{path}: is not valid {path.suffix[1:]}: {said}. Fix: correct the syntax") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: holds no keys. Fix: start with `tiers:` (see examples/config)")
    return values


def _short(text: str) -> str:
    """One line that can be read, of a value or message that may be of any size."""
    line = text if text.isprintable() else ascii(text)
    return line if len(line) <= _SHORT else line[:_SHORT] + "..."


def _shown(value: Any, key: str) -> str:
    """A value as it was given; what is nested deep or long is left out, before it is written (aliases can make it)."""
    if _SECRET_KEY.search(key):
        return "(not shown)"
    try:
        text = _REPR.repr(value)
        if not isinstance(value, str) and _SECRET_INSIDE.search(text):
            return "(not shown)"
        return _short(_IN_ADDRESS.sub("//...@", text))
    except (ValueError, RecursionError):  # a number of too many digits
        return f"a {type(value).__name__}"


def explain(error: ValidationError, model: type[BaseModel], values: Mapping[str, Any], prefix: str = "") -> str:
    """pydantic's errors for people: each problem as `key = value: what is wrong. Fix: ...`."""
    lines = []
    problems = error.errors()
    for problem in problems[:_PROBLEMS]:
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
        known = ", ".join(sorted(model.model_fields)) if len(problem["loc"]) == 1 else ""
        match problem["type"]:
            case "extra_forbidden":
                what, fix = "unknown key", "remove it" + (f", or use one of: {known}" if known else "")
            case "missing":
                what, fix = "missing", f"add `{key}:`"
            case "byte_size" | "byte_size_unit":
                what, fix = "not a size", 'write a number of bytes, "10GB" or "10GiB"'
            case _:
                what, fix = problem["msg"], "correct the value"
        value = "" if problem["type"] == "missing" else f" = {_shown(problem['input'], key)}"
        lines.append(f"{prefix}{_short(key)}{value}: {_short(what)}. Fix: {_short(fix)}")
    if len(problems) > _PROBLEMS:
        lines.append(f"{prefix or 'the file'}: {len(problems) - _PROBLEMS} more problems. Fix: correct these first")
    return "\n".join(lines)
