"""Rules for namespaces: what matches, what a time to live looks like, and errors that say what to write."""

from __future__ import annotations

from typing import Any

import pytest

from hicache_ext.config import Config, ConfigError
from storage_backends.local.rules import NamespaceRule, Rule, Rules, seconds, secret
from tests.pages import namespace

DAY = 86400.0


def rule(pin: bool = False, ttl: Any = None, **match: str) -> NamespaceRule:
    values = {"match": match, "pin": pin} | ({} if ttl is None else {"ttl": ttl})
    return NamespaceRule.model_validate(values)


TENANT_A = rule(pin=True, ttl="7d", salt="tenant-a")
CASES = [
    ("no rules", Rules(), {}, Rule()),
    ("the tier's own ttl", Rules(ttl=DAY), {"salt": "tenant-a"}, Rule(False, DAY)),
    ("by salt", Rules([TENANT_A], DAY), {"salt": "tenant-a"}, Rule(True, 7 * DAY)),
    ("another salt", Rules([TENANT_A], DAY), {"salt": "tenant-b"}, Rule(False, DAY)),
    ("no salt", Rules([TENANT_A], DAY), {}, Rule(False, DAY)),
    ("by what inspect shows", Rules([rule(pin=True, salt=secret("tenant-a"))]), {"salt": "tenant-a"}, Rule(True)),
    ("every field must match", Rules([rule(pin=True, salt="s", pool="mamba")]), {"salt": "s"}, Rule()),
    ("pool", Rules([rule(pin=True, pool="kv")]), {}, Rule(True)),
    ("an empty value is no LoRA", Rules([rule(pin=True, lora="")]), {"lora": "x"}, Rule()),
    ("an empty match is all", Rules([rule(ttl=60)]), {"lora": "x"}, Rule(False, 60.0)),
    ("the first counts", Rules([rule(salt="s"), rule(pin=True)], DAY), {"salt": "s"}, Rule(False, DAY)),
    ("never", Rules([rule(ttl="never", salt="s")], DAY), {"salt": "s"}, Rule()),
]


@pytest.mark.parametrize(("name", "rules", "fields", "expected"), CASES, ids=[case[0] for case in CASES])
def test_cases(name: str, rules: Rules, fields: dict[str, str], expected: Rule) -> None:
    space = namespace((65536,), **fields)
    assert rules.of(space.digest, space.description) == expected


def test_a_namespace_that_does_not_describe_itself_has_no_rule_but_the_tiers() -> None:
    assert Rules([rule(pin=True, pool="kv")], DAY).of(bytes(16), b"") == Rule(False, DAY)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(30, 30.0), ("30", 30.0), ("90s", 90.0), ("30m", 1800.0), ("24h", DAY), ("1.5d", 1.5 * DAY), ("2w", 14 * DAY)],
)
def test_durations(text: Any, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "0", 0, "-1h", "1y", "h", "1h30m", True, [], "1e9", "nan"])
def test_what_is_no_duration(text: Any) -> None:
    with pytest.raises(ValueError, match="24h"):
        seconds(text)


def config(tmp_path: Any, **options: Any) -> Config:
    tier = {"type": "local", "path": str(tmp_path / "t"), "capacity": "1MiB", **options}
    return Config.load({"tiers": [tier]})


def test_in_the_configuration(tmp_path: Any) -> None:
    _, options = config(
        tmp_path, ttl="24h", namespaces=[{"match": {"salt": "a", "pool": "kv"}, "pin": True, "ttl": "7d"}]
    ).backend(0)
    assert options.ttl == DAY  # type: ignore[attr-defined]
    assert options.namespaces[0].ttl == 7 * DAY  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ttl": "soon"}, "tiers[0].ttl = 'soon': .*24h"),
        ({"namespaces": [{"match": {"tenant": "a"}}]}, r"namespaces\[0\].match.*'tenant'.*lora, model, pool.*salt"),
        ({"namespaces": [{"match": {}, "pinned": True}]}, r"namespaces\[0\].pinned.*unknown key"),
        ({"namespaces": [{"pin": True}]}, r"namespaces\[0\].match: missing"),
    ],
)
def test_mistakes_are_named_with_their_fix(tmp_path: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("tiers[0]", r"tiers\[0\]")):
        config(tmp_path, **options)
