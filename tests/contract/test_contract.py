"""What every backend must do, whatever it is made of. A new backend joins by a line in `BACKENDS`; one that is not ours
is named on the command line (conftest.py)."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from storage_backends.base import (
    Backend,
    Completion,
    Dispatcher,
    Notes,
    OptionError,
    Outcome,
    PageBatch,
    Residency,
)
from storage_backends.buffers import OwnedMemory
from storage_backends.local import LocalBackend
from storage_backends.memory import MemoryBackend
from storage_backends.registry import backend_class
from storage_backends.shared_fs import SharedFsBackend
from tests import pages
from tests.devices import blank_device
from tests.dictionary import DictionaryBackend
from tests.dying import neighbours_that_die
from tests.fuse import fuse_disk
from tests.mooncake_server import MooncakeServer, mooncake_server
from tests.netns import Network
from tests.pages import HostPool, chain, key_batch, namespace
from tests.proxy import Proxy
from tests.redis_server import RedisServer

Opener = Callable[..., Backend]


def _dictionary(_: Path, __: ExitStack, dispatcher: Dispatcher, capacity: int = 64 << 20) -> Backend:
    return DictionaryBackend(DictionaryBackend.Options.model_validate({"capacity": capacity}), dispatcher)


def _memory(region: str) -> Callable[..., Backend]:
    def open_memory(path: Path, _: ExitStack, dispatcher: Dispatcher, capacity: int = 64 << 20) -> Backend:
        options = {"capacity": capacity, "region": region, "directory": path / "region"}
        return MemoryBackend(MemoryBackend.Options.model_validate(options), dispatcher)

    return open_memory


def _memory_in_trouble(path: Path, stack: ExitStack, dispatcher: Dispatcher, capacity: int = 64 << 20) -> Backend:
    """Other processes of the region are killed in the middle of what they do, one after the other."""
    capacity = max(capacity, 1 << 30)  # the dying leave extents behind: these must not cost what is asked for here
    backend = _memory("test")(path, stack, dispatcher, capacity)
    stack.enter_context(neighbours_that_die(path / "region", capacity))
    return backend


def _local(engine: str, disks: int = 1) -> Callable[..., Backend]:
    def open_local(path: Path, _: ExitStack, dispatcher: Dispatcher, capacity: int = 64 << 20) -> Backend:
        paths = [path / f"tier{disk}" for disk in range(disks)]
        options = {"path": paths[0] if disks == 1 else paths, "capacity": capacity, "engine": engine}
        try:
            return LocalBackend(LocalBackend.Options.model_validate(options), dispatcher)
        except OptionError as error:
            if error.key != "engine":
                raise
            pytest.skip(str(error))

    return open_local


def _device(path: Path, stack: ExitStack, dispatcher: Dispatcher, capacity: int = 64 << 20) -> Backend:
    raw = path / "disk.img"
    if not raw.exists():
        stack.enter_context(blank_device("file", raw, (80 << 20)))
    options = {"path": raw, "metadata": path / "metadata", "capacity": capacity, "engine": "threads"}
    return LocalBackend(LocalBackend.Options.model_validate(options), dispatcher)


def _redis(through: Callable[[int], Proxy] | None = None, **more: object) -> Callable[..., Backend]:
    def open_redis(path: Path, stack: ExitStack, dispatcher: Dispatcher, capacity: int = 64 << 20) -> Backend:
        from storage_backends.redis import RedisBackend

        if "seal_key_env" in more:
            pytest.importorskip("cryptography")
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("HICACHE_EXT_TEST_KEY", "0f" * 32)
        server = stack.enter_context(
            RedisServer("--maxmemory", str(capacity + (2 << 20)), "--maxmemory-policy", "allkeys-lru")
        )
        port = server.port if through is None else stack.enter_context(through(server.port)).port
        options = {"url": f"redis://127.0.0.1:{port}", **more}
        return RedisBackend(RedisBackend.Options.model_validate(options), dispatcher)

    return open_redis


def _s3(through: Callable[[int], Proxy] | None = None) -> Callable[..., Backend]:
    def open_s3(_: Path, stack: ExitStack, dispatcher: Dispatcher, capacity: int = 0) -> Backend:
        from tests.s3_server import CREDENTIALS, s3_server

        server = s3_server()
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        from storage_backends.s3 import S3Backend

        port = server.port if through is None else stack.enter_context(through(server.port)).port
        where = {"endpoint": f"http://127.0.0.1:{port}", "allow_http": True, "bucket": server.bucket()}
        return S3Backend(S3Backend.Options.model_validate({**where, "timeout": 60}), dispatcher)

    return open_s3


def _mooncake(direct: bool) -> Callable[..., Backend]:
    def open_mooncake(_: Path, stack: ExitStack, dispatcher: Dispatcher, capacity: int = 0) -> Backend:
        from storage_backends.mooncake import MooncakeBackend

        class Registering(MooncakeBackend):
            """Registers the memory of every batch when it comes first, as an engine does with its pools."""

            def read(self, batch: PageBatch) -> Completion:
                return super().read(self._registered_first(batch))

            def write(self, batch: PageBatch) -> Completion:
                return super().write(self._registered_first(batch))

            def _registered_first(self, batch: PageBatch) -> PageBatch:
                if batch.owner not in kept:
                    kept.append(batch.owner)
                    self.register_memory(batch.owner.address, batch.owner.size)
                return batch

        kept: list[object] = []
        if direct:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(pages, "OwnedMemory", partial(OwnedMemory, shared=True))
        if capacity:
            server = MooncakeServer(stack.enter_context(Network(1)).hosts[0], max(16 << 20, capacity))
        else:
            server = mooncake_server()
        stack.enter_context(server.host.inside())
        options = server.options(prefix=f"test-{uuid.uuid4().hex[:12]}", direct=direct)
        kind = Registering if direct else MooncakeBackend
        return kind(MooncakeBackend.Options.model_validate(options), dispatcher)

    return open_mooncake


def _shared_fs(faults: dict[str, object] | None = None, **more: object) -> Callable[..., Backend]:
    def open_share(path: Path, stack: ExitStack, dispatcher: Dispatcher, capacity: int = 64 << 20) -> Backend:
        if faults is not None:
            disk = stack.enter_context(fuse_disk(path))
            disk.plan.write_text(json.dumps(faults))
            path = disk.path
        if "seal_key_env" in more:
            pytest.importorskip("cryptography")
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("HICACHE_EXT_TEST_KEY", "0f" * 32)
        options = {"path": path / "share", "capacity": capacity, "linger": 0.05, **more}
        return SharedFsBackend(SharedFsBackend.Options.model_validate(options), dispatcher)

    return open_share


def _nixl(registered: bool, faults: dict[str, object] | None = None) -> Callable[..., Backend]:
    def open_nixl(path: Path, stack: ExitStack, dispatcher: Dispatcher, capacity: int = 64 << 20) -> Backend:
        if faults is not None:
            disk = stack.enter_context(fuse_disk(path))
            disk.plan.write_text(json.dumps(faults))
            path = disk.path
        pytest.importorskip("nixl_cu12")
        from storage_backends.nixl import NixlBackend

        class Registering(NixlBackend):
            """Registers the memory of every batch when it comes first, as an engine does with its pools."""

            def read(self, batch: PageBatch) -> Completion:
                return super().read(self._registered_first(batch))

            def write(self, batch: PageBatch) -> Completion:
                return super().write(self._registered_first(batch))

            def _registered_first(self, batch: PageBatch) -> PageBatch:
                if batch.owner.address not in self._known[0]:
                    self.register_memory(batch.owner.address, batch.owner.size)
                return batch

        options = {"plugin": "POSIX", "path": path / "pages", "capacity": capacity}
        kind = Registering if registered else NixlBackend
        return kind(NixlBackend.Options.model_validate(options), dispatcher)

    return open_nixl


def _nixl_objects(path: Path, stack: ExitStack, dispatcher: Dispatcher, capacity: int = 0) -> Backend:
    pytest.importorskip("nixl_cu12")
    from storage_backends.nixl import NixlBackend
    from tests.s3_server import CREDENTIALS, s3_server

    server = s3_server()
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    for name, value in CREDENTIALS.items():
        patch.setenv(name, value)
    options = {
        "plugin": "OBJ", "endpoint": f"http://127.0.0.1:{server.port}", "allow_http": True, "bucket": server.bucket(),
        "timeout": 60,
    }  # fmt: skip
    return NixlBackend(NixlBackend.Options.model_validate(options), dispatcher)


#: Of a share: one transfer in three is answered after others that came later.
LATE = {"fault": "delay", "seconds": [0, 0.02], "probability": 0.3}

BACKENDS = {
    "dictionary": _dictionary,
    "memory": _memory(""),
    "memory-shared": _memory("test"),
    "memory-beside-the-dying": _memory_in_trouble,
    "local-threads": _local("threads"),
    "local-liburing": _local("liburing"),
    "local-native": _local("native"),
    "local-two-disks": _local("threads", 2),
    "local-native-three-disks": _local("native", 3),
    "local-device": _device,
    "nixl": _nixl(registered=False),
    "nixl-late": _nixl(registered=True, faults={"seed": 1, "read": [LATE], "write": [LATE]}),
    "nixl-registered": _nixl(registered=True),
    "nixl-objects": _nixl_objects,
    "redis": _redis(),
    "redis-in-pieces": _redis(lambda port: Proxy(port, piece=1500)),
    "redis-sealed": _redis(seal_key_env="HICACHE_EXT_TEST_KEY"),
    "s3": _s3(),
    "s3-in-pieces": _s3(lambda port: Proxy(port, piece=1500)),
    "mooncake": _mooncake(direct=False),
    "mooncake-registered": _mooncake(direct=True),
    "shared-fs": _shared_fs(),
    "shared-fs-late": _shared_fs({"read": [LATE], "write": [LATE]}),
    "shared-fs-buffered": _shared_fs(direct=False),
    "shared-fs-sealed": _shared_fs(seal_key_env="HICACHE_EXT_TEST_KEY"),
}


def _named(name: str, given: str) -> Callable[..., Backend]:
    """A backend as a configuration names it. given: its options, JSON."""

    def open_named(path: Path, _: ExitStack, dispatcher: Dispatcher, capacity: int = 64 << 20) -> Backend:
        chosen = backend_class(name)
        values = {"capacity": capacity} if "capacity" in chosen.Options.model_fields else {}
        for key, value in json.loads(given).items():
            values[key] = value.replace("{path}", str(path)) if isinstance(value, str) else value
        return chosen(chosen.Options.model_validate(values), dispatcher)

    return open_named


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "opener" in metafunc.fixturenames:
        named = metafunc.config.getoption("--hicache-backend", default=None)
        metafunc.parametrize("opener", [named] if named else sorted(BACKENDS), indirect=True, scope="function")


@pytest.fixture
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    dispatcher = Dispatcher()
    named = request.config.getoption("--hicache-backend", default=None)
    opening = _named(named, request.config.getoption("--hicache-options")) if named else BACKENDS[request.param]
    with ExitStack() as stack:

        def open_one(**options: int) -> Backend:
            backend = opening(tmp_path, stack, dispatcher, **options)
            stack.callback(backend.close)
            return backend

        yield open_one
    dispatcher.close()


@pytest.fixture
def backend(opener: Opener) -> Backend:
    return opener()


def wait(completion: Completion) -> list[Outcome]:
    return completion.result(30)


def store(backend: Backend, pool: HostPool, keys: list[bytes]) -> None:
    assert wait(backend.write(pool.write_batch(keys))) == [Outcome.HIT] * len(keys)


@pytest.mark.parametrize(
    ("lengths", "skew"),
    [((8192, 8192), 0), ((4096,), 0), ((70272,), 0), ((65536 + 4096, 300, 4096), 0), ((8192, 8192), 72)],
    ids=["two-buffers", "one-buffer", "odd-length", "chunks-and-odd", "skewed-memory"],
)
def test_what_is_written_is_read(backend: Backend, lengths: tuple[int, ...], skew: int) -> None:
    space, keys = namespace(lengths), chain("a", 20)
    pool = HostPool(space, 24, skew)
    store(backend, pool, keys)
    assert backend.lookup(key_batch(space, keys)).all()
    pool.poison()
    order = keys[::-1]
    assert wait(backend.read(pool.batch(order))) == [Outcome.HIT] * 20
    assert all(pool.right(page, key) for page, key in enumerate(order))


def test_absent_pages_are_misses_and_their_neighbours_hits(backend: Backend) -> None:
    space, keys = namespace(), chain("a", 6)
    pool = HostPool(space, 6)
    store(backend, pool, keys[::2])
    assert backend.lookup(key_batch(space, keys)).tolist() == [1, 0, 1, 0, 1, 0]
    assert wait(backend.read(pool.batch(keys))) == [Outcome.HIT, Outcome.MISS] * 3
    assert all(pool.right(page, keys[page]) for page in (0, 2, 4))


def test_an_empty_batch_is_done_at_once(backend: Backend) -> None:
    pool = HostPool(namespace(), 1)
    assert backend.read(pool.batch([])).result(0) == []
    assert backend.write(pool.batch([])).result(0) == []
    assert backend.lookup(key_batch(pool.space, [])).tolist() == []


def test_namespaces_do_not_meet(backend: Backend) -> None:
    mine, theirs, keys = namespace(), namespace(model="model-b"), chain("a", 3)
    store(backend, HostPool(mine, 3), keys)
    pool = HostPool(theirs, 3)
    assert not backend.lookup(key_batch(theirs, keys)).any()
    assert wait(backend.read(pool.batch(keys))) == [Outcome.MISS] * 3


def test_writing_again_is_a_hit_and_changes_nothing(backend: Backend) -> None:
    space, keys = namespace(), chain("a", 4)
    pool = HostPool(space, 4)
    store(backend, pool, keys)
    store(backend, pool, keys)
    pool.poison()
    assert wait(backend.read(pool.batch(keys))) == [Outcome.HIT] * 4
    assert all(pool.right(page, key) for page, key in enumerate(keys))


def test_remove_and_clear(backend: Backend) -> None:
    mine, theirs, keys = namespace(), namespace(model="model-b"), chain("a", 6)
    store(backend, HostPool(mine, 6), keys)
    store(backend, HostPool(theirs, 6), keys)
    assert backend.remove(key_batch(mine, keys[4:])) == 2
    assert backend.remove(key_batch(mine, keys[4:])) == 0
    assert backend.lookup(key_batch(mine, keys)).tolist() == [1, 1, 1, 1, 0, 0]
    backend.clear([mine])
    assert not backend.lookup(key_batch(mine, keys)).any()
    assert backend.lookup(key_batch(theirs, keys)).all()
    store(backend, HostPool(mine, 6), keys)


def test_full_tier_keeps_serving_and_never_blocks(opener: Opener) -> None:
    backend = opener(capacity=8 << 20)
    space = namespace((65536, 65536))
    pool = HostPool(space, 16)
    for round_number in range(12):
        outcomes = wait(backend.write(pool.write_batch(chain(f"c{round_number}", 16))))
        assert set(outcomes) <= {Outcome.HIT, Outcome.REJECTED}
    last = chain("c11", 16)
    found = backend.lookup(key_batch(space, last)).astype(bool)
    until = time.monotonic() + 20
    while backend.capabilities.native_ttl and not found.any():  # such a store makes room at its own pace
        assert time.monotonic() < until, "it rejects for ever"
        time.sleep(0.02)
        wait(backend.write(pool.write_batch(last)))
        found = backend.lookup(key_batch(space, last)).astype(bool)
    assert found.any()
    pool.poison()
    hits = np.array([outcome == Outcome.HIT for outcome in wait(backend.read(pool.batch(last)))])
    if backend.capabilities.native_ttl:
        assert hits.any()
        assert not (hits & ~found).any(), "such a store removes by itself, at any time, but adds nothing"
    else:
        assert hits.tolist() == found.tolist()
    assert all(pool.right(page, key) for page, key in enumerate(last) if hits[page])


def test_residency_is_reported_once_each(backend: Backend) -> None:
    space, keys = namespace(), chain("a", 5)
    seen: list[tuple[Residency, bytes]] = []
    threads: set[str] = set()

    def listen(change: Residency, digest: bytes, packed: bytes, _notes: Notes | None) -> None:
        assert digest == space.digest
        threads.add(threading.current_thread().name)
        seen.extend((change, packed[i : i + 32]) for i in range(0, len(packed), 32))

    backend.on_residency(listen)
    pool = HostPool(space, 5)
    store(backend, pool, keys)
    store(backend, pool, keys)
    backend.remove(key_batch(space, keys[:2]))
    drained = threading.Event()
    backend.dispatcher.post(drained.set)
    assert drained.wait(10)
    assert sorted(seen) == sorted(
        [(Residency.STORED, key) for key in keys] + [(Residency.REMOVED, key) for key in keys[:2]]
    )
    assert threads == {"hicache-dispatch"}


def test_callbacks_run_on_the_dispatcher(backend: Backend) -> None:
    pool = HostPool(namespace(), 2)
    names: list[str] = []
    called = threading.Event()

    def done(_: Completion) -> None:
        names.append(threading.current_thread().name)
        called.set()

    backend.write(pool.write_batch(chain("a", 2))).on_done(done)
    assert called.wait(10)
    assert names == ["hicache-dispatch"]


def test_many_threads_at_once(backend: Backend) -> None:
    space = namespace((16384, 16384))
    wrong: list[str] = []

    def work(who: int) -> None:
        pool = HostPool(space, 16)
        for turn in range(6):
            keys = chain(f"shared{turn % 3}", 8) + chain(f"own{who}/{turn}", 8)
            if Outcome.FAILED in wait(backend.write(pool.write_batch(keys))):
                wrong.append("write failed")
            pool.poison()
            outcomes = wait(backend.read(pool.batch(keys)))
            wrong.extend(
                f"{who}/{turn}/{page}: {outcome!r}"
                for page, outcome in enumerate(outcomes)
                if outcome != Outcome.HIT or not pool.right(page, keys[page])
            )

    threads = [threading.Thread(target=work, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_close_under_load_is_short_and_leaves_nothing_open(backend: Backend) -> None:
    space = namespace((65536, 65536))
    pool = HostPool(space, 128)
    keys = chain("a", 128)
    store(backend, pool, keys)
    pending = [backend.read(pool.batch(keys)) for _ in range(4)]
    began = time.monotonic()
    backend.close()
    assert time.monotonic() - began < 8
    for completion in pending:
        assert set(wait(completion)) <= {Outcome.HIT, Outcome.TIMEOUT, Outcome.MISS, Outcome.FAILED}


def test_capabilities_and_stats_are_told(backend: Backend) -> None:
    assert backend.capabilities.medium in {"CPU", "DISK", "EXTERNAL"}
    assert isinstance(backend.stats()["pages"], int)


def test_what_is_known_without_asking_is_no_more_than_what_is_there(backend: Backend) -> None:
    space, keys = namespace(), chain("a", 6)
    assert not backend.lookup_local(key_batch(space, keys)).any()
    store(backend, HostPool(space, 6), keys[:4])
    assert backend.lookup_local(key_batch(space, keys)).tolist() == [1, 1, 1, 1, 0, 0]
    backend.remove(key_batch(space, keys[:1]))
    assert backend.lookup_local(key_batch(space, keys)).tolist() == [0, 1, 1, 1, 0, 0]
    backend.clear([space])
    assert not backend.lookup_local(key_batch(space, keys)).any()
