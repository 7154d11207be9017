"""The configuration: what is accepted, and that each error names the key, the value and the fix."""

from __future__ import annotations

import json
import os
import re
from itertools import pairwise
from pathlib import Path

import pytest

from hicache_ext.config import SGLANG_KEYS, Config, ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples" / "config"
TIER = {"type": "memory", "capacity": "1GiB"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.json", json.dumps({"tiers": [TIER]})),
        ("c.yaml", "tiers:\n  - {type: memory, capacity: 1GiB}\n"),
        ("c.yml", "tiers: [{type: memory, capacity: 1073741824}]"),
        ("c.toml", '[[tiers]]\ntype = "memory"\ncapacity = "1GiB"\n'),
    ],
)
def test_every_file_format_gives_the_same(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    config = Config.load(tmp_path / name)
    assert config.backend(0)[1].capacity == 1 << 30  # type: ignore[attr-defined]


def test_sizes_in_both_families() -> None:
    sizes = {"10GB": 10 * 10**9, "10GiB": 10 << 30, "10 GB": 10 * 10**9, 1 << 20: 1 << 20}
    for text, expected in sizes.items():
        options = Config.load({"tiers": [{"type": "memory", "capacity": text}]}).backend(0)[1]
        assert options.capacity == expected  # type: ignore[attr-defined]


def test_sglang_keys_are_accepted_and_not_ours() -> None:
    config = Config.load({"tiers": [TIER], **dict.fromkeys(SGLANG_KEYS, 1)})
    assert set(config.model_dump()) == {
        "tiers", "model", "salt", "host_huge_pages", "background_bytes", "share", "share_page",
        "event_costs",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"tiers": [TIER], "tires": 1}, ["tires = 1", "unknown key", "tiers"]),
        ({}, ["tiers", "missing", "Fix"]),
        ({"tiers": []}, ["tiers", "at least 1"]),
        ({"tiers": [{"capacity": 1}]}, ["tiers[0].type", "missing"]),
        ({"tiers": [{"type": "floppy"}]}, ["tiers[0].type = 'floppy'", "no such backend", "local, memory"]),
        ({"tiers": [{"type": "nowhere:Nothing"}]}, ["nowhere", "does not import"]),
        ({"tiers": [{"type": "json:JSONDecoder"}]}, ["is not a storage_backends.base.Backend"]),
        ({"tiers": [{"type": "memory", "capacity": "10GX"}]}, ["tiers[0].capacity = '10GX'", "not a size", "10GiB"]),
        ({"tiers": [{"type": "memory", "capacty": 1}]}, ["tiers[0].capacty", "unknown key", "capacity"]),
        ({"tiers": [TIER, TIER]}, ["two are called 'memory'", "name"]),
        ({"tiers": [{"type": "local", "path": "/tmp/x"}]}, ["tiers[0].capacity", "missing"]),
    ],
)
def test_errors_name_key_and_fix(values: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.load(values)
    for part in parts:
        assert part in str(caught.value)
    assert "Fix:" in str(caught.value)


SECRET = "hunter2-secret"


@pytest.mark.parametrize(
    "more",
    [
        {"password": SECRET},
        {"passwd": [SECRET]},
        {"secret_access_key": SECRET, "access_key_id": SECRET},
        {"session_token": SECRET},
        {"seal_key": SECRET},
        {"url": f"redis://user:{SECRET}@host/0"},
        {"url": {"address": f"redis://:{SECRET}@host"}},
        {"endpoint": f"https://user:{SECRET}@host"},
        {"url": f"http://{SECRET}@host:notaport"},
    ],
)
def test_a_secret_in_the_wrong_place_is_refused_and_not_repeated(more: dict[str, object]) -> None:
    pytest.importorskip("redis")
    with pytest.raises(ConfigError) as caught:
        Config.load({"tiers": [{"type": "redis", **more}]})
    assert SECRET not in str(caught.value)
    assert "Fix:" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        Config.load({"tiers": {"type": "redis", **more}})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_loads(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With folders and variables of this test in the place of the ones that they name."""
    text = path.read_text().replace("/var/cache/hicache-ext", str(tmp_path / "tier")).replace("200GiB", "2MiB")
    for name in re.findall(r"_env: (\w+)", text):
        monkeypatch.setenv(name, "0f" * 32)
    for module in re.findall(r"type: (redis|s3|mooncake|nixl)", text):
        pytest.importorskip({"redis": "redis", "s3": "obstore", "mooncake": "mooncake", "nixl": "nixl_cu12"}[module])
    (tmp_path / path.name).write_text(text)
    config = Config.load(tmp_path / path.name)
    assert config.tiers


def test_a_capacity_beyond_the_disk(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tiers\[0\].capacity = .*the disk has .*Fix: lower it"):
        Config.load({"tiers": [{"type": "local", "path": str(tmp_path / "t"), "capacity": "900PiB"}]})
    assert not (tmp_path / "t").exists(), "a check changes nothing"


def test_a_path_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"tiers\[0\].path = .*is not a directory"):
        Config.load({"tiers": [{"type": "local", "path": str(tmp_path / "file" / "t"), "capacity": "2MiB"}]})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_path_that_is_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="not writable"):
        Config.load({"tiers": [{"type": "local", "path": str(tmp_path / "t"), "capacity": "2MiB"}]})


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("c.json", "{", "not valid json"),
        ("c.yaml", "a: [", "not valid yaml"),
        ("c.toml", "=", "not valid toml"),
        ("c.ini", "x", "ending '.ini' is unknown"),
        ("c.yaml", "just text", "holds no keys"),
        ("c.yaml", "", "holds no keys"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, name: str, text: str, part: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=part):
        Config.load(tmp_path / name)


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Config.load("/nowhere/at/all.yaml")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "tiers: [{type: memory, capacity: !!int ''}]"),  # PyYAML's own errors are of many kinds
        ("a.yaml", "tiers: [{type: memory, capacity: !!bool x}]"),
        ("a.yaml", "tiers: 2001-99-99"),
        ("a.yaml", "tiers: " + "[" * 3000),
        ("a.json", "[" * 100_000),
        ("a.json", '{"tiers": ' + "1" * 5000 + "}"),
        ("a.toml", "tiers = " + "[" * 3000),
        ("a.yaml", "tiers: [{type: memory, capacity: 1GiB"),
        ("a.yaml", "a: &a [x]\n" + "".join(f"{b}: &{b} [{f'*{a},' * 9}]\n" for a, b in pairwise("abcdefghi"))),
    ],
)
def test_a_file_that_breaks_its_parser_is_one_short_line_per_problem(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        Config.load(tmp_path / name)
    assert len(str(caught.value)) < 5000
    assert all("Fix: " in line for line in str(caught.value).split("\n"))


@pytest.mark.parametrize("path", ["/tmp/" + "a" * 300, "/proc/1/root/x" * 400])
def test_a_path_that_the_system_refuses_is_a_clear_line(path: str) -> None:
    with pytest.raises(ConfigError, match=r"tiers\[0\].*Fix"):
        Config.load({"tiers": [{"type": "local", "path": path, "capacity": "1MiB"}]})


@pytest.mark.parametrize("name", [":x", ".x:y", "a b:c", "\0:x", "sys:", "sys:path"])
def test_a_backend_name_that_is_none_is_a_clear_line(name: str) -> None:
    with pytest.raises(ConfigError, match=r"tiers\[0\]\.type.*Fix"):
        Config.load({"tiers": [{"type": name}]})
