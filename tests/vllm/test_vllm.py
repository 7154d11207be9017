"""The connector under real vLLM: a fresh process loads what another stored, and nothing that fails costs a request.

Every scenario is an engine in a process of its own (rig.py); here is what must hold of the results.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.redis_server import RedisServer

HERE = Path(__file__).parent
PYTHON = Path(os.environ.get("VLLM_PYTHON") or HERE.parents[1] / "build/vllm/bin/python")
SCENARIOS = (
    "plain", "cold", "warm", "decoded", "decoded_fresh", "producer", "consumer", "salts", "damaged", "unverified",
    "failing", "hung", "preempted", "chunked", "aborted", "reset_while_saving", "killed_writer", "after_kill",
    "server_away", "remote", "remote_fresh", "mistakes", "beside_writer", "shared", "unshared", "exchanged",
    "announced", "scheduler_cost", "identifiers", "windows", "whole",
)  # fmt: skip

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not PYTHON.exists(), reason="no vLLM here: make vllm-env"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What each scenario returned. A scenario that raised is missing; its trace is in the test's output."""
    root = tmp_path_factory.mktemp("vllm")
    with ExitStack() as stack:
        server = stack.enter_context(RedisServer())
        (root / "redis.port").write_text(str(server.port))
        ran = subprocess.run(
            [str(PYTHON), str(HERE / "rig.py"), str(root), *SCENARIOS], cwd=HERE, capture_output=True, text=True,
            env={**os.environ, "SGLANG_PYTHON": sys.executable},
        )  # fmt: skip
    print(ran.stdout[-20000:], ran.stderr[-20000:])
    assert ran.returncode == 0, ran.stderr[-4000:]
    return {name: json.loads(file.read_text()) for name in SCENARIOS if (file := root / f"{name}.json").exists()}


def tokens(outputs: list[dict[str, Any]]) -> list[list[int]]:
    return [one["tokens"] for one in outputs]


def cached(outputs: list[dict[str, Any]]) -> list[int]:
    return [one["cached"] for one in outputs]


@pytest.fixture
def right(results: dict[str, Any]) -> list[list[int]]:
    """Tokens without a connector."""
    return tokens(results["plain"]["outputs"])


def test_a_fresh_process_loads_the_prefix(results: dict[str, Any], right: list[list[int]]) -> None:
    cold, warm = results["cold"], results["warm"]
    assert cached(cold["outputs"]) == [0, 0]
    assert cold["stored"] == 13
    assert tokens(cold["outputs"]) == right
    for name in ("first", "again", "stored_anew"):
        assert cached(warm[name]) == [384, 32], name
        assert tokens(warm[name]) == right, name
    assert warm["counts"]["load_hit"] == 26
    assert cold["leaked"] == warm["leaked"] == 0


