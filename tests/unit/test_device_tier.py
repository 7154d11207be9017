"""A local tier on a raw device, as a user has it: pages, restarts, several processes, the commands that look at it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from hicache_ext.cli.main import app
from hicache_ext.config import Config, ConfigError
from storage_backends.base import Outcome
from storage_backends.local import LocalBackend
from tests.devices import KINDS, blank_device
from tests.pages import HostPool, chain, key_batch, namespace, served
from tests.tiers import tiers

MIB = 1 << 20
SPACE = namespace((65536,))
SLOT = 65536 + 4096

Open = Callable[..., LocalBackend]


@pytest.fixture(params=KINDS)
def raw(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with blank_device(request.param, tmp_path / "disk.img", 64 * MIB) as path:
        yield path


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Open]:
    with tiers(capacity=48 * MIB, metadata=tmp_path / "meta") as open_one:
        yield open_one


def _store(backend: LocalBackend, keys: list[bytes]) -> list[Outcome]:
    return backend.write(HostPool(SPACE, len(keys)).write_batch(keys)).result(30)


def _hits(backend: LocalBackend, keys: list[bytes]) -> int:
    return served(backend, SPACE, keys).count(Outcome.HIT)


@pytest.mark.parametrize("engine", ["threads", "auto"])
def test_pages_outlive_the_server_and_room_is_used_again(raw: Path, tier: Open, engine: str) -> None:
    first = tier(raw, engine=engine)
    for batch in range(20):
        _store(first, chain(f"{batch}", 64))
    assert first.stats()["evicted"] > 0
    assert first.stats()["own_bytes"] <= 48 * MIB
    last = chain("19", 64)
    assert _hits(first, last) == 64
    known = first.stats()["pages"]
    first.close()
    second = tier(raw, engine=engine)
    assert second.stats()["pages"] == known
    assert _hits(second, last) == 64
    _store(second, chain("new", 64))
    assert _hits(second, chain("new", 64)) == 64


def test_a_damaged_page_on_the_device_is_a_miss_and_is_named(raw: Path, tier: Open, tmp_path: Path) -> None:
    backend, keys = tier(raw), chain("a", 8)
    assert _store(backend, keys) == [Outcome.HIT] * 8
    home = tmp_path / "meta" / raw.name
    told = json.loads(CliRunner().invoke(app, ["verify", str(home), "--json"]).stdout)
    assert told["clean"]
    assert told["slots"]["valid"] == 8
    backend.close()
    content = HostPool(SPACE, 1)
    content.fill(0, keys[3])
    wanted = content.get(0)[:4096].tobytes()
    with open(raw, "r+b", buffering=0) as disk:
        at = 0
        while disk.seek(at) is not None and (block := disk.read(4096)) != wanted:
            assert block, "the page is on the device"
            at += 4096
        disk.seek(at + 100)
        disk.write(b"?")
    subprocess.run(["sync"], check=True)
    done = CliRunner().invoke(app, ["verify", str(home), "--json"])
    assert done.exit_code == 1
    (damage,) = json.loads(done.stdout)["damaged"]
    assert damage["key"] == keys[3].hex()
    assert damage["file"] == str(raw)
    again = tier(raw)
    pool = HostPool(SPACE, 8)
    outcomes = again.read(pool.batch(keys)).result(30)
    assert outcomes[3] == Outcome.CORRUPT
    assert outcomes.count(Outcome.HIT) == 7


def test_two_processes_share_a_device(raw: Path, tier: Open) -> None:
    """Two writers take their room from one device; each reads what the other stored."""
    one, two = tier(raw), tier(raw)
    _store(one, chain("one", 40))
    _store(two, chain("two", 40))
    assert one.lookup(key_batch(SPACE, chain("two", 40))).all()
    assert _hits(one, chain("two", 40)) == 40
    assert _hits(two, chain("one", 40)) == 40


def test_a_device_beside_a_directory(raw: Path, tier: Open, tmp_path: Path) -> None:
    backend = tier(raw, tmp_path / "files", capacity=[32 * MIB, 32 * MIB])
    keys = chain("a", 300)
    _store(backend, keys)
    homes = [tmp_path / "meta" / raw.name, tmp_path / "files"]
    held = [sum(1 for _ in home.glob("w*/e*.ext")) for home in homes]
    assert all(held), "both are used"
    assert _hits(backend, keys) == 300
    backend.close()
    told = json.loads(CliRunner().invoke(app, ["inspect", str(homes[0]), "--json"]).stdout)
    assert 0 < told["namespaces"][0]["pages"] < 300


def test_doctor_and_config_check_know_devices(raw: Path, tier: Open, tmp_path: Path) -> None:
    values = {"type": "local", "path": str(raw), "capacity": "48MiB", "metadata": str(tmp_path / "meta")}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"tiers": [values]}))
    _store(tier(raw), chain("a", 8))
    told = json.loads(CliRunner().invoke(app, ["doctor", "--config", str(file), "--json"]).stdout)
    found = {finding["name"]: finding for finding in told["findings"]}
    assert found["local: path"]["level"] == "ok"
    assert "locks and logs in" in found["local: path"]["text"]
    assert "63.0MiB" in found["local: space"]["text"]
    assert "8 pages" in found["local: contents"]["text"]
    assert CliRunner().invoke(app, ["config", "check", str(file)]).exit_code == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "/dev/no-such-device", "metadata": "META"}, r"path = '/dev/no-such-device': .*is not there"),
        ({"path": "FILE"}, r"is not a directory. Fix: .*or set `metadata` to use the file as a device"),
        ({"path": "FILE", "metadata": "META", "capacity": "1GiB"}, r"capacity = '1.0GiB': .* has 63.0MiB"),
        ({"path": "FILE", "metadata": "FILE"}, r"metadata = .* is no directory"),
    ],
)
def test_what_cannot_work_is_said_with_its_fix(tmp_path: Path, values: dict[str, str], message: str) -> None:
    with blank_device("file", tmp_path / "disk.img", 64 * MIB) as path:
        names = {"FILE": str(path), "META": str(tmp_path / "meta")}
        tiers = [{"type": "local", "capacity": "8MiB", **{key: names.get(v, v) for key, v in values.items()}}]
        with pytest.raises(ConfigError, match=message):
            Config.load({"tiers": tiers})
        assert not (tmp_path / "meta").exists()
    assert not Path("/dev/no-such-device").exists()


def test_commands_want_the_directory_not_the_device(raw: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", str(raw)])
    assert done.exit_code == 2
    assert "for a device the one below `metadata`" in done.output
