"""What the owner of a tier wants of single namespaces: pages that stay (pin), pages that age (ttl).

Belongs here: the options, and from a namespace's description to its rule, as pure functions. Does not belong here:
keeping to a rule (room.py does not evict what is pinned, expiry.py drops what is too old).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, field_validator

#: Fields of a namespace that a rule can name, with what `hicache-ext inspect` shows as their values.
FIELDS = ("lora", "model", "pool", "quantisation", "salt", "tag", "weights")
#: Of these a description holds only a digest; a rule may give either (hicache_ext.page.Namespace.description).
_SECRET = ("lora", "salt")

NEVER = "never"
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([smhdw]?)")


def seconds(value: Any) -> float | None:
    """A duration as people write it: seconds, "90s", "30m", "24h", "7d", "2w", or "never" (None)."""
    if value is None or value == NEVER:
        return None
    found = _DURATION.fullmatch(str(value).strip()) if isinstance(value, (str, int, float)) else None
    if found is None or isinstance(value, bool) or not float(found[1]):
        raise ValueError('not a time to live: write seconds, "30m", "24h", "7d" or "never"')
    return float(found[1]) * _UNITS[found[2]]


Duration = Annotated[float | None, BeforeValidator(seconds)]
"""Seconds; None: for ever."""


class NamespaceRule(BaseModel):
    """One rule. match: fields of a namespace and the values that they must have, all of them; none: every namespace.

    pin: its pages are not evicted, neither for others' sake nor for its own; full means that it stores no more.
    ttl: time to live of its pages, instead of the tier's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    match: dict[str, str]
    pin: bool = False
    ttl: Duration = None

    @field_validator("match")
    @classmethod
    def _fields_are_known(cls, match: dict[str, str]) -> dict[str, str]:
        for name in match:
            if name not in FIELDS:
                raise ValueError(f"a namespace has no field {name!r} to match; it has: {', '.join(FIELDS)}")
        return match


@dataclass(frozen=True)
class Rule:
    """What holds for one namespace. ttl: seconds from when a page was stored; None: for ever."""

    pin: bool = False
    ttl: float | None = None


class Rules:
    """The rules of a tier, in their order: the first that matches counts, and the tier's own ttl where none says."""

    def __init__(self, rules: Iterable[NamespaceRule] = (), ttl: float | None = None) -> None:
        self._rules = tuple(rules)
        self._ttl = ttl
        self._known: dict[bytes, Rule] = {}
        self.any_pin = any(rule.pin for rule in self._rules)
        self.any_ttl = ttl is not None or any(rule.ttl is not None for rule in self._rules)

    def of(self, digest: bytes, description: bytes) -> Rule:
        """The rule of a namespace (Namespace.digest, Namespace.description; an extent's header has both)."""
        found = self._known.get(digest)
        if found is None:
            found = self._known[digest] = self.choose(_fields(description))
        return found

    def choose(self, fields: Mapping[str, Any]) -> Rule:
        """By the fields of a namespace's description."""
        for rule in self._rules:
            if all(matches(name, value, fields.get(name, "")) for name, value in rule.match.items()):
                return Rule(rule.pin, rule.ttl if "ttl" in rule.model_fields_set else self._ttl)
        return Rule(False, self._ttl)


def matches(name: str, wanted: str, described: Any) -> bool:
    """Whether a field's value is the one that a rule names."""
    if wanted == described:
        return True
    return bool(wanted) and name in _SECRET and described == secret(wanted)


def secret(value: str) -> str:
    """What a description says instead of a salt or LoRA id."""
    return "sha256:" + hashlib.sha256(value.encode()).hexdigest()[:16]


def _fields(description: bytes) -> Mapping[str, Any]:
    try:
        fields = json.loads(description)
    except (ValueError, RecursionError):
        return {}  # an extent of a namespace too long to be described
    return fields if isinstance(fields, dict) else {}
