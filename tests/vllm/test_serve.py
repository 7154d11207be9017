"""The served examples: prefill and decode engines over one store, their KV events read by Dynamo's own indexer."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hicache_ext.cli.serving import Server, free_port
from tests.redis_server import RedisServer
from tests.router.indexer import Indexer
from tests.vllm.test_vllm import HERE, PYTHON

EXAMPLES = HERE.parents[1] / "examples/vllm"
PAGE, TOKENS = 32, 384  # of a prompt of 400 tokens: the whole pages before the last token
PROMPT = random.Random(7).choices(range(3, 1024), k=400)
START_SECONDS, SECONDS = 500.0, 120.0
#: A text model of the tests on two cores: small, and the same numbers in every engine.
OPTIONS = (
    "--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "4",
    "--block-size", str(PAGE), "--enforce-eager", "--enable-prompt-tokens-details",
)  # fmt: skip

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.with_name("vllm").exists(), reason="no vLLM here: make vllm-env"),
]


@dataclass(frozen=True)
class Pair:
    """The running example. prefill, decode: ports. events, replay: of the prefill engine. store: what both share."""

    prefill: int
    decode: int
    events: str
    replay: str
    server: Server
    store: RedisServer

    def ask(self, port: int, prompt: list[int], tokens: int) -> tuple[list[int], int]:
        """Greedy tokens, and how many of the prompt came from any cache."""
        self.server.check_alive()
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        try:
            connection.request(
                "POST", "/v1/completions", json.dumps({**body, "return_token_ids": True}),
                {"Content-Type": "application/json"},
            )  # fmt: skip
            answer = connection.getresponse()
            said = answer.read()
            assert answer.status == 200, said
        finally:
            connection.close()
        found: dict[str, Any] = json.loads(said)
        details = found["usage"].get("prompt_tokens_details") or {}
        return found["choices"][0]["token_ids"], int(details.get("cached_tokens") or 0)

    def leave(self, port: int, prompt: list[int], tokens: int) -> list[int]:
        """Go away in the middle of the answer, after at least so many of 800 tokens; those that were seen."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 800, "temperature": 0, "ignore_eos": True}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        found: list[int] = []
        try:
            connection.request(
                "POST", "/v1/completions", json.dumps({**body, "return_token_ids": True, "stream": True}),
                {"Content-Type": "application/json"},
            )  # fmt: skip
            answer = connection.getresponse()
            while len(found) < tokens:
                line = answer.readline()
                assert line, "the answer ended"
                if line.startswith(b"data: {"):
                    found += json.loads(line[6:])["choices"][0]["token_ids"] or []
        finally:
            connection.close()
        return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    root = tmp_path_factory.mktemp("served")
    make = "import sys, pathlib, rig; rig.make_model(pathlib.Path(sys.argv[1]))"
    subprocess.run([str(PYTHON), "-c", make, str(root / "model")], cwd=HERE, check=True)
    prefill, decode = free_port(), free_port()
    events, replay = f"ipc://{root}/events", f"ipc://{root}/replay"
    with RedisServer() as store:
        environment = {
            "PATH": f"{PYTHON.parent}:{os.environ['PATH']}", "REDIS": f"redis://127.0.0.1:{store.port}/0",
            "PREFILL_PORT": str(prefill), "DECODE_PORT": str(decode), "KV_EVENTS": events, "KV_REPLAY": replay,
            "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
            "VLLM_HOST_IP": "127.0.0.1",
        }  # fmt: skip
        command = ["bash", str(EXAMPLES / "disaggregated.sh"), str(root / "model"), *OPTIONS]
        with Server(command, root / "log", decode, environment) as server:
            server.wait_until_up(START_SECONDS)
            Server(command, root / "log", prefill, process=server.process).wait_until_up(START_SECONDS)
            yield Pair(prefill, decode, events, replay, server, store)


def test_prefill_here_decode_there_and_a_router_that_knows(pair: Pair, tmp_path: Path) -> None:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("the indexer listens on every address: it needs a network namespace")
    with Indexer(tmp_path) as indexer:
        indexer.register(1, pair.events, pair.replay, PAGE)
        first, cached = pair.ask(pair.prefill, PROMPT, 1)
        assert cached == 0
        until = time.monotonic() + SECONDS
        # vLLM publishes with its steps: what became durable after the last one is said with the next.
        while indexer.held().get("external") is None or len(indexer.held()["external"]) < TOKENS // PAGE:
            assert time.monotonic() < until, indexer.held()
            pair.ask(pair.prefill, PROMPT[:3], 1)
        held = indexer.held()
        assert held["external"] == held["device"], "the store's blocks have the device's names and parents"
        assert indexer.query(PROMPT) == (TOKENS, TOKENS, TOKENS)
        assert indexer.query(PROMPT[1:]) == (0, 0, 0)
    tokens, cached = pair.ask(pair.decode, PROMPT, 16)
    assert cached == TOKENS, "the decode engine computed what the store had"
    assert tokens[:1] == first
    assert pair.ask(pair.prefill, PROMPT, 16)[0] == tokens, "as the engine that computed the prefix itself"


def test_what_waits_to_be_saved_goes_when_the_last_request_is_gone(pair: Pair) -> None:
    """Decoded pages wait for more of them. Nobody asks anything after this request, which nobody saw to its end."""
    prompt = random.Random(9).choices(range(3, 1024), k=100)
    with pair.store.client() as store:
        before = store.dbsize()
        seen = pair.leave(pair.prefill, prompt, 70)
        pages, until = (len(prompt) + len(seen) - 1) // PAGE, time.monotonic() + SECONDS
        assert pages >= 5, "three of the prompt, and two that were decoded"
        while store.dbsize() < before + pages:
            assert time.monotonic() < until, (before, pages, store.dbsize())
            time.sleep(0.1)
    talk = prompt + seen
    assert pair.ask(pair.decode, talk[: pages * PAGE + 1], 1)[1] == pages * PAGE


def test_lines_of_ours_are_in_vllms_log(pair: Pair) -> None:
    log = pair.server.log.read_text()
    assert log.count("hicache_ext: tiers ['redis'], pages of 32 tokens") == 2, "one of each engine's worker"
