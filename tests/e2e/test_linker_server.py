"""The real SGLang 0.5.23 server on the CPU with our external linker: device pools and a local tier, no host pool.

Two starts: with the linker; then, after a SIGKILL, with the hierarchical cache on the same directory. Outputs are held
token by token, in float32, against those of a cold run and of a device hit. What it shows is SGLang's own scheduler and
forward over the linker; copies on a GPU are tests/gpu/test_linker.py.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from hicache_ext.cli import cpu_server, tiny_model
from hicache_ext.cli.serving import Server, free_port
from storage_backends.format import BLOCK, ExtentHeader

VERSION = "0.5.23"
UNPACKED = (
    Path(os.environ.get("HICACHE_EXT_SGLANG_DIR", Path(__file__).parents[2] / "build" / "sglang")).resolve() / VERSION
)
NEW_TOKENS = 12
VOCABULARY = 32000

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("sglang") is None, reason="needs the SGLang CPU environment (make venv)"),
]


def prompt(tokens: int) -> list[int]:
    draw = random.Random(tokens)
    return [draw.randrange(300, VOCABULARY) for _ in range(tokens)]


PROMPTS = [prompt(tokens) for tokens in (200, 620, 1500)]


class Place:
    """Model, tier and logs of both servers."""

    def __init__(self, root: Path) -> None:
        self.root, self.tier = root, root / "tier"
        self.model = tiny_model.make(root / "model", VOCABULARY)
        self.other_model = tiny_model.make(root / "other", VOCABULARY, seed=1)
        self.config = root / "hicache.yaml"
        tier = {"type": "local", "path": str(self.tier), "capacity": "1GiB"}
        self.config.write_text(yaml.safe_dump({"tiers": [tier], "prefetch_threshold": cpu_server.PAGE_SIZE}))
        self.truth: list[list[int]] = []

    def server(self, name: str, *flags: str) -> Server:
        port = free_port()
        command = [
            *(sys.executable, "-m", "sglang.launch_server", *cpu_server.flags(self.model)),
            *("--host", "127.0.0.1", "--port", str(port), "--skip-server-warmup", *flags),
        ]
        environment = {**cpu_server.environment(), "PYTHONPATH": str(UNPACKED)}
        return Server(command, self.root / f"{name}.log", port, environment)

    def damage(self) -> None:
        for extent in self.tier.rglob("*.ext"):
            with extent.open("r+b") as file:
                header = ExtentHeader.decode(file.read(BLOCK))
                for slot in range(header.slots):
                    file.seek(header.slot_offset(slot) + header.slot_bytes // 2)
                    file.write(os.urandom(64))


class Client:
    def __init__(self, server: Server) -> None:
        self.server, self.base = server, f"http://127.0.0.1:{server.port}"

    def answer(self, ids: list[int], **more: Any) -> requests.Response:
        sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        body = {"input_ids": ids, "sampling_params": sampling, **more}
        return requests.post(f"{self.base}/generate", json=body, timeout=120)

    def ask(self, ids: list[int], **more: Any) -> tuple[list[int], dict[str, int]]:
        """Output ids, and cached tokens by tier. What the linker loaded SGLang counts as `host`."""
        answer = self.answer(ids, **more)
        assert answer.status_code == 200, answer.text
        details = answer.json()["meta_info"].get("cached_tokens_details") or {}
        return answer.json()["output_ids"], {tier: details.get(tier) or 0 for tier in ("device", "host", "storage")}

    def post(self, path: str, **body: Any) -> requests.Response:
        return requests.post(f"{self.base}{path}", json=body or None, timeout=120)

    def flush(self) -> None:
        until = time.monotonic() + 60
        while self.post("/flush_cache").status_code != 200:
            assert time.monotonic() < until, "the cache could not be flushed"
            time.sleep(0.2)

    def loads(self, ids: list[int], tokens: int, **more: Any) -> list[int]:
        """Flush and ask until so many tokens come from the tier: the offload before may still be on its way."""
        until = time.monotonic() + 60
        while True:
            self.flush()
            output, cached = self.ask(ids, **more)
            assert cached["device"] == 0
            if cached["host"] == tokens:
                return output
            assert time.monotonic() < until, f"{cached} of {tokens} tokens were loaded"
            time.sleep(0.5)

    def log(self) -> str:
        return self.server.log.read_text(errors="replace")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    if not (UNPACKED / "sglang").is_dir():
        missing = f"no unpacked SGLang {VERSION} in {UNPACKED.parent} (make sglang-wheels)"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    return Place(tmp_path_factory.mktemp("linker"))


@pytest.fixture(scope="module")
def linker(place: Place) -> Iterator[Client]:
    config = {
        "linker": "HiCacheExtLinker",
        "linker_module_path": "hicache_ext.sglang.linker",
        "linker_extra_config": {"config": str(place.config), "staging_bytes": "64MiB"},
    }
    server = place.server(
        "linker", "--enable-unified-cache-external-linker", "--unified-cache-external-linker-backend", "dynamic",
        "--unified-cache-external-linker-config", json.dumps(config),
    )  # fmt: skip
    with server:
        server.wait_until_up(600)
        yield Client(server)


def test_what_is_loaded_equals_a_device_hit_and_the_cold_run(linker: Client, place: Place) -> None:
    for ids in PROMPTS:
        cold, cached = linker.ask(ids)
        assert not any(cached.values())
        again, on_device = linker.ask(ids)
        assert on_device["device"] == (len(ids) - 1) // cpu_server.PAGE_SIZE * cpu_server.PAGE_SIZE
        assert again == cold
        assert linker.loads(ids, on_device["device"]) == cold
        place.truth.append(cold)
    assert linker.log().count("memory copies, pools {'kv': 'page_first_direct") == 1


def test_two_salts_never_meet(linker: Client) -> None:
    ids = prompt(400)
    for salt in ("tenant-a", "tenant-b"):
        assert not any(linker.ask(ids, cache_salt=salt)[1].values()), "another tenant's pages were served"
        linker.loads(ids, 384, cache_salt=salt)
    assert not any(linker.ask(ids)[1].values())


def test_damaged_pages_cost_a_request_and_no_wrong_token(linker: Client, place: Place) -> None:
    """SGLang aborts the requests of a load that fails; the pages are out of the way for the next."""
    linker.flush()
    place.damage()
    for ids, truth in zip(PROMPTS, place.truth, strict=True):
        refused = linker.answer(ids)
        assert refused.status_code == 503, refused.text
        assert "External KV cache load failed" in refused.text
        output, cached = linker.ask(ids)
        assert (output, cached["host"]) == (truth, 0), "a damaged page was served"
    assert linker.loads(PROMPTS[1], 608) == place.truth[1], "the next write heals"
    assert linker.log().count("a load failed, SGLang aborts its requests") == len(PROMPTS)


def test_weight_updates_change_the_namespace(linker: Client, place: Place) -> None:
    ids, truth = PROMPTS[0], place.truth[0]
    linker.ask(ids)
    assert linker.loads(ids, 192) == truth
    for model, known in ((place.other_model, False), (place.model, True)):
        answer = linker.post("/update_weights_from_disk", model_path=str(model), flush_cache=True)
        assert answer.json()["success"], answer.text
        output, cached = linker.ask(ids)
        assert cached["host"] == (192 if known else 0), "pages of other weights"
        assert (output == truth) is known
        if not known:
            assert linker.loads(ids, 192) == output


def test_after_a_kill_the_hierarchical_cache_serves_the_same_directory(linker: Client, place: Place) -> None:
    linker.ask(PROMPTS[2])
    linker.loads(PROMPTS[2], 1488)
    linker.server.stop(patience_s=0, grace_s=0)
    server = place.server(
        "host", "--enable-hierarchical-cache", "--hicache-storage-backend", "hicache_ext",
        "--hicache-storage-prefetch-policy", "wait_complete",
        "--hicache-storage-backend-extra-config", f"@{place.config}",
    )  # fmt: skip
    with server:
        server.wait_until_up(600)
        client = Client(server)
        for ids, truth in zip(PROMPTS, place.truth, strict=True):
            output, cached = client.ask(ids)
            assert output == truth
            assert cached["storage"] == (len(ids) - 1) // cpu_server.PAGE_SIZE * cpu_server.PAGE_SIZE, cached
