"""What a Redis server evicts by itself is told to whoever hears of pages, though nobody asks for it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from storage_backends.base import Dispatcher, Notes, Outcome, Residency
from tests import pages
from tests.pages import HostPool, chain, namespace
from tests.redis_server import RedisServer

pytest.importorskip("redis")

from storage_backends.redis import RedisBackend

SPACE = namespace((65536, 65536))
KEYS = chain("mine", 32)


class Heard:
    """A listener: how often each page was stored, less how often it was removed."""

    def __init__(self, backend: RedisBackend) -> None:
        self.counts: Counter[bytes] = Counter()
        self._backend = backend
        backend.on_residency(self._hear)

    def _hear(self, change: Residency, _: bytes, packed: bytes, __: Notes | None) -> None:
        for at in range(0, len(packed), 32):
            self.counts[packed[at : at + 32]] += 1 if change is Residency.STORED else -1

    def there(self) -> set[bytes]:
        heard = threading.Event()
        self._backend.dispatcher.post(heard.set)
        assert heard.wait(10)
        return {key for key, count in self.counts.items() if count}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as all_of_it:
        yield all_of_it


def opened(stack: ExitStack, server: RedisServer, **options: object) -> RedisBackend:
    dispatcher = Dispatcher()
    stack.callback(dispatcher.close)
    values = {"url": f"redis://127.0.0.1:{server.port}", **options}
    backend = RedisBackend(RedisBackend.Options.model_validate(values), dispatcher)
    stack.callback(backend.close)
    backend._presence._seconds = 0.2  # so long nothing is asked for again that was just seen
    return backend


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def store(backend: RedisBackend, keys: list[bytes]) -> None:
    assert set(backend.write(HostPool(SPACE, len(keys)).write_batch(keys)).result(60)) == {Outcome.HIT}


def test_what_is_gone_is_told_once_and_nothing_else_is(stack: ExitStack) -> None:
    server = stack.enter_context(RedisServer("--maxmemory", "16mb", "--maxmemory-policy", "allkeys-lru"))
    backend, client = opened(stack, server, recheck=40), server.client()
    heard = Heard(backend)
    store(backend, KEYS)
    names = {name: bytes.fromhex(name.rpartition(b":")[2].decode()) for name in client.scan_iter()}
    assert heard.there() == set(KEYS) == set(names.values())
    client.unlink(*[name for name, key in names.items() if key in KEYS[:5]])
    until(lambda: heard.there() == set(KEYS[5:]))
    for turn in range(10**4):  # somebody else's pages push ours out
        client.set(f"other:{turn}", b"x" * 131072)
        if client.info("stats")["evicted_keys"] > 8:
            break
    until(lambda: heard.there() == {key for name, key in names.items() if client.exists(name)})
    assert backend.stats()["evicted"] == len(KEYS) - len(heard.there())
    store(backend, KEYS[:5])
    assert set(heard.counts.values()) == {0, 1}, "each change once"
    assert pages.served(backend, SPACE, KEYS[:5]) == [Outcome.HIT] * 5


def test_nothing_is_told_of_a_server_that_does_not_answer(stack: ExitStack) -> None:
    server = stack.enter_context(RedisServer())
    backend = opened(stack, server, recheck=40, timeout=1)
    heard = Heard(backend)
    store(backend, KEYS)
    server.kill()
    until(lambda: backend.stats()["state"] != "ok")
    assert heard.there() == set(KEYS)
    server.start()
    until(lambda: not heard.there())
    assert backend.stats()["evicted"] == len(KEYS), "it came back empty"


def test_a_user_who_may_not_ask_is_told_once(stack: ExitStack, caplog: pytest.LogCaptureFixture) -> None:
    server = stack.enter_context(RedisServer())
    rights = ["+get", "+set", "+strlen", "+hello", "+select", "+client"]
    server.client().execute_command("ACL", "SETUSER", "plain", "on", ">s3cret", "~hicache:*", *rights)
    file = server.folder / "password"
    file.write_text("s3cret")
    backend = opened(stack, server, recheck=40, username="plain", password_file=file)
    heard = Heard(backend)
    store(backend, KEYS)
    until(lambda: "go unnoticed" in caplog.text)
    assert backend._recheck is not None
    assert backend._recheck._closing.is_set()
    assert heard.there() == set(KEYS)
    assert pages.served(backend, SPACE, KEYS) == [Outcome.HIT] * len(KEYS)


def test_it_can_be_switched_off_and_is_not_done_for_nobody(stack: ExitStack) -> None:
    server = stack.enter_context(RedisServer())
    off, unheard = opened(stack, server, recheck=0), opened(stack, server)
    Heard(off)
    assert off._recheck is unheard._recheck is None
