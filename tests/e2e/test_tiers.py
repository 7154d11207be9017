"""The real SGLang server on the CPU over every tier that runs here, one start: only the configuration file changes.

Tiers are detached and attached through SGLang's admin route. With one tier attached, what SGLang counts as loaded from
storage can have come from nowhere else; of a cascade, the other tiers are empty or dead then. Outputs are compared
token by token with those of the cold run.

All of it runs on a host of its own, where that can be had: Mooncake's client listens on every interface of its host.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import pytest
import requests
import yaml

from hicache_ext.cli.serving import free_port
from storage_backends import registry
from tests.e2e.test_server import PAGE, Client, Place, prompt, serve
from tests.mooncake_server import MooncakeServer, installed
from tests.netns import Host, Network
from tests.redis_server import RedisServer
from tests.s3_server import CREDENTIALS, S3Server

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("sglang") is None, reason="needs the SGLang CPU environment (make venv)"),
]

PROMPTS = {f"p{n}": prompt(f"tiers {n}", n) for n in (200, 700, 1500)}
#: What can come from storage: whole pages, and at least one token is computed.
WHOLE = sum((len(ids) - 1) // PAGE * PAGE for ids in PROMPTS.values())

Tiers = list[dict[str, Any]]


class Stage:
    """The servers behind the tiers, started when a tier needs them; one SGLang server and what it should say.

    host: on which all of that runs; None: on the machine itself.
    """

    def __init__(self, place: Place, stack: ExitStack, host: Host | None) -> None:
        self.place, self._stack, self._host = place, stack, host
        self.redis = stack.enter_context(RedisServer())
        self.truth: dict[str, list[int]] = {}
        self._folders = 0

    def folder(self) -> str:
        """A new one."""
        self._folders += 1
        path = self.place.root / f"tier{self._folders}"
        path.mkdir()
        return str(path)

    def redis_tier(self, **options: Any) -> dict[str, Any]:
        return {"type": "redis", "url": f"redis://127.0.0.1:{self.redis.port}", "timeout": 2, **options}

    @cached_property
    def _s3(self) -> S3Server:
        server = S3Server()
        self._stack.callback(server.kill)
        return server

    def s3_tier(self) -> dict[str, Any]:
        endpoint = f"http://127.0.0.1:{self._s3.port}"
        return {"type": "s3", "bucket": self._s3.bucket(), "endpoint": endpoint, "allow_http": True}

    @cached_property
    def _mooncake(self) -> MooncakeServer:
        if self._host is None:
            pytest.skip("Mooncake needs a network namespace")
        installed()
        return MooncakeServer(self._host, 256 << 20, lease_ms=30_000)

    def mooncake_tier(self, **options: Any) -> dict[str, Any]:
        return {"type": "mooncake", **self._mooncake.options(**options)}

    def first_tier(self) -> dict[str, Any]:
        """Of the server when it starts: where Mooncake runs, it has the host pool placed so that a tier shares it."""
        if self._host is None or find_spec("mooncake") is None:
            return self.redis_tier(prefix="start")
        return self.mooncake_tier(prefix="start", direct=True)

    def local_tier(self) -> dict[str, Any]:
        return {"type": "local", "path": self.folder(), "capacity": "256MiB"}


@dataclass(frozen=True)
class Setup:
    """A configuration file's tiers. kept: its pages outlive a detach."""

    name: str
    tiers: Callable[[Stage], Tiers]
    kept: bool = True


SETUPS = [
    Setup("redis", lambda stage: [stage.redis_tier(prefix="first")]),
    Setup("s3", lambda stage: [stage.s3_tier()]),
    Setup("local", lambda stage: [stage.local_tier()]),
    Setup("memory", lambda _: [{"type": "memory", "capacity": "256MiB"}], kept=False),
    Setup("shared_fs", lambda stage: [{"type": "shared_fs", "path": stage.folder()}]),
    Setup("nixl", lambda stage: [{"type": "nixl", "path": stage.folder(), "capacity": "256MiB"}]),
    Setup("mooncake", lambda stage: [stage.mooncake_tier(prefix="first", direct=True)]),
    Setup("nvme-redis", lambda stage: [stage.local_tier(), stage.redis_tier(prefix="second")]),
    Setup("nvme-s3", lambda stage: [stage.local_tier(), stage.s3_tier()]),
    Setup("nvme-mooncake", lambda stage: [stage.local_tier(), stage.mooncake_tier(prefix="second")]),
]


def own_host(stack: ExitStack) -> Host | None:
    """A host that this thread is on from now on, and everything that it starts."""
    try:
        host = stack.enter_context(Network(1)).hosts[0]
    except pytest.skip.Exception:
        return None
    stack.enter_context(host.inside())
    return host


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(Place(tmp_path_factory.mktemp("tiers")), stack, own_host(stack))


@pytest.fixture(scope="module")
def client(stage: Stage) -> Iterator[Client]:
    server = stage.place.server("tiers", dict(CREDENTIALS), tiers=[stage.first_tier()])
    for client in serve(server):
        for name, ids in PROMPTS.items():
            stage.truth[name], cached = client.ask(ids)
            assert not any(cached.values())
        yield client


