"""The demo's prompts and its verdict: repeatable, sharing what the trace shares, and never kinder than the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hicache_ext.cli import demo, tiny_model
from hicache_ext.cli.serving import Answer, ServerFailed
from hicache_ext.cli.workload import TraceRequest, block_tokens, load_trace, prompt_tokens


def test_the_vendored_trace() -> None:
    requests = load_trace(demo.TRACE, 100)
    assert len(requests) == 24
    prompts = [prompt_tokens(request, tiny_model.VOCABULARY) for request in requests]
    assert sum(map(len, prompts)) == 36_032
    assert max(map(len, prompts)) == 3584
    assert all(0 <= token < tiny_model.VOCABULARY for prompt in prompts for token in prompt)
    # The caption's claim: more different tokens than device and host hold together.
    blocks = {block for request in requests for block in request.hash_ids[: 3584 // 64]}
    assert len(blocks) * 64 > demo.DEVICE_TOKENS * (1 + demo.HOST_RATIO)


def test_prompts_repeat_and_share_exactly_the_traces_prefixes() -> None:
    first = prompt_tokens(TraceRequest((0, 1, 2)), 4096)
    assert first == prompt_tokens(TraceRequest((0, 1, 2)), 4096)
    assert len(first) == 192
    second = prompt_tokens(TraceRequest((0, 1, 3)), 4096)
    assert first[:128] == second[:128]
    assert first[128] != second[128] or first[129] != second[129]
    assert prompt_tokens(TraceRequest(tuple(range(100))), 4096) == [
        token for block in range(56) for token in block_tokens(block, 4096)
    ]
    assert len(prompt_tokens(TraceRequest(tuple(range(100))), 4096, longest=100)) == 100


def test_tokens_are_the_same_on_every_machine() -> None:
    assert block_tokens(0, 4096, 8) == [3484, 2608, 2093, 1105, 1260, 167, 308, 67]


def test_a_line_that_is_no_request_is_named(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"hash_ids": [1]}\n\n{"other": 1}\n', encoding="utf-8")
    assert load_trace(trace, 1) == [TraceRequest((1,))]
    with pytest.raises(ValueError, match=r"trace\.jsonl:3: not a request"):
        load_trace(trace, 5)


def answer(tokens: list[int], first: float = 0.1, storage: int = 0, device: int = 0) -> Answer:
    return Answer(tokens, first, 1.0, 100, device, 0, storage)


def test_what_the_json_file_holds() -> None:
    cold = [answer([1, 2], 0.4), answer([3], 0.2), answer([4], 9.0)]
    replay = [answer([1, 2], 0.1, storage=96), answer([3], 0.05, storage=64, device=16), answer([4], 9.0, device=32)]
    result = demo.summarize("hicache_ext", cold, replay)
    assert result["identical"] is True
    assert result["requests"] == 3
    assert result["prompt_tokens"] == 300
    assert result["tokens"] == {"device": 48, "host": 0, "local": 160}
    # The third was not served by the tier, so it counts in neither time.
    assert result["ttft_ms"] == {"cold": 300.0, "local": 75.0}
    assert demo.verdict(result) == ""
    assert json.loads(json.dumps(result)) == result
    assert demo.table(result).row_count == 2


def test_a_different_output_fails() -> None:
    result = demo.summarize("hicache_ext", [answer([1]), answer([2])], [answer([1], storage=1), answer([3], storage=1)])
    assert result["identical"] is False
    assert "requests [1] differ" in demo.verdict(result)


def test_nothing_from_the_tier_fails() -> None:
    result = demo.summarize("hicache_ext", [answer([1])], [answer([1], device=64)])
    assert result["ttft_ms"] == {"cold": None, "local": None}
    assert "nothing was served from the local tier" in demo.verdict(result)
    assert demo.table(result).row_count == 2


def test_only_a_demos_own_folder_is_emptied(tmp_path: Path) -> None:
    settings = demo.Settings(tmp_path / "demo", demo.Backend.HICACHE_EXT, [[1]])
    settings.store.mkdir(parents=True)
    (settings.store / "precious").touch()
    with pytest.raises(ValueError, match="not made by this command"):
        demo._empty(settings)
    assert (settings.store / "precious").exists()
    other = demo.Settings(tmp_path / "new", demo.Backend.HICACHE_EXT, [[1]])
    demo._empty(other)
    (other.store / "old").touch()
    demo._empty(other)
    assert not list(other.store.iterdir())


def test_the_model_is_complete_and_made_once(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    folder = tiny_model.make(tmp_path / "model")
    weights = folder / "model.safetensors"
    made = weights.stat().st_mtime_ns
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == tiny_model.VOCABULARY
    tiny_model.make(folder)
    assert weights.stat().st_mtime_ns == made
    (folder / ".recipe.json").unlink()
    before = weights.read_bytes()
    tiny_model.make(folder)
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    ("replayed", "code", "said"),
    [
        (answer([1], storage=64), 0, "written"),
        (answer([2], storage=64), 1, "differ"),
        (answer([1], device=64), 1, "nothing was served"),
    ],
)
def test_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replayed: Answer, code: int, said: str) -> None:
    monkeypatch.setattr(demo, "run", lambda settings, console: demo.summarize("x", [answer([1])], [replayed]))
    written = tmp_path / "result.json"
    done = CliRunner().invoke(demo.app, ["--dir", str(tmp_path / "demo"), "--json", str(written)])
    assert done.exit_code == code, done.output
    assert said in done.output
    assert json.loads(written.read_text())["identical"] is (replayed.tokens == [1])


def test_a_dead_server_ends_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(settings: demo.Settings, console: object) -> dict:
        raise ServerFailed("the server ended with code 1; its log is server-cold.log and ends:\n[x] no such flag")

    monkeypatch.setattr(demo, "run", run)
    done = CliRunner().invoke(demo.app, ["--json", str(tmp_path / "result.json")])
    assert done.exit_code == 1
    assert "server-cold.log" in done.output
    assert "[x] no such flag" in done.output
    assert not (tmp_path / "result.json").exists()
