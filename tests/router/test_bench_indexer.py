"""`hicache-ext bench indexer` and `bench router` as a user runs them: Dynamo's services started apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hicache_ext.bench import dynamo, indexer
from tests.netns import Host
from tests.router.worker import prompt

COMMAND = [sys.executable, "-m", "hicache_ext.cli.main", "bench"]


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(autouse=True)
def _namespaces_are_allowed() -> None:
    pytest.importorskip("dynamo.indexer", reason="needs ai-dynamo-runtime")
    Host().close()


def test_delay_and_workers(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    words = ("--rounds", "4", "--workers", "5", "--blocks", "150", "--dir", str(tmp_path), "--json", str(file))
    done = bench("indexer", *words)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(file.read_text())
    assert {"machine", "command", "delay", "workers"} <= found.keys()
    for row in found["delay"]:
        assert 0 < row["spread"][0] <= row["value"] <= row["spread"][1]
    rows = {row["what"]: row["value"] for row in found["workers"]}
    assert rows["blocks announced"] == 5 * 150, "each worker says of each block that it can load it"
    assert rows["the indexer's CPU"] >= 0
    assert "cpu" in done.stdout, "which machine this was"


def test_the_delay_of_a_configured_tier(tmp_path: Path) -> None:
    config, file = tmp_path / "hicache.yaml", tmp_path / "rows.json"
    config.write_text(f"tiers: [{{type: local, path: {tmp_path / 'tier'}, capacity: 64MiB, engine: threads}}]")
    words = ("--rounds", "2", "--workers", "0", "--config", str(config), "--json", str(file))
    done = bench("indexer", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert {row["what"].rsplit(", ", 1)[0] for row in found["delay"]} >= {"durable to answered, own stream"}
    assert "workers" not in found
    config.write_text("tiers: []")
    done = bench("indexer", *words)
    assert (done.returncode, "tiers" in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr


def test_a_trace_through_the_router(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    requests = [list(range(talk * 100, talk * 100 + 10)) for _ in range(3) for talk in range(8)]
    trace.write_text("".join(json.dumps({"hash_ids": blocks}) + "\n" for blocks in requests))
    file = tmp_path / "rows.json"
    done = bench("router", "--trace", str(trace), "--workers", "2", "--device", "20", "--json", str(file))
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["how"] for row in rows] == ["round robin", "device events", "with tier events"]
    assert all(0 < row["reused"] < 1 for row in rows)


def test_a_file_that_is_no_trace_is_named() -> None:
    done = bench("router", "--trace", __file__, "--router", "http://127.0.0.1:9")
    assert done.returncode == 2
    assert f"{__file__}, line 1: no trace" in done.stderr


@pytest.mark.parametrize("words", [("indexer", "--indexer"), ("router", "--trace", "/dev/null", "--router")])
def test_a_service_that_does_not_answer_is_named(words: tuple[str, ...]) -> None:
    done = bench(*words, "http://127.0.0.1:9")
    assert done.returncode == 2
    assert "http://127.0.0.1:9 does not answer. Fix: python -m dynamo." in done.stderr


def test_what_keeps_a_service_from_being_started_is_named_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(dynamo.Unavailable, match=r"not installed\. Fix: pip install"):
        dynamo.apart("dynamo_that_is_not_there.indexer", "--indexer")
    monkeypatch.setattr(dynamo.shutil, "which", lambda _: None)
    with pytest.raises(dynamo.Unavailable, match=r"every address.*Fix: start `python -m dynamo.indexer`.*--indexer"):
        dynamo.apart("dynamo.indexer", "--indexer")


def test_prompts_are_chained_as_sglang_chains_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.router.worker.PAGE", indexer.PAGE)
    keys, notes = indexer.chain(3, 5)
    made = prompt(notes.tokens.reshape(-1).tolist())
    assert b"".join(made.keys) == keys
    assert notes.hashes.T.tolist() == [made.hashes(), [0, *made.hashes()[:-1]]]
