"""`hicache-ext bench serve` against the real SGLang server on the CPU, with our backend: one start, each tier."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hicache_ext.cli import tiny_model
from hicache_ext.cli.main import app
from hicache_ext.cli.serve_subjects import Launched, parse_subject

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("sglang") is None, reason="needs the SGLang CPU environment (make venv)"),
]

TIERS = ("none", "device", "host", "local")
LENGTHS = (200, 1000)


def test_every_tier_of_a_live_server(tmp_path: Path) -> None:
    with Launched(parse_subject("ours"), tmp_path / "work", [], capacity="1GiB") as launched:
        engine, facts = launched.start(lambda _: None)
        assert (facts.page_tokens, facts.device_tokens, facts.host) == (16, 8192, True)
        result = tmp_path / "result.json"
        arguments = ["bench", "serve", "--url", engine.client.url, "--subject", "ours", "--requests", "2"]
        arguments += ["--vocabulary", str(tiny_model.VOCABULARY), "--json", str(result)]
        arguments += [word for length in LENGTHS for word in ("--length", str(length))]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        found = json.loads(result.read_text())

        rows = {(row["tier"], row["prompt_tokens"]): row for row in found["rows"]}
        assert rows.keys() == {(tier, length) for tier in TIERS for length in LENGTHS}
        for (tier, length), row in rows.items():
            assert (row["subject"], row["concurrency"], row["requests"], row["errors"]) == ("ours", 1, 2, 0)
            assert row["reached"], row
            assert row["identical"] is True, row
            assert row["ttft_ms"] > 0
            assert sum(row["tokens_from"].values()) == 2 * length
            if tier != "none":
                assert row["tokens_from"][tier] == 2 * ((length - 1) // 16 * 16)
        assert found["crossover"][0]["tier"] == "local"
        assert found["crossover"][0]["measured"] == list(LENGTHS)

        # The server is stopped: the same command says so in one line.
        launched.stop()
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 1
        assert "connection refused" in done.output
        assert len(done.output.strip().splitlines()) == 1