def attach(client: Client, stage: Stage, tiers: Tiers, status: int = 200) -> str:
    """What is attached goes, and these tiers come, from a file as the user writes it."""
    detach(client)
    file = stage.place.root / "config.yaml"
    file.write_text(yaml.safe_dump({"prefetch_threshold": PAGE, "tiers": tiers}))
    answer = client.admin(
        "PUT",
        "/hicache/storage-backend",
        hicache_storage_backend="hicache_ext",
        hicache_storage_backend_extra_config_json=json.dumps(yaml.safe_load(file.read_text())),
        hicache_storage_prefetch_policy="wait_complete",
    )
    assert answer.status_code == status, answer.text
    return str(answer.text)


def detach(client: Client) -> None:
    client.settle()
    client.flush()
    answer = client.admin("DELETE", "/hicache/storage-backend")
    assert answer.status_code == 200, answer.text


def loaded(client: Client, stage: Stage) -> int:
    """Ask every prompt with empty memory: outputs are the cold run's. Tokens that came from storage."""
    client.settle()
    client.flush()
    total = 0
    for name, ids in PROMPTS.items():
        output, cached = client.ask(ids)
        assert output == stage.truth[name], f"{name}: the output differs (cached: {cached})"
        total += cached["storage"]
    return total


def comes_back(client: Client, stage: Stage, seconds: float = 60) -> None:
    """All of it is stored and loaded again, without anybody's help."""
    deadline = time.monotonic() + seconds
    while (found := loaded(client, stage)) < WHOLE:
        assert time.monotonic() < deadline, f"only {found} of {WHOLE} tokens came back"


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_only_the_file_changes(client: Client, stage: Stage, setup: Setup) -> None:
    tiers = setup.tiers(stage)
    for tier in tiers:
        if tier["type"] not in registry.names():
            pytest.skip(f"there is no backend {tier['type']} here")
    attach(client, stage, tiers)
    assert loaded(client, stage) == 0, "a page of another tier"
    comes_back(client, stage)
    attach(client, stage, tiers)
    assert loaded(client, stage) == (WHOLE if setup.kept else 0), "found again after a swap"


def test_the_second_tier_serves_what_the_first_lacks_and_the_first_what_it_was_given(
    client: Client, stage: Stage
) -> None:
    attach(client, stage, [stage.redis_tier(prefix="shared")])
    comes_back(client, stage)
    attach(client, stage, [stage.local_tier(), stage.redis_tier(prefix="shared")])
    assert loaded(client, stage) == WHOLE, "from Redis: the folder is new"
    stage.redis.kill()
    comes_back(client, stage)
    stage.redis.start()
    assert stage.redis.client().dbsize() == 0
    assert loaded(client, stage) == WHOLE, "from the disk: Redis is empty"


def test_a_remote_that_dies_in_the_middle_and_comes_back_empty(client: Client, stage: Stage) -> None:
    attach(client, stage, [stage.redis_tier(prefix="dies")])
    comes_back(client, stage)
    stop = threading.Event()

    def keep_asking() -> None:
        draw = 0
        while not stop.is_set():
            try:
                client.ask(prompt(f"while it dies {draw}", 400))
            except requests.RequestException:
                return
            draw += 1

    asking = threading.Thread(target=keep_asking, daemon=True)
    asking.start()
    time.sleep(0.5)
    stage.redis.kill()
    for name, ids in PROMPTS.items():
        assert client.ask(ids)[0] == stage.truth[name]
    stop.set()
    asking.join(60)
    assert not asking.is_alive(), "a request hangs"
    assert loaded(client, stage) == 0
    stage.redis.start()
    comes_back(client, stage)


def test_other_data_under_our_keys(client: Client, stage: Stage) -> None:
    attach(client, stage, [stage.redis_tier(prefix="lies")])
    comes_back(client, stage)
    raw, draw = stage.redis.client(), random.Random(1)
    names = sorted(raw.scan_iter(match="lies:*", count=1000))
    values = [raw.get(name) for name in names]
    assert len(names) * PAGE >= WHOLE
    for name, value in zip(names, values, strict=True):
        at = draw.randrange(len(value))
        other = draw.choice([one for one in values if one != value])
        raw.set(name, draw.choice([other, value[:at], value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]]))
    assert loaded(client, stage) == 0, "a damaged page was served"
    comes_back(client, stage)


def test_a_tier_that_is_not_there_yet(client: Client, stage: Stage) -> None:
    port = free_port()
    attach(client, stage, [{"type": "redis", "url": f"redis://127.0.0.1:{port}", "timeout": 2}])
    assert loaded(client, stage) == 0
    with RedisServer(port=port):
        comes_back(client, stage)
    assert loaded(client, stage) == 0


def test_a_wrong_file_is_refused_and_a_right_one_is_taken(client: Client, stage: Stage) -> None:
    text = attach(client, stage, [{"type": "redis", "ulr": "redis://x"}], status=400)
    assert "tiers[0].ulr" in text
    assert loaded(client, stage) == 0
    attach(client, stage, [stage.redis_tier(prefix="right")])
    comes_back(client, stage)
