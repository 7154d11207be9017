"""The parts of `bench serve` that need no engine: percentiles, crossings, rows, prompts, answers, subjects."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache_ext.bench.serve_client import Client, EngineError, Reply
from hicache_ext.bench.serve_engines import SGLang, metric
from hicache_ext.bench.serve_goals import goals
from hicache_ext.bench.serve_matrix import Draw, Group, Tier, fillers, from_trace, groups, too_large
from hicache_ext.bench.serve_state import State, StateError
from hicache_ext.bench.serve_summary import (
    Cell,
    Sample,
    Span,
    against_cold,
    disk_bounds,
    losing,
    percentile,
    rows,
    verdict_line,
    verdicts,
)
from hicache_ext.bench.serve_trace import most_from, pass_line, trace_rows
from hicache_ext.bench.trace import TraceError
from hicache_ext.cli.serve_run import Report
from hicache_ext.cli.serve_subjects import Launched, Subject, SubjectError, parse_subject, split_flags

# ---- percentiles


def test_percentiles_are_linear_between_values() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([0.0, 10.0], 0.9) == pytest.approx(9.0)
    assert percentile([7.0], 0.99) == 7.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_percentiles_keep_order_and_bounds(values: list[float], low: float, high: float) -> None:
    low, high = sorted((low, high))
    slack = 1e-9 * max(values)
    assert min(values) - slack <= percentile(values, low) <= percentile(values, high) + slack <= max(values) + 2 * slack


# ---- where a tier loses


@pytest.mark.parametrize(
    ("tier", "computing", "spans"),
    [
        # a fixed cost: loses while prompts are short; the lines cross half-way
        ({1000: 30, 2000: 40}, {1000: 20, 2000: 50}, [Span(1000, 1500, (True, False))]),
        # the crossing is nearer to the length at which the difference is smaller
        ({0: 10, 100: 0}, {0: 0, 100: 30}, [Span(0, 25, (True, False))]),
        # loses everywhere, nowhere, and for long prompts only
        ({10: 2, 20: 3, 30: 4}, {10: 1, 20: 1, 30: 1}, [Span(10, 30, (True, True))]),
        ({10: 1, 20: 1}, {10: 2, 20: 2}, []),
        ({10: 1, 20: 3}, {10: 2, 20: 2}, [Span(15, 20, (False, True))]),
        # loses, wins, loses
        ({0: 2, 10: 0, 20: 2}, {0: 1, 10: 1, 20: 1}, [Span(0, 5, (True, False)), Span(15, 20, (False, True))]),
        # a tie is no loss; lengths that only one has do not count
        ({10: 5, 20: 5}, {10: 5, 20: 5}, []),
        ({10: 5, 15: 99, 20: 5}, {10: 6, 20: 6, 30: 1}, []),
        ({10: 9}, {10: 1}, [Span(10, 10, (True, True))]),
        ({10: 9}, {20: 1}, []),
    ],
)
def test_lengths_at_which_a_tier_loses(tier: dict, computing: dict, spans: list[Span]) -> None:
    assert losing(tier, computing) == spans


#: As clocks give them: none so small that a product with it is nothing.
MILLISECONDS = st.integers(0, 10**8).map(lambda thousandths: thousandths / 1000)


@given(st.dictionaries(st.integers(1, 10**6), st.tuples(MILLISECONDS, MILLISECONDS), min_size=1))
def test_every_measured_length_lies_on_the_right_side(points: dict[int, tuple[float, float]]) -> None:
    spans = losing({n: t for n, (t, _) in points.items()}, {n: c for n, (_, c) in points.items()})
    assert all(a.last <= b.first for a, b in pairwise(spans))
    for tokens, (tier, computing) in points.items():
        inside = any(span.first <= tokens <= span.last for span in spans)
        assert inside or tier <= computing


def cell(subject: str, tier: str, tokens: int, ttft: float, **fields: object) -> dict:
    row = {"subject": subject, "tier": tier, "prompt_tokens": tokens, "concurrency": 1, "ttft_ms": ttft}
    return {**row, "reached": True, **fields}


def test_verdicts_are_held_against_recompute_and_leave_out_what_came_from_elsewhere() -> None:
    found = [
        cell("ours", "none", 1000, 1.0),  # not held against this, recompute is there
        cell("recompute", "none", 1000, 20.0),
        cell("recompute", "none", 2000, 50.0),
        cell("ours", "local", 1000, 30.0),
        cell("ours", "local", 2000, 40.0),
        cell("ours", "local", 3000, 40.0, reached=False),
        cell("stock-file", "local", 2000, 500.0),
    ]
    ours, stock = verdicts(found)
    assert (ours["subject"], ours["against"], ours["measured"]) == ("ours", "recompute", [1000, 2000])
    assert ours["loses"] == [{"from": 1000, "to": 1500, "open": [True, False]}]
    assert verdict_line(ours).endswith("loses to recompute from 1,000 (the shortest measured) to 1,500 tokens")
    assert stock["loses"] == [{"from": 2000, "to": 2000, "open": [True, True]}]
    alone = verdicts([cell("ours", "none", 1000, 50.0), cell("ours", "remote", 1000, 10.0)])
    assert alone[0]["against"] == "ours"
    assert verdict_line(alone[0]) == (
        "ours, remote, 1 at a time: loses to recompute nowhere from 1,000 to 1,000 tokens"
    )


def test_a_disk_bound_is_bytes_over_speed_and_a_host_hit() -> None:
    found = [cell("ours", "host", 1000, 5.0), cell("ours", "local", 1000, 30.0), cell("ours-2", "local", 1000, 1.0)]
    (bound,) = disk_bounds(found, {"ours": 2.0}, 40_000)
    assert (bound["disk_ms"], bound["disk_and_host_hit_ms"], bound["ratio"]) == (20.0, 25.0, 1.2)
    assert disk_bounds(found, {"ours": 2.0}, 0) == []


def test_goals_of_a_disk_and_of_memory_in_its_place() -> None:
    same = {"identical": True, "different": 0, "requests": 2}
    found = [
        cell("ours", "none", 32768, 1000.0, **{**same, "identical": False, "different": 2}),
        cell("ours", "host", 32768, 100.0, **same),
        cell("ours", "local", 32768, 1290.0, **same),
        cell("ours-ram", "none", 8192, 100.0, **same),
        cell("ours-ram", "local", 8192, 90.0, **same),
        cell("ours-ram", "none", 32768, 1000.0, **same),
        cell("ours-ram", "local", 32768, 410.0, **{**same, "identical": False, "different": 1}),
        cell("stock-file", "none", 32768, 900.0, **same),
        cell("stock-file", "local", 32768, 9000.0, **same),
    ]
    bounds = disk_bounds(found, {"ours": 2.0, "ours-ram": 50.0, "stock-file": 2.0}, 61_035)
    said = [goal.line() for goal in goals(found, bounds, {"ours-ram"})]
    assert said == [
        "ours, 32,768 tokens from the disk: a host hit and 1.19 of plain reads (goal: at most 1.2): met",
        "ours-ram, 32,768 tokens from memory in place of a disk: 0.41 of computing them (ours-ram) "
        "(goal: at most 0.4): MISSED",
        "ours: 0 of 4 outputs differ from a device hit's (goal: at most 0): met",
        "ours-ram: 1 of 4 outputs differ from a device hit's (goal: at most 0): MISSED",
    ]
    recomputed = goals([*found, cell("recompute", "none", 32768, 2000.0, **same)], [], {"ours-ram"})
    assert (
        next(recomputed)
        .line()
        .startswith("ours-ram, 32,768 tokens from memory in place of a disk: 0.205 of computing them (recompute)")
    )
    assert against_cold(found) == [
        {"subject": "ours", "requests": 2, "different": 2},
        {"subject": "ours-ram", "requests": 4, "different": 0},
        {"subject": "stock-file", "requests": 2, "different": 0},
    ]


def test_subjects_on_one_disk_are_held_against_its_best() -> None:
    report = Report(
        about={
            "ours": {"file_system": "ext4 on /dev/vda", "read_gb_per_s": 1.2},
            "stock-file": {"file_system": "ext4 on /dev/vda", "read_gb_per_s": 1.7},
            "ours-ram": {"file_system": "tmpfs", "read_gb_per_s": 50.0},
            "recompute": {},
        }
    )
    assert report.speeds() == {"ours": 1.7, "stock-file": 1.7, "ours-ram": 50.0}


# ---- rows


def reply(tokens: list[int], first_s: float, prompt: int = 65, **cached: int) -> Reply:
    return Reply(tokens, first_s, first_s + 0.1, prompt, {"device": 0, "host": 0, "storage": 0, **cached})


def test_a_row_of_a_cell() -> None:
    where = Cell("ours", Tier.LOCAL, 65, 2)
    found = [reply([1, 2], 0.010, storage=64), reply([3, 4], 0.030, storage=64), Reply(error="no answer in time")]
    (row,) = rows([Sample(where, found, 0.5, [[1, 2], [3, 9], [5, 6]])], 16, {})
    assert (row["subject"], row["tier"], row["prompt_tokens"], row["concurrency"]) == ("ours", "local", 65, 2)
    assert (row["ttft_ms"], row["tpot_ms"]) == (20.0, 100.0)
    assert row["tokens_from"] == {"computed": 2, "device": 0, "host": 0, "local": 128}
    assert (row["requests"], row["errors"], row["error"]) == (2, 1, "no answer in time")
    assert (row["prompt_tokens_per_s"], row["output_tokens_per_s"]) == (260.0, 8.0)
    assert row["reached"]
    assert row["identical"] is False, "one output differs"
    assert row["different"] == 1
    (row,) = rows([Sample(where, found[:1], 0.5, [[1, 2]])], 16, {})
    assert row["identical"] is True


def test_a_row_says_when_prompts_came_from_elsewhere() -> None:
    samples = [
        Sample(Cell("ours", Tier.HOST, 65, 1), [reply([1], 0.1, device=64)], 1.0),
        Sample(Cell("ours", Tier.NONE, 65, 1), [reply([1], 0.1)], 1.0),
        Sample(Cell("ours", Tier.REMOTE, 65, 1), [reply([1], 0.1, storage=64)], 1.0),
        Sample(Cell("ours", Tier.DEVICE, 65, 1), [Reply(error="gone")], 1.0),
    ]
    host, none, remote, device = rows(samples, 16, {"ours": Tier.LOCAL})
    assert not host["reached"]
    assert host["tokens_from"]["local"] == 0
    assert none["reached"]
    assert none["identical"] is None, "there was nothing to compare with"
    assert remote["reached"]
    assert remote["tokens_from"]["remote"] == 64
    assert not device["reached"]
    assert device["ttft_ms"] is None


def test_rounds_share_a_row() -> None:
    where = Cell("ours", Tier.NONE, 65, 1)
    (row,) = rows([Sample(where, [reply([1], 0.1)], 1.0), Sample(where, [reply([1], 0.3)], 1.0)], 16, {})
    assert (row["requests"], row["ttft_ms"]) == (2, 200.0)


# ---- prompts


def test_groups_have_a_burst_at_least_and_no_doubles() -> None:
    assert groups([100, 50, 100], [4, 1], 2) == [Group(50, 1, 2), Group(50, 4, 4), Group(100, 1, 2), Group(100, 4, 4)]


def test_prompts_repeat_for_a_seed_and_share_nothing() -> None:
    group = Group(200, 2, 3)
    first, again, other = (group.prompts(Draw(seed, 5000)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    everything = [
        *first,
        *Group(200, 1, 3).prompts(Draw(1, 5000)),
        Draw(1, 5000).warm(200),
        Draw(1, 5000).filler(0, 200),
    ]
    assert len({tuple(prompt[:16]) for prompt in everything}) == len(everything), "no two share a page"
    assert all(10 <= token < 5000 for prompt in everything for token in prompt)


def test_what_an_engine_cannot_take_is_told() -> None:
    wanted = groups([100, 1000, 5000], [1], 1)
    assert too_large(wanted, 8, longest=1004, device_tokens=800) == [
        "prompts of 1,000 tokens: the engine takes 996",
        "prompts of 5,000 tokens: the engine takes 996",
    ]
    assert too_large(wanted[:2], 8, longest=0, device_tokens=800) == [
        "prompts of 1,000 tokens: device memory holds 800"
    ]
    assert too_large(wanted, 8, 0, 0) == []


@given(st.integers(1024, 10**7), st.integers(300, 10**7))
def test_fillers_fill_the_device_and_each_fits(device: int, longest: int) -> None:
    lengths = fillers(device, longest)
    assert sum(lengths) > device
    assert max(lengths) <= max(longest, 0)
    assert max(lengths) < device


def test_a_traces_blocks_become_shared_prefixes(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 1000, "input_length": 1200, "hash_ids": [1, 2, 3]},
        {"timestamp": 3000, "input_length": 1024, "hash_ids": [1, 4]},
        {"timestamp": 3500, "input_length": 100, "hash_ids": [5]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    first, second, third = from_trace(path, Draw(1, 4096), 10, 64, 1000)
    assert [request.at_s for request in (first, second, third)] == [0.0, 2.0, 2.5]
    assert [len(request.prompt) for request in (first, second, third)] == [128 + 22, 128, 12]
    assert first.prompt[:64] == second.prompt[:64]
    assert first.prompt[64:128] != second.prompt[64:128]
    assert [len(request.prompt) for request in from_trace(path, Draw(1, 4096), 2, 64, 70)] == [70, 70]
    with pytest.raises(TraceError, match="no requests"):
        from_trace(path, Draw(1, 4096), 0, 64, 70)


# ---- a replayed trace


def test_a_replays_rows_are_grouped_by_what_gave_most() -> None:
    replies = [
        reply([1], 0.1),
        reply([2], 0.2, storage=40, device=10),
        reply([3], 0.3, storage=64),
        Reply(error="gone"),
    ]
    assert [most_from(each, Tier.LOCAL) for each in replies[:3]] == [Tier.NONE, Tier.LOCAL, Tier.LOCAL]
    none, local = trace_rows("ours", "replay", replies, [*replies[:2], reply([9], 0.1), replies[3]], 2, Tier.LOCAL)
    assert (none["tier"], none["requests"], none["identical"]) == ("none", 1, True)
    assert (local["tier"], local["requests"], local["identical"], local["different"]) == ("local", 2, False, 1)
    (first, _) = trace_rows("ours", "first", replies, None, 2, Tier.LOCAL)
    assert first["identical"] is None
    assert pass_line("replay", replies, 2.0)["errors"] == 1


# ---- SGLang's answers


def event(ids: list[int], done: int, **meta: object) -> bytes:
    values = {"output_ids": ids, "meta_info": {"completion_tokens": done, "prompt_tokens": 5, **meta}}
    return b"data: " + json.dumps(values).encode() + b"\n"


@pytest.mark.parametrize("pieces", [[[7], [7, 8], [7, 8, 9]], [[7], [8], [9]], [[], [7, 8], [7, 8, 9]]])
def test_all_so_far_or_only_the_new_tokens(pieces: list[list[int]]) -> None:
    details = {"device": 1, "host": None, "storage": 3, "storage_backend": "x"}
    done = [1, 2, 3] if pieces[0] else [0, 2, 3]
    lines = [event(ids, count, cached_tokens_details=details) for ids, count in zip(pieces, done, strict=True)]
    parsed = SGLang(Client("http://h:1")).parse([*lines, b"data: [DONE]\n"])
    assert parsed.tokens == [7, 8, 9]
    assert parsed.first == (0 if pieces[0] else 1)
    assert parsed.cached == {"device": 1, "host": 0, "storage": 3}
    assert parsed.prompt_tokens == 5


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([], "without a token"),
        ([b"data: [DONE]\n"], "without a token"),
        ([b'data: {"error": {"message": "too long"}}\n'], "refused: .*too long"),
        ([b"<html>\n"], "not an event"),
        ([b"data: 7\n"], "not an event"),
        ([event([7], 1), event([], 3)], "1 of 3 tokens"),
    ],
)
def test_answers_that_are_none(lines: list[bytes], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        SGLang(Client("http://h:1")).parse(lines)


def test_only_a_sum_of_cached_tokens() -> None:
    parsed = SGLang(Client("http://h:1")).parse([event([7], 1, cached_tokens=4)])
    assert parsed.cached == {"device": 4, "host": 0, "storage": 0}


def test_a_metrics_sum() -> None:
    text = '# HELP a x\na{b="1"} 2.0\na{b="2"} 3\nab 9\n'
    assert metric(text, "a") == 5
    assert metric(text, "c") is None


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://h:port"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(EngineError, match="is no URL"):
        Client(url)


# ---- phases


def test_a_state_comes_back_and_other_prompts_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    state = State("ours", Draw(3, 4096), 8, {Group(64, 1, 2): [[1, 2], [3, 4]]}, [{"subject": "ours"}])
    state.save(path)
    assert State.load(path) == state
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "seed": 4}))
    with pytest.raises(StateError, match="other prompts"):
        State.load(path)
    path.write_text(json.dumps({**values, "version": 9}))
    with pytest.raises(StateError, match="of version 9"):
        State.load(path)
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(StateError, match="no state"):
            State.load(path)
    with pytest.raises(StateError, match="run --phase fill"):
        State.load(tmp_path / "none")


# ---- subjects


def test_subjects() -> None:
    assert parse_subject("stock-file").stock == "file"
    assert parse_subject("recompute").tiers == {Tier.NONE, Tier.DEVICE}
    assert Tier.LOCAL in parse_subject("ours").tiers
    for text in ("theirs", "ours2", "stock-", "", "recompute=x.yaml", "ours=/nowhere.yaml"):
        with pytest.raises(SubjectError):
            parse_subject(text)


def test_a_launch_line_is_the_users_but_for_what_a_subject_is(tmp_path: Path) -> None:
    flags = split_flags("--model-path '/m 1' --page-size 32 --hicache-storage-prefetch-policy timeout")
    for text in (
        "--port 1 --model-path x",
        "--page-size 1",
        "--model-path 'x",
        "--model x --hicache-storage-backend=file",
    ):
        with pytest.raises(SubjectError):
            split_flags(text)

    def line(name: str) -> list[str]:
        with Launched(Subject(name), tmp_path, flags) as launched:
            assert launched.store.is_dir()
            words = launched.launch_line(7)
        assert not launched.store.exists(), "a store of the run's own goes with it"
        return words

    def last(words: list[str], flag: str) -> str:
        return words[len(words) - words[::-1].index(flag)]

    ours, stock, plain = line("ours"), line("stock-file"), line("recompute")
    assert last(ours, "--hicache-storage-backend") == "hicache_ext"
    assert last(stock, "--hicache-storage-backend") == "file"
    assert json.loads(last(stock, "--hicache-storage-backend-extra-config")) == {"prefetch_threshold": 32}
    assert last(ours, "--hicache-storage-prefetch-policy") == "timeout"
    assert "--enable-hierarchical-cache" not in plain
    assert "--hicache-storage-backend" not in plain
    assert all("/m 1" in words for words in (ours, stock, plain))


def test_a_folder_that_was_there_is_not_emptied(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"

    def launched(name: str) -> Launched:
        config.write_text(f"tiers:\n- {{type: local, path: {tmp_path / name}, capacity: 1GiB}}\n")
        return Launched(parse_subject(f"ours-x={config}"), tmp_path / "work", ["--model-path", "x"])

    (tmp_path / "old").mkdir()
    with launched("old") as each:
        assert "was there before" in each.forget_local()
    assert (tmp_path / "old").exists()
    with launched("new") as each:
        (tmp_path / "new").mkdir()
        assert each.forget_local() == ""
        assert not (tmp_path / "new").exists()
