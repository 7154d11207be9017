"""The real SGLang server on the CPU, with our backend, through faults, kills and updates.

Three starts, since each takes a minute: with the plugin; with the plugin after a SIGKILL, the adapter failing on
purpose; without the plugin after another. The tests of a class run in order and use the one server.
Outputs are compared token by token, in float32, with those of a cold run and of a device hit.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from hicache_ext.cli import tiny_model
from hicache_ext.cli.demo import Backend, Settings, _environment, launch_line
from hicache_ext.cli.serving import Server, free_port
from storage_backends.format import BLOCK, ExtentHeader
from tests.e2e.router import Router, namespaces

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("sglang") is None, reason="needs the SGLang CPU environment (make venv)"),
]

VOCABULARY = 32000  # SGLang's own checks draw token ids up to 30,000
PAGE = 16
NEW_TOKENS = 12
ADMIN = "test-admin-key"
SHIM = "hicache_ext_sglang_cpu"


class Place:
    """The folder of one course of servers: model, tier, logs, fault plans."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tier = root / "tier"
        self.faults = root / "faults.json"
        self.faults.write_text("{}")
        self.model = tiny_model.make(root / "model", VOCABULARY)
        self.other_model = tiny_model.make(root / "other", VOCABULARY, seed=1)
        self.truth: dict[str, list[int]] = {}
        self.namespace = b""  # of the first weights' pages

    def set_faults(self, **rules: Any) -> None:
        self.faults.write_text(json.dumps(rules))
        os.utime(self.faults, ns=(time.time_ns(), time.time_ns()))

    def fired(self) -> int:
        from storage_backends.local.inject import fired_counts

        return sum(fired_counts(self.faults).values())

    def server(
        self, name: str, environment: dict[str, str], backend: str = "hicache_ext", router: Router | None = None,
        **config: Any,
    ) -> Server:  # fmt: skip
        values = {
            "prefetch_threshold": PAGE,
            "tiers": [{"type": "local", "path": str(self.tier), "capacity": "2GiB"}],
            **config,
        }
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        port = free_port()
        settings = Settings(self.root, Backend.HICACHE_EXT, [], ("--admin-api-key", ADMIN))
        if router is not None:
            settings = replace(settings, flags=(*settings.flags, "--kv-events-config", router.config))
        env = {**_environment(settings), "HICACHE_EXT_FAULTS": str(self.faults), **environment}
        line = launch_line(settings, self.model, path, port)
        line[line.index("--hicache-storage-backend") + 1] = backend
        return Server(line, self.root / f"{name}.log", port, env)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("server"))


def prompt(name: str, tokens: int) -> list[int]:
    draw = random.Random(name)
    return [draw.randrange(300, VOCABULARY) for _ in range(tokens)]


PROMPTS = {f"p{n}": prompt(f"p{n}", n) for n in (200, 600, 1500, 2900)}


class Client:
    """Requests to one server; `ask` gives output ids and the cached tokens by tier."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.base = f"http://127.0.0.1:{server.port}"

    def ask(self, ids: list[int], **fields: Any) -> tuple[list[int], dict[str, int]]:
        body = {
            "input_ids": ids,
            "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
            **fields,
        }
        answer = requests.post(f"{self.base}/generate", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        meta = answer.json()["meta_info"]
        details = meta.get("cached_tokens_details") or {}
        return answer.json()["output_ids"], {t: details.get(t, 0) or 0 for t in ("device", "host", "storage")}

    def flush(self) -> None:
        """Empty device and host memory: only the tier is left. Refused while storage work is pending, so repeat."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if self.admin("POST", "/flush_cache").status_code == 200:
                return
            time.sleep(0.2)
        raise AssertionError("the cache could not be flushed")

    def settle(self) -> None:
        """Wait until the backups of what was asked so far are over."""
        last, since = -1.0, time.monotonic()
        while time.monotonic() - since < 1.0:
            now = self.server.metric("sglang:backuped_tokens_total")
            if now != last:
                last, since = now, time.monotonic()
            time.sleep(0.1)

    def admin(self, method: str, path: str, **body: Any) -> Any:
        headers = {"Authorization": f"Bearer {ADMIN}"}
        return requests.request(method, f"{self.base}{path}", json=body or None, headers=headers, timeout=60)

    def log(self) -> str:
        return self.server.log.read_text(errors="replace")


