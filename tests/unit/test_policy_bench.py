"""`bench policy`: the trace's format, Belady's bound against every policy and a search, the command's files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from hicache_ext.bench import trace as trace_module
from hicache_ext.bench.policy import CAPACITIES, Setup, run
from hicache_ext.bench.replay import Front, belady, replay
from hicache_ext.bench.trace import NEVER, Trace, TraceError, compile_trace
from hicache_ext.cli.bench import app
from storage_backends.local.policy import ORDERS, Lru, Tier

SAMPLE = Path(__file__).parents[2] / "examples/trace/mooncake_conversation_24.jsonl"


def write(path: Path, chains: Sequence[Sequence[int]]) -> Path:
    lines = [
        json.dumps({"timestamp": 1000 * i, "input_length": 512 * len(chain), "output_length": 1, "hash_ids": [*chain]})
        for i, chain in enumerate(chains)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def compiled(folder: Path, chains: Sequence[Sequence[int]]) -> Trace:
    return compile_trace(write(folder / "trace.jsonl", chains), folder)


#: Chains of a tree with three children a page, so that prefixes are shared.
chains = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=40)
no_fixture_check = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@no_fixture_check
@given(chains=chains, capacity=st.integers(1, 12), front=st.integers(0, 4))
def test_no_policy_beats_belady(tmp_path: Path, chains: list[list[int]], capacity: int, front: int) -> None:
    trace = compiled(tmp_path, chains)
    bound = belady(trace, capacity + front)
    assert bound.read <= trace.reusable
    for order in ORDERS.values():
        outcome = replay(trace, Tier(order(capacity)), front)
        assert outcome.front + outcome.read <= bound.read


@settings(no_fixture_check, max_examples=40)
@given(chains=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3), max_size=7, min_size=1))
def test_belady_is_what_a_search_over_all_choices_finds(tmp_path: Path, chains: list[list[int]]) -> None:
    """Every set that a policy could keep after every request, closed under prefixes or not."""
    trace, capacity = compiled(tmp_path, chains), 2
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for _, _, chain in trace:
        after: dict[frozenset[int], int] = {}
        for kept, hits in best.items():
            now = hits + sum(1 for _ in itertools.takewhile(kept.__contains__, chain))
            pool = kept | set(chain)
            for size in range(capacity + 1):
                for choice in map(frozenset, itertools.combinations(pool, size)):
                    after[choice] = max(after.get(choice, 0), now)
        best = after
    assert belady(trace, capacity).read == max(best.values())


@no_fixture_check
@given(chains=chains)
def test_with_room_for_all_every_policy_has_every_reuse(tmp_path: Path, chains: list[list[int]]) -> None:
    trace = compiled(tmp_path, chains)
    for order in ORDERS.values():
        outcome = replay(trace, Tier(order(trace.distinct)))
        assert (outcome.read, outcome.written) == (trace.reusable, trace.distinct)
    assert belady(trace, trace.distinct).read == trace.reusable


@no_fixture_check
@given(chains=chains, share=st.integers(1, 7))
def test_next_uses_do_not_depend_on_how_they_are_sorted(tmp_path: Path, chains: list[list[int]], share: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_module, "_LINK_PAGES", share)
        patch.setattr(trace_module, "_READ_REQUESTS", share)
        trace = compiled(tmp_path, chains)
        found = list(trace.with_next())
    last: dict[int, int] = {}
    for i, (chain, following) in reversed(list(enumerate(found))):
        assert following == [last.get(page, NEVER) for page in chain]
        last.update(dict.fromkeys(chain, i))
    assert trace.distinct == len(last)


def test_a_page_is_named_by_all_ids_before_it_and_must_be_full(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [(1024, [1, 2]), (1024, [3, 2]), (1500, [1, 2, 9]), (1536, [1, 2, 9])]
    path.write_text("".join(f'{{"timestamp": 0, "input_length": {n}, "hash_ids": {ids}}}\n\n' for n, ids in lines))
    trace = compile_trace(path, tmp_path)
    first, second, third, fourth = [chain for _, _, chain in trace]
    assert first[1] != second[1]
    assert third == first
    assert len(fourth) == 3
    assert (trace.requests, trace.distinct, trace.tokens) == (4, 5, 5084)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("\udcff", "not JSON"),
        ("[]", "list"),
        ('{"timestamp": 1}', "without input_length, hash_ids"),
        ('{"timestamp": "x", "input_length": 1, "hash_ids": []}', "timestamp"),
        ('{"timestamp": NaN, "input_length": 1, "hash_ids": []}', "timestamp"),
        ('{"timestamp": 0, "input_length": -1, "hash_ids": []}', "input_length"),
        ('{"timestamp": 0, "input_length": 100000000000000000000, "hash_ids": []}', "input_length"),
        ('{"timestamp": 0, "input_length": 512, "hash_ids": [true]}', "hash_ids"),
        ('{"timestamp": 0, "input_length": 512, "hash_ids": [1, 2]}', "2 hash_ids"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = write(tmp_path / "trace.jsonl", [[1], [2]])
    path.write_bytes(path.read_bytes() + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(TraceError, match=r"trace\.jsonl:3: .*" + says):
        compile_trace(path, tmp_path)


def test_a_trace_without_requests_or_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(TraceError, match="no requests"):
        compile_trace(tmp_path / "empty", tmp_path)
    with pytest.raises(TraceError, match="No such file"):
        compile_trace(tmp_path / "absent", tmp_path)


def test_the_front_absorbs_hits_and_the_tier_keeps_the_heads_that_it_is_not_asked_for(tmp_path: Path) -> None:
    trace = compiled(tmp_path, [[1, 2], [1, 2, 3], [4], [5], [1, 2, 3]])
    outcome = replay(trace, Tier(Lru(10)), front_capacity=3)
    assert (outcome.front, outcome.read, outcome.written) == (3, 2, 5)
    front = Front(2)
    assert [front.use([1, 2, 3]), front.use([1, 2, 3])] == [0, 2], "of a chain too long the head stays"


def test_rows(tmp_path: Path) -> None:
    rows = run(compile_trace(SAMPLE, tmp_path), Setup(), lambda _: None)
    assert [(row["capacity_fraction"], row["policy"]) for row in rows] == [
        (capacity, policy) for capacity in CAPACITIES for policy in ("belady", *ORDERS)
    ]
    assert {row["policy"] for row in rows if row.get("default")} == {"credit"}


def test_command_writes_rows_and_a_picture(tmp_path: Path) -> None:
    out, picture = tmp_path / "rows.json", tmp_path / "curves.png"
    options = ["--capacity", "10%", "--capacity", "0.5", "--admission", "second-hit", "--front", "0.01"]
    result = CliRunner().invoke(
        app, ["policy", "--trace", str(SAMPLE), *options, "--json", str(out), "--plot", str(picture)]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert {"machine", "command", "rows"} <= report.keys()
    row = next(row for row in report["rows"] if row["policy"] == "credit")
    assert {"capacity_fraction", "token_hit_ratio", "bytes_written_per_byte_read", "default"} <= row.keys()
    assert row["rejected"]["second_hit"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "code"),
    [(["--capacity", "0"], 2), (["--capacity", "x"], 2), (["--admission", "write-budget"], 2), (["--front", "1"], 2)],
)
def test_command_refuses_bad_options(options: list[str], code: int) -> None:
    assert CliRunner().invoke(app, ["policy", "--trace", str(SAMPLE), *options]).exit_code == code


def test_command_says_which_line_is_bad(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    result = CliRunner().invoke(app, ["policy", "--trace", str(bad)])
    assert result.exit_code == 1
    assert "bad.jsonl:1: without" in result.output.replace("\n", "")
