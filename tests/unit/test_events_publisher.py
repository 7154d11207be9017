"""The publisher over real sockets, under everything that can go wrong: what a reader believes in the end is so."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from hicache_ext.events.model import AllBlocksCleared, AnyEvent, BlockRemoved, BlockStored, Medium
from hicache_ext.events.publisher import Publisher, PublisherOptions, of_rank
from hicache_ext.events.queue import cut
from hicache_ext.events.view import View
from storage_backends.base import OptionError
from tests.streams import SECONDS, SIZE, Reader, Store, wait


@pytest.fixture
def options(tmp_path: Path) -> PublisherOptions:
    return PublisherOptions(endpoint=f"ipc://{tmp_path}/live", replay_endpoint=f"ipc://{tmp_path}/replay")


class Stage:
    """Publishers and readers that are closed at the end."""

    def __init__(self, options: PublisherOptions) -> None:
        self.options = options
        self._open: list[Publisher | Reader] = []

    def publish(self, store: Store, **changed: object) -> Publisher:
        publisher = Publisher(self.options.model_copy(update=changed), store.queue)
        store.wake = publisher.wake
        self._open.append(publisher)
        return publisher

    def read(self, publisher: Publisher, pause: float = 0.0) -> Reader:
        reader = Reader(publisher.endpoint, publisher.replay_endpoint, pause)
        self._open.append(reader)
        return reader

    def close(self) -> None:
        for one in reversed(self._open):
            one.close()


@pytest.fixture
def stage(options: PublisherOptions) -> Iterator[Stage]:
    made = Stage(options)
    yield made
    made.close()


def test_a_reader_sees_what_is_so(stage: Stage) -> None:
    store = Store()
    publisher = stage.publish(store)
    store.change(100)  # nobody listens yet
    reader = stage.read(publisher)
    wait(lambda: reader.agrees(store))
    store.change(500)
    wait(lambda: reader.agrees(store))
    assert reader.cleared() == 1
    numbers = [got.number for got in reader.batches]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_a_lost_removal_is_seen(stage: Stage) -> None:
    """The check of these tests can fail."""
    store = Store()
    reader = stage.read(stage.publish(store))
    store.change(300)
    wait(lambda: reader.agrees(store))
    store.held[Medium.DISK].popitem()
    time.sleep(0.1)
    assert not reader.agrees(store)


def test_who_comes_late_learns_all_without_waiting_for_a_change(stage: Stage) -> None:
    store = Store()
    publisher = stage.publish(store)
    first = stage.read(publisher)
    store.change(300)
    wait(lambda: first.agrees(store))
    late = stage.read(publisher)
    wait(lambda: late.agrees(store))
    store.change(50)
    wait(lambda: first.agrees(store) and late.agrees(store))
    assert (first.cleared(), late.cleared(), publisher.stats()["resyncs"]) == (1, 1, 1)


def test_who_comes_late_after_the_history_was_cut_costs_one_resync(stage: Stage) -> None:
    store = Store()
    publisher = stage.publish(store, replay_bytes=2000)
    first = stage.read(publisher)
    wait(lambda: first.batches)
    for _ in range(40):
        store.change(20)
        wait(lambda: first.agrees(store))
    assert publisher.stats()["kept_bytes"] < 20_000
    late = stage.read(publisher)
    wait(lambda: late.agrees(store))
    store.change(20)
    wait(lambda: first.agrees(store) and late.agrees(store))
    assert publisher.stats()["resyncs"] == 2


def test_a_slow_reader_catches_up_after_at_most_one_resync(stage: Stage) -> None:
    store = Store()
    publisher = stage.publish(store, subscriber_batches=10, batch_blocks=1)
    slow, quick = stage.read(publisher, pause=0.3), stage.read(publisher)
    wait(lambda: publisher.stats()["subscribers"] == 2)
    store.change(6000)
    wait(lambda: quick.agrees(store))
    slow.pause = 0.0
    wait(lambda: slow.agrees(store))
    assert any(got.replayed for got in slow.batches[10:])  # it did miss batches
    assert publisher.stats()["resyncs"] <= 2


def test_readers_that_go_cost_nothing_and_come_back(stage: Stage) -> None:
    store = Store()
    publisher = stage.publish(store)
    reader = stage.read(publisher)
    store.change(100)
    wait(lambda: reader.agrees(store))
    reader.close()
    wait(lambda: publisher.stats()["subscribers"] == 0)
    sent = publisher.stats()["batches"]
    store.change(1000)
    time.sleep(0.05)
    assert publisher.stats()["batches"] == sent
    assert publisher.stats()["kept_bytes"] == 0
    again = stage.read(publisher)
    wait(lambda: again.agrees(store))


def test_what_is_said_faster_than_sent_is_dropped_and_told_again(stage: Stage) -> None:
    store = Store(events=50)
    publisher = stage.publish(store)
    reader = stage.read(publisher)
    wait(lambda: publisher.stats()["batches"])
    started = time.monotonic()
    store.change(20_000, universe=500)
    assert time.monotonic() - started < 10  # never waits: a queue of 50 that blocked would take a minute
    store.change(1)
    wait(lambda: reader.agrees(store))
    assert store.queue.overflows


def test_a_batch_larger_than_every_buffer(stage: Stage) -> None:
    store = Store()
    publisher = stage.publish(store, batch_blocks=64, replay_bytes=100)
    reader = stage.read(publisher)
    blocks = list(range(5000))
    store.held[Medium.DISK] = dict.fromkeys(blocks)
    store.queue.put([BlockStored(blocks, None, [0] * SIZE * len(blocks), SIZE, None, Medium.DISK)])
    publisher.wake()
    wait(lambda: reader.agrees(store))
    assert max(len(got.decoded.batch.events) for got in reader.batches) <= 64


@pytest.mark.parametrize("clock", [0.0, -3600.0])
def test_a_restarted_publisher_is_believed(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: float
) -> None:
    """Dynamo drops what is numbered lower than what it has met, which a counter from 0 is."""
    file = tmp_path / "sequence"
    store = Store()
    publisher = stage.publish(store, sequence_file=file)
    reader = stage.read(publisher)
    store.change(300)
    wait(lambda: reader.agrees(store))
    publisher.close()
    store.change(100)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + clock)
    publisher = stage.publish(store, sequence_file=file)
    wait(lambda: reader.agrees(store))
    store.change(100)
    wait(lambda: reader.agrees(store))
    assert reader.cleared() == 2


def test_a_publisher_that_counts_from_nought_is_not(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the numbers of the test before are for."""
    store = Store()
    publisher = stage.publish(store)
    reader = stage.read(publisher)
    store.change(50)
    wait(lambda: reader.agrees(store))
    publisher.close()
    store.change(51)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    publisher = stage.publish(store)
    wait(lambda: publisher.stats()["batches"])
    time.sleep(0.1)
    assert not reader.agrees(store)


