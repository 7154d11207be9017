"""`config check`: what it says of good, wrong and silent tiers. Real tiers, in processes of the command's own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from hicache_ext.cli.main import app
from storage_backends.base import BackendOptions, Completion, Dispatcher, KeyBatch, PageBatch
from tests.dictionary import DictionaryBackend, DictionaryOptions
from tests.redis_server import RedisServer


class Silent(DictionaryBackend):
    """Its server is not there."""

    def __init__(self, options: BackendOptions, dispatcher: Dispatcher) -> None:
        raise ConnectionRefusedError("nobody listens at 127.0.0.1:1")


class Dead(DictionaryBackend):
    """Kills its process, as a library with a bug does."""

    def lookup(self, batch: KeyBatch) -> np.ndarray:
        import os

        os.abort()


class Liar(DictionaryBackend):
    """Gives back a byte that nobody stored, as no backend of ours can: it does not verify."""

    Options = DictionaryOptions

    def read(self, batch: PageBatch) -> Completion:
        done = super().read(batch)
        done.wait()
        batch.buffers(0)[0][5] ^= 1
        return done


def _check(folder: Path, tiers: list[dict[str, Any]], *arguments: str) -> tuple[int, Any, str]:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({"tiers": tiers}))
    done = CliRunner().invoke(app, ["config", "check", str(file), *arguments])
    return done.exit_code, json.loads(done.stdout) if "--json" in arguments and done.stdout else None, done.output


def _local(folder: Path) -> dict[str, Any]:
    return {"type": "local", "path": str(folder / "tier"), "capacity": "64MiB"}


def test_a_cascade_is_explained_and_answers(tmp_path: Path) -> None:
    tiers = [_local(tmp_path), {"type": "memory", "name": "ram", "write": "hits", "write_hits": 3, "promote": "never"}]
    code, told, _ = _check(tmp_path, tiers, "--json", "--write")
    assert code == 0
    assert told["ok"]
    near, far = told["tiers"]
    assert (near["gets"], far["gets"]) == ("every page that is written", "pages read 3 times, in the background")
    assert (near["persistent"], far["persistent"]) == (True, False)
    assert near["options"]["capacity"] == "67108864"
    assert near["options"]["engine"] == "auto (default)"
    assert all(tier["lookup_ms"] >= 0 and tier["read_ms"] > 0 for tier in told["tiers"])
    code, _, text = _check(tmp_path, tiers)
    assert code == 0
    assert "what is read here stays here" in text
    assert "every page that is written" in text


def test_without_write_nothing_is_stored(tmp_path: Path) -> None:
    assert _check(tmp_path, [_local(tmp_path)])[0] == 0
    assert not list((tmp_path / "tier").glob("w*"))


def test_silent_and_dead_tiers_are_named(tmp_path: Path) -> None:
    here = "tests.unit.test_config_check"
    tiers = [{"type": "memory"}, {"type": f"{here}:Silent", "name": "a"}, {"type": f"{here}:Dead", "name": "b"}]
    code, told, _ = _check(tmp_path, tiers, "--json")
    assert code == 1
    assert [bool(tier["problem"]) for tier in told["tiers"]] == [False, True, True]
    assert "nobody listens" in told["tiers"][1]["problem"]
    assert "SIGABRT" in told["tiers"][2]["problem"]


def test_other_bytes_are_noticed(tmp_path: Path) -> None:
    tiers = [{"type": "tests.unit.test_config_check:Liar"}]
    assert _check(tmp_path, tiers)[0] == 0
    code, told, _ = _check(tmp_path, tiers, "--json", "--write")
    assert code == 1
    assert told["tiers"][0]["problem"] == "gave back other bytes than were stored"


EXAMPLES = Path(__file__).parents[2] / "examples"
#: What an example's backend needs beside this package: without it, its test is skipped.
NEEDS = {"redis": "redis", "s3": "obstore", "mooncake": "mooncake", "nixl": "nixl_cu12"}


def adapted(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of an example, with folders, sizes and secrets of this machine in the place of those that it names."""
    text = path.read_text()
    for name in set(re.findall(r"type: (\w+)", text)) & NEEDS.keys():
        pytest.importorskip(NEEDS[name])
    for number, place in enumerate(sorted(set(re.findall(r"(?m)^ +(?:- )?path: ([^#\s]+)", text)))):
        (folder / f"place{number}").mkdir(parents=True)
        text = text.replace(f"path: {place}", f"path: {folder / f'place{number}'}")
    text = re.sub(r"(?m)^ +mount: .*\n", "", text)
    for name in re.findall(r"(?m)^[^#\n]*_env: (\w+)", text):
        monkeypatch.setenv(name, "0f" * 32)
    copy = folder / path.name
    copy.write_text(re.sub(r"\b\d+[GT]iB\b", "64MiB", text))
    return copy


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/*.yaml")), ids=lambda path: path.name)
def test_examples_are_explained_without_their_servers(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = adapted(path, tmp_path, monkeypatch)
    done = CliRunner().invoke(app, ["config", "check", "--offline", str(copy)])
    assert done.exit_code == 0, done.output
    wanted = [tier["type"] for tier in yaml.safe_load(copy.read_text())["tiers"]]
    assert done.output.count("not asked") == len(wanted)
    assert all(f"{number}: " in done.output for number in range(len(wanted)))
    assert "0f0f" not in done.output, "a secret was shown"


def test_who_does_the_work_is_named(tmp_path: Path) -> None:
    with RedisServer() as server:
        tiers = [_local(tmp_path), {"type": "redis", "url": f"redis://127.0.0.1:{server.port}"}]
        code, told, _ = _check(tmp_path, tiers, "--json", "--write")
        assert code == 0
        near, far = (tier["versions"] for tier in told["tiers"])
        assert near["engine"] in ("native", "liburing", "threads")
        assert re.fullmatch(r"(redis|valkey) \d+\.\d+.*", far["server"])
        _, _, text = _check(tmp_path, tiers)
        assert far["server"] in text
        assert "not asked" not in text


def test_offline_asks_nobody(tmp_path: Path) -> None:
    tiers = [{"type": "tests.unit.test_config_check:Silent"}]
    code, told, _ = _check(tmp_path, tiers, "--json", "--offline")
    assert code == 0
    assert (told["tiers"][0]["asked"], told["tiers"][0]["lookup_ms"]) == (False, None)
    assert _check(tmp_path, tiers, "--offline", "--write")[0] == 2


def test_a_wrong_file_is_one_line(tmp_path: Path) -> None:
    code, _, text = _check(tmp_path, [{"type": "memory", "capacty": 1}])
    assert code == 2
    assert "tiers[0].capacty" in text
    assert "Traceback" not in text
    done = CliRunner().invoke(app, ["config", "check", str(tmp_path / "none.yaml")])
    assert done.exit_code == 2
    assert "cannot be read" in done.output