def check_outputs(client: Client, place: Place) -> dict[str, int]:
    """Ask every prompt with empty memory; outputs must be the cold run's. Cached tokens by tier, summed."""
    client.flush()
    total = {"device": 0, "host": 0, "storage": 0}
    for name, ids in PROMPTS.items():
        output, cached = client.ask(ids)
        assert output == place.truth[name], f"{name}: the output differs (cached: {cached})"
        for tier, count in cached.items():
            total[tier] += count
    return total


def serve(server: Server) -> Iterator[Client]:
    with server:
        server.wait_until_up(600)
        yield Client(server)


@pytest.fixture(scope="class")
def router() -> Iterator[Router]:
    """Listens to the server of this class."""
    found = Router()
    yield found
    found.close()


@pytest.fixture(scope="class")
def with_plugin(place: Place, router: Router) -> Iterator[Client]:
    yield from serve(place.server("plugin", {}, router=router))


class TestWithPlugin:
    def test_local_hits_equal_device_hits_and_the_cold_run(self, with_plugin: Client, place: Place) -> None:
        for name, ids in PROMPTS.items():
            cold, cached = with_plugin.ask(ids)
            assert not any(cached.values())
            place.truth[name] = cold
            again, on_device = with_plugin.ask(ids)
            assert on_device["device"] > 0
            assert again == cold
            with_plugin.settle()
            with_plugin.flush()
            loaded, from_tier = with_plugin.ask(ids)
            assert from_tier["storage"] == on_device["device"], "the same prefix length"
            assert loaded == again

    def test_two_salts_never_meet(self, with_plugin: Client) -> None:
        ids = prompt("salted", 640)
        for salt in ("tenant-a", "tenant-b"):
            _, cached = with_plugin.ask(ids, cache_salt=salt)
            assert not any(cached.values()), "another tenant's pages were served"
            with_plugin.settle()
            with_plugin.flush()
        _, cached = with_plugin.ask(ids, cache_salt="tenant-a")
        assert cached["storage"] > 0
        _, cached = with_plugin.ask(ids)
        assert not any(cached.values()), "a salted page was served without its salt"

    def test_a_router_sees_what_the_tier_holds(self, with_plugin: Client, place: Place, router: Router) -> None:
        (place.namespace,) = namespaces(place.tier)
        with_plugin.settle()
        view = router.becomes_what_is_on(place.tier, place.namespace)
        assert {salt for _, _, salt in view.values()} == {None, "tenant-a", "tenant-b"}
        assert len(view) > sum(map(len, PROMPTS.values())) // PAGE
        assert view.keys() <= router.seen.keys(), "every block was on the device first"
        clears = router.clears
        with_plugin.flush()
        with_plugin.ask(prompt("after a flush", 100))
        with_plugin.settle()
        assert view.keys() < router.becomes_what_is_on(place.tier, place.namespace).keys()
        assert router.clears > clears, "a flush wipes every tier of the rank: all was said again"

    def test_sglangs_own_checks(self, with_plugin: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        import unittest

        from sglang.test.kits import unified_radix_cache_kit as kit

        base, post = with_plugin.base, requests.post

        def post_as_admin(url: str, **arguments: Any) -> Any:
            return post(url, **{"headers": {"Authorization": f"Bearer {ADMIN}"}, **arguments})

        monkeypatch.setattr(requests, "post", post_as_admin)

        class Checks(kit.AccuracyTwoPassMixin, kit.UnifiedRadixTreeTestMixin, unittest.TestCase):
            base_url = base
            model = "tiny"
            l3_prefetch_page_size = PAGE
            l3_prefetch_prompt_pages = 64
            input_ids = tuple(prompt(f"kit{i}", 512) for i in range(4))
            max_new_tokens = 16

        names = ["test_l3_prefetch_full_prefix_hit_after_flush", "test_multiturn_logprobs_match"]
        result = unittest.TestResult()
        unittest.TestSuite([Checks(name) for name in names]).run(result)
        assert result.testsRun == 2
        assert result.errors == []
        assert result.failures == []

    def test_damaged_pages_are_recomputed_and_healed(self, with_plugin: Client, place: Place) -> None:
        with_plugin.settle()
        for extent in place.tier.rglob("*.ext"):
            with extent.open("r+b") as file:
                header = ExtentHeader.decode(file.read(BLOCK))
                for slot in range(header.slots):
                    file.seek(header.slot_offset(slot) + header.slot_bytes // 2)
                    file.write(os.urandom(64))
        assert check_outputs(with_plugin, place)["storage"] == 0, "a damaged page was served"
        with_plugin.settle()
        assert check_outputs(with_plugin, place)["storage"] > 3000, "the next write heals"
        assert with_plugin.log().count("failed verification") == 1, "said once"

    def test_quarantined_pages_are_withdrawn(self, with_plugin: Client, place: Place, router: Router) -> None:
        with_plugin.settle()
        router.becomes_what_is_on(place.tier, place.namespace)

    def test_failing_and_slow_devices(self, with_plugin: Client, place: Place) -> None:
        rules = [
            {"fault": "errno", "errno": "EIO", "probability": 0.2},
            {"fault": "delay", "seconds": [0, 0.05], "probability": 0.5},
        ]
        place.set_faults(read=rules, write=rules)
        for turn in range(2):
            with_plugin.ask(prompt(f"fresh{turn}", 800))
            check_outputs(with_plugin, place)
        assert place.fired() > 10
        place.set_faults(write=[{"fault": "errno", "errno": "ENOSPC"}])
        with_plugin.ask(prompt("no space", 800))
        check_outputs(with_plugin, place)
        place.set_faults()
        deadline = time.monotonic() + 90
        while check_outputs(with_plugin, place)["storage"] < 3000 and time.monotonic() < deadline:
            with_plugin.settle()
        assert check_outputs(with_plugin, place)["storage"] > 3000, "the tier came back by itself"

    def test_detach_and_attach_at_run_time(self, with_plugin: Client, place: Place, router: Router) -> None:
        with_plugin.flush()
        answer = with_plugin.admin("DELETE", "/hicache/storage-backend")
        assert answer.status_code == 200, answer.text
        until = time.monotonic() + 30
        while router.disk() and time.monotonic() < until:
            time.sleep(0.1)
        assert not router.disk(), "a tier that is detached holds nothing"
        assert check_outputs(with_plugin, place)["storage"] == 0
        config = {"prefetch_threshold": PAGE, "tiers": [{"type": "local", "path": str(place.tier), "capacity": "2GiB"}]}
        with_plugin.flush()
        answer = with_plugin.admin(
            "PUT",
            "/hicache/storage-backend",
            hicache_storage_backend="hicache_ext",
            hicache_storage_backend_extra_config_json=json.dumps(config),
            hicache_storage_prefetch_policy="wait_complete",
        )
        assert answer.status_code == 200, answer.text
        assert check_outputs(with_plugin, place)["storage"] > 3000
        with_plugin.settle()
        router.becomes_what_is_on(place.tier, place.namespace)

    def test_weights_that_change_never_meet_older_pages(
        self, with_plugin: Client, place: Place, router: Router
    ) -> None:
        def update(model: Path) -> None:
            with_plugin.settle()
            with_plugin.flush()  # SGLang asserts that it can flush after an update: nothing may be on its way
            answer = with_plugin.admin("POST", "/update_weights_from_disk", model_path=str(model))
            assert answer.json()["success"], answer.text

        ids = PROMPTS["p1500"]
        with_plugin.settle()
        update(place.other_model)
        other, cached = with_plugin.ask(ids)
        assert not any(cached.values()), "a page of the old weights was served"
        assert other != place.truth["p1500"]
        with_plugin.settle()
        with_plugin.flush()
        again, cached = with_plugin.ask(ids)
        assert cached["storage"] > 0
        assert again == other
        with_plugin.settle()
        (theirs,) = namespaces(place.tier) - {place.namespace}
        assert len(router.becomes_what_is_on(place.tier, theirs)) >= len(ids) // PAGE
        update(place.model)
        assert check_outputs(with_plugin, place)["storage"] > 3000, "the first weights' pages are found again"
        with_plugin.settle()
        router.becomes_what_is_on(place.tier, place.namespace)

    def test_kill_while_writing(self, with_plugin: Client) -> None:
        kill_while_writing(with_plugin, "first")


def kill_while_writing(client: Client, name: str) -> None:
    """SIGKILL to all of the server's processes while new pages are on their way to the tier."""
    assert client.server.process is not None
    before = client.server.metric("sglang:backuped_tokens_total")

    def keep_asking() -> None:
        for turn in range(50):
            try:
                client.ask(prompt(f"{name} kill {turn}", 2000))
            except requests.RequestException:
                return

    asking = threading.Thread(target=keep_asking, daemon=True)
    asking.start()
    deadline = time.monotonic() + 60
    while client.server.metric("sglang:backuped_tokens_total") <= before + 1000 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(client.server.process.pid, signal.SIGKILL)
    asking.join(30)


@pytest.fixture(scope="class")
def failing(place: Place, router: Router) -> Iterator[Client]:
    place.set_faults()
    plan = place.root / "adapter-faults.json"
    plan.write_text(json.dumps({"failure": 0.2, "delay_ms": 50, "seed": 1}))
    yield from serve(place.server("failing", {"HICACHE_EXT_ADAPTER_FAULTS": f"@{plan}"}, router=router))


class TestAfterAKillWithAFailingAdapter:
    def test_what_the_tier_holds_from_before_is_announced(self, failing: Client, place: Place, router: Router) -> None:
        assert failing.server.process is not None
        view = router.becomes_what_is_on(place.tier, place.namespace)
        assert len(view) > sum(map(len, PROMPTS.values())) // PAGE
        assert not router.seen, "nothing was on the device yet"

    def test_outputs_stay_right(self, failing: Client, place: Place) -> None:
        from hicache_ext.store.inject import injected_counts

        served = 0
        for _ in range(3):
            served += check_outputs(failing, place)["storage"]
            failing.ask(prompt(f"new {served}", 700))
        assert served > 0, "what was written before the kill is found"
        counts = injected_counts(place.root / "adapter-faults.json")
        assert counts["lookup_failed"] + counts["read_failed"] > 0
        assert sum(count for name, count in counts.items() if name.endswith("_delayed")) > 5

    def test_without_the_faults_everything_is_there(self, failing: Client, place: Place) -> None:
        (place.root / "adapter-faults.json").write_text("{}")
        failing.settle()
        check_outputs(failing, place)
        failing.settle()
        assert check_outputs(failing, place)["storage"] > 3000

    def test_kill_while_writing(self, failing: Client) -> None:
        kill_while_writing(failing, "second")


@pytest.fixture(scope="class")
def without_plugin(place: Place) -> Iterator[Client]:
    yield from serve(
        place.server(
            "without-plugin",
            {"SGLANG_PLUGINS": SHIM},
            backend="dynamic",
            backend_name="hicache_ext",
            module_path="hicache_ext.sglang.backend",
            class_name="HiCacheExtStorage",
            interface_v1=1,
        )
    )


class TestAfterAKillWithoutPlugin:
    def test_the_stock_route_serves_the_same_pages(self, without_plugin: Client, place: Place) -> None:
        assert check_outputs(without_plugin, place)["storage"] > 3000
        assert without_plugin.log().count("runs without its plugin") == 1

    def test_the_directory_removed_under_the_server(self, without_plugin: Client, place: Place) -> None:
        without_plugin.settle()
        shutil.rmtree(place.tier)
        for turn in range(3):
            check_outputs(without_plugin, place)
            without_plugin.ask(prompt(f"gone {turn}", 700))
        assert "the directory is gone" in without_plugin.log()

    def test_a_weight_update_detaches_with_one_line(self, without_plugin: Client, place: Place) -> None:
        without_plugin.settle()
        without_plugin.flush()  # SGLang asserts that it can flush after an update: nothing may be on its way
        answer = without_plugin.admin("POST", "/update_weights_from_disk", model_path=str(place.other_model))
        assert answer.json()["success"], answer.text
        output, cached = without_plugin.ask(PROMPTS["p1500"])
        assert cached["storage"] == 0
        assert output != place.truth["p1500"]
        without_plugin.settle()
        without_plugin.flush()
        again, cached = without_plugin.ask(PROMPTS["p1500"])
        assert cached["storage"] == 0
        assert again == output
        assert without_plugin.log().count("the tiers are detached until SGLang restarts") == 1


def test_these_tests_run_in_the_right_environment() -> None:
    assert sys.prefix != sys.base_prefix, "the server is started with this interpreter"