def test_what_decode_steps_complete_is_saved_together_and_all_of_it(results: dict[str, Any]) -> None:
    """Requests that end at their limit, at a token, or by an abort; the last one is alone, so nobody's step follows."""
    found, fresh = results["decoded"], results["decoded_fresh"]
    assert tokens(found["outputs"]) == tokens(results["plain"]["many"])
    assert found["steps"] == [4 * 4, 4 * 3], "the prompts' pages go at once, those of 99 steps of decoding together"
    assert found["idle"] > 0, "what waited when the last request ended went with the step that computes nothing"
    assert found["left"] == found["left_again"] == 0
    assert "save_given_up" not in found["counts"]
    # Of a conversation everything but its last token is computed.
    assert cached(fresh["outputs"]) == [(length - 1) // 32 * 32 for length in fresh["lengths"]]
    assert found["leaked"] == 0
    reset = fresh["reset"]
    assert reset["waiting"] == reset["given_up"] == 2, "what waits when the cache is reset belongs to before"
    assert reset["steps"] == [2], "the prompt's pages were saved, and that was before it"
    assert reset["leaked"] == 0


def test_a_prefill_engine_stores_and_a_decode_engine_loads(results: dict[str, Any], right: list[list[int]]) -> None:
    produced, consumed = results["producer"], results["consumer"]
    assert cached(produced["outputs"]) == [0], "a producer asks nobody"
    assert cached(consumed["outputs"]) == [384, 0]
    assert not [name for name in consumed["counts"] if name.startswith("save")]
    assert tokens(produced["outputs"]) == right[:1]
    assert tokens(consumed["outputs"]) == right
    assert consumed["leaked"] == 0


def test_a_reset_of_the_connector_forgets(results: dict[str, Any], right: list[list[int]]) -> None:
    assert cached(results["warm"]["after_reset"]) == [0, 0]
    assert tokens(results["warm"]["after_reset"]) == right
    saving = results["reset_while_saving"]
    assert cached(saving["after"]) == [0]
    assert tokens(saving["after"]) == right[:1]
    assert saving["leaked"] == 0


def test_salts_never_meet(results: dict[str, Any], right: list[list[int]]) -> None:
    found = results["salts"]
    assert {name: cached(outputs) for name, outputs in found.items()} == {
        "a": [0],
        "b": [0],
        "a_again": [384],
        "none": [0],
    }
    assert all(tokens(outputs) == right[:1] for outputs in found.values())


def test_damaged_pages_are_computed_and_healed(results: dict[str, Any], right: list[list[int]]) -> None:
    found = results["damaged"]
    assert found["zeroed"]
    assert found["counts"]["load_corrupt"] >= 10
    assert tokens(found["outputs"]) == tokens(found["healed"]) == right[:1]
    assert found["leaked"] == 0
    # The negative control: without verification the same damage shows in the tokens.
    assert cached(results["unverified"]["outputs"]) == [384]
    assert tokens(results["unverified"]["outputs"]) != right[:1]


def test_what_cannot_be_loaded_is_computed(results: dict[str, Any], right: list[list[int]]) -> None:
    failing, hung = results["failing"], results["hung"]
    assert failing["counts"]["load_failed"] == 2
    assert tokens(failing["outputs"]) == right
    assert hung["held"] == 1, "a request asks once"
    assert hung["counts"]["load_timeout"] == 12
    assert tokens(hung["outputs"]) == tokens(hung["after"]) == right[:1]
    assert failing["leaked"] == hung["leaked"] == 0


def test_preemption_and_chunks(results: dict[str, Any], right: list[list[int]]) -> None:
    preempted, chunked = results["preempted"], results["chunked"]
    assert preempted["preemptions"] > 0
    assert preempted["counts"]["load_hit"] > 0, "what was resumed came from the tier"
    assert tokens(preempted["outputs"]) == tokens(results["plain"]["many"])
    assert cached(chunked["again"]) == [384, 32]
    assert tokens(chunked["first"]) == tokens(chunked["again"]) == right
    assert preempted["leaked"] == chunked["leaked"] == 0


def test_a_prompt_of_whole_pages_is_loaded_whole(results: dict[str, Any]) -> None:
    """vLLM takes the last token off such a load, so that it is a decode's step; not for what the device has already."""
    found = results["whole"]
    assert {name: cached(found[name]) for name in ("first", "device", "loaded", "twice")} == {
        "first": [0], "device": [352], "loaded": [384], "twice": [352],
    }  # fmt: skip
    assert found["counts"]["load_hit"] == 12
    assert found["failed"]["load_failed"] == 1
    for name in ("device", "loaded", "twice", "without_last"):
        assert tokens(found[name]) == tokens(found["first"]), name
    assert found["leaked"] == 0


def test_an_abort_during_a_load_gives_the_blocks_back_afterwards(
    results: dict[str, Any], right: list[list[int]]
) -> None:
    found = results["aborted"]
    assert found["on_its_way"] == found["still"] == 12, "nobody gets blocks that a load may write to"
    assert found["leaked"] == 0
    assert tokens(found["after"]) == right[:1]


def test_a_killed_engine_leaves_whole_pages(results: dict[str, Any]) -> None:
    assert "killed_writer" not in results
    found = results["after_kill"]
    assert found["counts"]["load_hit"] == 12
    assert tokens(found["outputs"]) == tokens(results["plain"]["killed"])
    assert found["leaked"] == 0


def test_a_server_that_is_away_costs_nothing(results: dict[str, Any], right: list[list[int]]) -> None:
    found = results["server_away"]
    assert cached(found["outputs"]) == [0, 0]
    assert tokens(found["outputs"]) == right
    assert found["leaked"] == 0


def test_a_server_is_asked_in_the_background(results: dict[str, Any], right: list[list[int]]) -> None:
    assert cached(results["remote"]["first"]) == [0, 0]
    assert cached(results["remote"]["again"]) == [384, 32]
    fresh = results["remote_fresh"]
    assert fresh["waits"] > 0
    assert cached(fresh["outputs"]) == [384, 32]
    assert tokens(results["remote"]["again"]) == tokens(fresh["outputs"]) == right
    assert fresh["leaked"] == 0


def test_two_engines_share_a_tier(results: dict[str, Any], right: list[list[int]]) -> None:
    found = results["beside_writer"]
    assert found["seen"] == 12
    assert cached(found["outputs"]) == [384]
    assert tokens(found["outputs"]) == right[:1]


@pytest.mark.parametrize(("page", "cached_tokens", "stored"), [("64", [384, 0], 6), ("16", [384, 32], 34)])
def test_shared_pages_are_grouped_and_split(
    results: dict[str, Any], right: list[list[int]], page: str, cached_tokens: list[int], stored: int
) -> None:
    found = results["shared"][page]
    assert found["tag"] == "canonical"
    assert cached(found["cold"]) == [0, 0]
    assert cached(found["warm"]) == cached_tokens
    assert cached(found["mixed"]) == [384]
    assert tokens(found["cold"]) == tokens(found["warm"]) == right
    assert tokens(found["mixed"]) == right[:1]
    assert found["stored"] == stored
    assert found["leaked"] == 0


def test_what_cannot_be_shared_is_said_and_kept_apart(results: dict[str, Any], right: list[list[int]]) -> None:
    found = results["unshared"]
    (line,) = found["said"]
    assert "pages of 32 tokens and `share_page: 48` do not divide one another. Pages are this engine's own" in line
    assert found["tag"] != "canonical"
    assert cached(found["outputs"]) == [384]
    assert tokens(found["outputs"]) == right[:1]
    assert found["leaked"] == 0


def test_sglang_and_vllm_read_each_others_pages(results: dict[str, Any], right: list[list[int]]) -> None:
    """Against the KV of a third implementation, in both directions."""
    there = results["exchanged"]["there"]
    assert there["read"] == 384
    assert there["difference"] < 1e-3 * there["scale"], "what vLLM stored is the model's KV"
    assert there["stored"] == 6
    assert results["exchanged"]["counts"]["load_hit"] == 6
    assert cached(results["exchanged"]["outputs"]) == [384]
    assert tokens(results["exchanged"]["outputs"]) == right[:1], "vLLM goes on from what SGLang stored"


def test_what_the_tier_holds_is_in_vllms_own_event_stream(results: dict[str, Any]) -> None:
    """Blocks have the names that vLLM's events of the device give them, so a router follows a prompt down."""
    found = results["announced"]

    def blocks(events: list[dict[str, Any]], medium: str) -> list[tuple[int, int | None]]:
        """Of plain prompts: each block, and the one before it."""
        pairs = []
        for event in events:
            if event["type"] == "BlockStored" and event["medium"] == medium and not any(event["extra_keys"] or ()):
                assert len(event["token_ids"]) == event["block_size"] * len(event["block_hashes"])
                before = event["parent_block_hash"]
                for block in event["block_hashes"]:
                    pairs.append((block, before))
                    before = block
        return pairs

    device = blocks(found["stored"], "GPU")
    assert len(device) == 12
    for name in ("stored", "flushed", "restarted"):
        assert sorted(map(repr, blocks(found[name], "DISK"))) == sorted(map(repr, device)), name
    kinds = [event["type"] for event in found["flushed"]]
    first = next(at for at, event in enumerate(found["flushed"]) if event.get("medium") == "DISK")
    assert kinds.index("AllBlocksCleared") < first, "what consumers forgot is said again afterwards"
    assert found["leaked"] == [0]


def test_what_the_scheduler_pays_is_measured(results: dict[str, Any]) -> None:
    rows = results["scheduler_cost"]
    assert [(row["pages"], row["what"]) for row in rows] == [(1, "saved"), (1, "loaded"), (9, "saved"), (9, "loaded")]
    assert all(row["us"] > 0 for row in rows)


def test_equal_tokens_that_are_not_the_same_never_meet(results: dict[str, Any]) -> None:
    """Two images under the same placeholder tokens, two adapters of one name, a salt."""
    keys = results["identifiers"]["keys"]
    assert all(len(pages) == 4 for pages in keys.values())
    assert keys["cat"] == keys["cat_again"]
    assert keys["text"][0] == keys["cat"][0] == keys["dog"][0], "the text before an image is shared"
    for page in (1, 2, 3):
        assert len({keys[name][page] for name in ("text", "cat", "dog")}) == 3
    assert keys["lora"] == keys["copy"], "an adapter is its content"
    for page in range(4):
        assert len({keys[name][page] for name in ("text", "salted", "lora", "other")}) == 4
    assert not results["identifiers"]["embedded"], "embeddings have no name"


def test_sliding_windows_load_what_they_look_at(results: dict[str, Any]) -> None:
    """Two groups of blocks: of the one with windows the last two pages are loaded, of the other all twelve."""
    found = results["windows"]
    right = tokens(found["alone"])
    assert found["groups"] == 2
    assert len(set(right[0])) > 8, "a model that repeats itself shows nothing"
    assert cached(found["warm"]) == [384, 32]
    assert found["counts"]["load_hit"] == 12 + 2 + 1 + 1
    assert cached(found["after_reset"]) == [0]
    for name in ("cold", "warm", "failing", "after_reset"):
        assert tokens(found[name]) == right[: len(found[name])], name
    assert tokens(found["many"]) == tokens(found["many_warm"]) == tokens(found["many_alone"])
    assert found["tag"] != "canonical", "such models are not shared"
    assert found["leaked"] == 0


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (
            "policy",
            "kv_load_failure_policy = 'fail': a page that cannot be loaded would fail its request. Fix: add \"kv_",
        ),
        (
            "option",
            "kv_connector_extra_config.load_timeuot = 3: unknown key. Fix: remove it, or use one of: "
            "device_staging_bytes, load_bytes, load_timeout",
        ),
        ("tier", "tiers[0].type = 'lokal': no such backend. Fix: one of "),
        ("file", "none.yaml: cannot be read: [Errno 2] No such file or directory"),
    ],
)
def test_a_mistake_is_named_at_start(results: dict[str, Any], mistake: str, says: str) -> None:
    assert says in results["mistakes"][mistake]