def test_time_in_batches_never_goes_back(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    reader = stage.read(stage.publish(store))
    real = time.time
    for shift in (0.0, -500.0, 3.0):
        monkeypatch.setattr(time, "time", lambda shift=shift: real() + shift)
        store.change(30)
        wait(lambda: reader.agrees(store))
    stamps = [got.decoded.batch.ts for got in reader.batches]
    assert stamps == sorted(stamps)


def test_many_threads(stage: Stage) -> None:
    store = Store()
    publisher = stage.publish(store)
    readers = [stage.read(publisher), stage.read(publisher)]
    threads = [threading.Thread(target=store.change, args=(1000,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait(lambda: all(reader.agrees(store) for reader in readers))


def test_resync_on_demand(stage: Stage) -> None:
    store = Store()
    publisher = stage.publish(store)
    reader = stage.read(publisher)
    store.change(100)
    wait(lambda: reader.agrees(store))
    reader.view.media[Medium.DISK][12345] = None  # a router that has lost its way
    publisher.resync()
    wait(lambda: reader.agrees(store))
    assert reader.cleared() == 2


def test_a_source_that_fails_is_asked_again(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    store = Store()
    publisher = stage.publish(store)
    reader = stage.read(publisher)
    store.change(20)
    wait(lambda: reader.agrees(store))
    real, broken = store.queue.take, [True, True]

    def take(limit: int) -> list[AnyEvent]:
        if broken:
            broken.pop()
            raise RuntimeError("not now")
        return real(limit)

    store.queue.take = take  # type: ignore[method-assign]
    store.change(20)
    wait(lambda: publisher.stats()["failures"] == 2 and reader.agrees(store))
    assert [record.message for record in caplog.records if "publishing" in record.message] == [
        "publishing KV events failed; readers are told everything again"
    ]


def test_a_taken_port_is_named_and_who_has_it_is_not_disturbed() -> None:
    store = Store()
    first = Publisher(PublisherOptions(endpoint="tcp://127.0.0.1:*", replay_endpoint="tcp://127.0.0.1:*"), store.queue)
    store.wake = first.wake
    reader = Reader(first.endpoint, first.replay_endpoint)
    try:
        store.change(50)
        wait(lambda: reader.agrees(store))
        with pytest.raises(OptionError, match=r"replay_endpoint.*address already in use.*another port"):
            Publisher(
                PublisherOptions(endpoint="tcp://127.0.0.1:*", replay_endpoint=first.replay_endpoint), store.queue
            )
        store.change(50)
        wait(lambda: reader.agrees(store))
        assert reader.cleared() == 1
    finally:
        first.close()
    again = Publisher(PublisherOptions(endpoint=first.endpoint, replay_endpoint=first.replay_endpoint), store.queue)
    store.wake = again.wake
    store.change(50)
    wait(lambda: reader.agrees(store))
    assert reader.cleared() == 2
    reader.close()
    again.close()
    with pytest.raises(OptionError, match="endpoint"):
        Publisher(PublisherOptions(endpoint="tcp://203.0.113.7:5557", replay_endpoint="tcp://127.0.0.1:*"), store.queue)


@pytest.mark.parametrize("address", ["127.0.0.1:5557", "tcp://127.0.0.1", "udp://127.0.0.1:1"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(ValueError, match="address"):
        PublisherOptions(endpoint=address, replay_endpoint="tcp://127.0.0.1:1")


def test_each_rank_has_its_ports() -> None:
    assert [of_rank("tcp://*:5557", rank) for rank in (0, 3)] == ["tcp://*:5557", "tcp://*:5560"]
    assert of_rank("inproc://kv", 1) == "inproc://kv_dp1"
    store = Store()
    publisher = Publisher(
        PublisherOptions(endpoint="tcp://127.0.0.1:*", replay_endpoint="tcp://127.0.0.1:*"), store.queue, rank=2
    )
    reader = Reader(publisher.endpoint, publisher.replay_endpoint)
    store.wake = publisher.wake
    store.change(3)
    wait(lambda: reader.agrees(store))
    assert {got.decoded.batch.dp_rank for got in reader.batches} == {2}
    reader.close()
    publisher.close()


def test_requests_that_are_none_are_passed_over(stage: Stage) -> None:
    store = Store()
    publisher = stage.publish(store)
    reader = stage.read(publisher)
    store.change(50)
    wait(lambda: reader.agrees(store))
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(publisher.replay_endpoint)
        for frames in ([b""], [b"", b"abc"], [b"\0" * 9], [b"", b"", b"", b"\xff" * 8]):
            socket.send_multipart(frames)
        assert socket.poll(SECONDS * 1000)
        assert socket.recv_multipart()[-2:] == [b"\xff" * 8, b""]
    store.change(50)
    wait(lambda: reader.agrees(store))


@given(st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_cut(blocks: int, most: int, removal: bool) -> None:
    hashes, tokens = list(range(1, blocks + 1)), list(range(blocks * SIZE))
    event: AnyEvent = (
        BlockRemoved(hashes, "DISK") if removal else BlockStored(hashes, 100, tokens, SIZE, None, "DISK", lora_name="x")
    )
    whole, parts = View(), View()
    whole.media[Medium.DISK] = {1: None, 50: None}
    parts.media[Medium.DISK] = {1: None, 50: None}
    whole.apply(event)
    rest: AnyEvent | None = event
    seen: list[int] = []
    while rest is not None:
        first, rest = cut(rest, most)
        parts.apply(first)
        assert not isinstance(first, AllBlocksCleared)
        assert len(first.block_hashes) <= most
        if isinstance(first, BlockStored):
            seen += first.token_ids
            assert len(first.token_ids) == SIZE * len(first.block_hashes)
    assert parts.media == whole.media
    assert removal or seen == tokens
