"""An event stream of our own: a thread that takes what is to be said from a source and sends it to who subscribed.

Belongs here: sockets, their thread, starting over. Does not belong here: what is to be said (announcer.py, queue.py: a
`Source`), its bytes (model.py), what was sent lately and under which numbers (sent.py).

Nobody who has something to say ever waits: `wake` sets a flag. Who says faster than readers read is slowed by nothing
either: the source is asked for the next events when there is room, and says then what is so, not what came to pass.

What readers rely on, and how it is kept (the facts are of Dynamo's indexer; others ask for less):

- A reader whose next batch does not have the next sequence number asks for what it missed. It is given it from what was
  sent lately, which begins with an `AllBlocksCleared`: the whole story. Once that was too long to keep, such a reader
  is told that there is nothing, and all readers are told everything again after an `AllBlocksCleared`: a **resync**.
- A reader that has just come, or that was too slow for the last batches, does not know that it missed something until a
  batch comes. So one without events is sent for the first, and every second in which there is nothing to say for the
  second. While nobody is subscribed nothing is taken, encoded, sent or kept.
- A reader drops batches up to the highest number that it has met. So a publisher does not start at 0 but at the time in
  microseconds: as nobody sends a million batches a second, that is higher than what any before it has used. Readers see
  a gap, ask, and are given a story that begins with `AllBlocksCleared`. Where a clock may go back by more than a
  restart takes, `sequence_file` keeps the number.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Protocol

import zmq
from pydantic import BaseModel, ConfigDict, Field, field_validator

from hicache_ext.events.model import (
    END_OF_REPLAY,
    SEQUENCE_BYTES,
    AllBlocksCleared,
    AnyEvent,
    BlockRemoved,
    BlockStored,
    Dialect,
    EventBatch,
    encode,
)
from hicache_ext.events.sent import Numbers, Sent
from storage_backends.base import OptionError

logger = logging.getLogger(__name__)

#: Seconds between two batches, as long as there is less to say than one holds: one costs hardly more than one event.
_GATHER = 0.001
_BEAT_SECONDS = 1.0
_CLOSE_SECONDS = 2.0


class Source(Protocol):
    """What is to be said. Both are called by the publisher's thread alone."""

    def take(self, limit: int) -> list[AnyEvent]:
        """The next events, of about `limit` blocks at most; empty when all was said."""

    def clear(self) -> None:
        """Readers know nothing any more: all that is so is to be said again, from the next `take` on."""


class PublisherOptions(BaseModel):
    """Where to publish, and how much to keep. Addresses are ZeroMQ's (`tcp://127.0.0.1:5557`, `ipc:///run/kv`).

    endpoint: events. replay_endpoint: what a reader missed. Data-parallel rank r uses both ports plus r, as SGLang's.
    batch_blocks: most blocks of one batch. replay_bytes: kept for readers that missed something, beyond what one
    telling of everything takes. subscriber_batches: kept for a reader that is slow; of more it is told if it asks.
    resync_newcomers: tell everybody everything again when a reader comes, for readers that cannot ask.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: str
    replay_endpoint: str
    topic: str = ""
    dialect: Dialect = Dialect.SGLANG
    batch_blocks: Annotated[int, Field(ge=1)] = 512
    replay_bytes: Annotated[int, Field(ge=0)] = 64 << 20
    subscriber_batches: Annotated[int, Field(ge=1)] = 2000
    resync_newcomers: bool = False
    sequence_file: Path | None = None

    @field_validator("endpoint", "replay_endpoint")
    @classmethod
    def _address(cls, value: str) -> str:
        if value.startswith("tcp://"):
            port = value.rpartition(":")[2]
            if not (port.isdigit() or port == "*"):
                raise ValueError("a tcp address ends with its port: tcp://127.0.0.1:5557")
        elif not value.startswith(("ipc://", "inproc://")):
            raise ValueError("an address begins with tcp://, ipc:// or inproc://")
        return value


def of_rank(endpoint: str, rank: int) -> str:
    """The address of this data-parallel rank, as SGLang and its readers reckon it."""
    if rank == 0:
        return endpoint
    if not endpoint.startswith("tcp://"):
        return f"{endpoint}_dp{rank}"
    host, _, port = endpoint.rpartition(":")
    return f"{host}:*" if port == "*" else f"{host}:{int(port) + rank}"


class Publisher:
    """Publishes what its source has to say, from a thread of its own, until it is closed.

    endpoint, replay_endpoint: where it is bound in the end. OptionError: an address cannot be bound.
    """

    def __init__(self, options: PublisherOptions, source: Source, rank: int = 0) -> None:
        self._options, self._source, self._rank = options, source, rank
        self._topic = options.topic.encode()
        self._context = zmq.Context()
        try:
            # XPUB is PUB that hears of subscriptions.
            self._live = self._bind(zmq.XPUB, "endpoint", of_rank(options.endpoint, rank))
            self._replay = self._bind(zmq.ROUTER, "replay_endpoint", of_rank(options.replay_endpoint, rank))
        except OptionError:
            self._context.destroy(linger=0)
            raise
        self.endpoint = self._live.getsockopt_string(zmq.LAST_ENDPOINT)
        self.replay_endpoint = self._replay.getsockopt_string(zmq.LAST_ENDPOINT)
        self._numbers = Numbers(options.sequence_file)
        self._sent = Sent(options.replay_bytes)
        self._subscribers = 0
        self._counts: Counter[str] = Counter()
        self._time = self._last = 0.0
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._asleep = False
        self._again = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="hicache-events", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """The source has something to say. Any thread may call; costs a system call at most, and that seldom."""
        if self._asleep:
            self._ring()

    def resync(self) -> None:
        """Tell all readers to forget everything, and then what is so."""
        self._again = True
        self._ring()

    def stats(self) -> dict[str, int]:
        """subscribers: now. batches, events, blocks, resyncs, replays (requests answered), failures: so far.

        sequence: of the next batch. kept_bytes: for readers that missed something.
        """
        names = ("batches", "events", "blocks", "resyncs", "replays", "failures")
        return {
            "subscribers": self._subscribers,
            **{name: self._counts[name] for name in names},
            "sequence": self._numbers.next,
            "kept_bytes": self._sent.bytes,
        }

    def close(self) -> None:
        """Send what the source has, as far as that takes no longer than a moment, and let the ports go. Idempotent."""
        if self._closing:
            return
        self._closing = True
        self._ring()
        self._thread.join(_CLOSE_SECONDS + 1)

    # -- setting up ----------------------------------------------------------------------------------------------

    def _bind(self, kind: int, option: str, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        if kind == zmq.XPUB:
            socket.setsockopt(zmq.XPUB_VERBOSER, 1)
            socket.setsockopt(zmq.SNDHWM, self._options.subscriber_batches)
        else:
            # What is on its way is what is kept anyway; a bound would cut an answer short.
            socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.LINGER, 0)
        if address.startswith("tcp://["):
            socket.setsockopt(zmq.IPV6, 1)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            taken = error.errno == zmq.EADDRINUSE
            fix = "stop who uses it, or choose another port" if taken else "an address of this machine and a free port"
            raise OptionError(option, address, str(error).lower(), fix) from error
        return socket

    def _ring(self) -> None:
        self._asleep = False
        try:
            os.eventfd_write(self._bell, 1)
        except OSError:  # closed, or rung four billion times
            pass

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        for heard in (self._live, self._replay, self._bell):
            poller.register(heard, zmq.POLLIN)
        failed = False
        while not self._closing:
            try:
                more = self._step()
                if not more:
                    self._asleep = True
                    more = self._step()  # who adds something after this look rings
                patience = 0 if more else round(_BEAT_SECONDS * 1000) if self._subscribers else None
                ready = dict(poller.poll(patience))
                if ready or more:
                    self._hear(ready, gather=not more)
                elif self._subscribers:
                    self._send([])
            except Exception:
                self._counts["failures"] += 1
                if not failed:
                    logger.exception("publishing KV events failed; readers are told everything again")
                failed = self._again = True
                time.sleep(0.1)
        self._finish()

    def _step(self) -> bool:
        """Send one batch, if there is something to say and somebody to hear it; whether there may be more."""
        if not self._subscribers:
            return False
        if self._again:
            self._again = False
            self._sent.begin()
            self._source.clear()
            self._counts["resyncs"] += 1
            self._send([AllBlocksCleared()])
        events = self._source.take(self._options.batch_blocks)
        if not events:
            self._sent.told()
            return False
        self._send(events)
        return True

    def _hear(self, ready: dict[Any, int], gather: bool) -> None:
        self._asleep = False  # what is said from now on is looked for, at the latest, before the next sleep
        if self._bell in ready:
            os.eventfd_read(self._bell)
            # The first event goes at once; those that come right after a batch wait for each other.
            if gather and (left := self._last + _GATHER - time.monotonic()) > 0:
                time.sleep(left)
        if self._live in ready:
            self._subscriptions()
        if self._replay in ready:
            self._requests()

    def _subscriptions(self) -> None:
        before = self._subscribers
        came = 0
        while (frame := _received(self._live)) is not None:
            change = {b"\1": 1, b"\0": -1}.get(frame[0][:1], 0)
            self._subscribers = max(0, self._subscribers + change)
            came += change > 0
        if not came:
            if before and not self._subscribers:
                self._sent.forget()
        elif not before or self._options.resync_newcomers:
            self._again = True
        else:
            self._send([])  # shows the newcomer that it missed something

    def _requests(self) -> None:
        wanted: dict[bytes, int] = {}
        while (frame := _received(self._replay)) is not None:
            if len(frame) >= 2 and len(frame[-1]) == SEQUENCE_BYTES:
                wanted[frame[0]] = int.from_bytes(frame[-1], "big")  # the last request of each
        for client, start in wanted.items():
            self._counts["replays"] += 1
            if self._sent.covers(start):
                for number, payload in self._sent.since(start):
                    self._replay.send_multipart(
                        (client, b"", self._topic, number.to_bytes(SEQUENCE_BYTES, "big"), payload), copy=False
                    )
            else:
                self._again = True
            self._replay.send_multipart((client, b"", b"", END_OF_REPLAY, b""))

    def _send(self, events: list[AnyEvent]) -> None:
        self._time = max(self._time, time.time())
        number = self._numbers.take()
        payload = encode(EventBatch(self._time, events, self._rank), self._options.dialect)
        self._live.send_multipart((self._topic, number.to_bytes(SEQUENCE_BYTES, "big"), payload), copy=False)
        self._last = time.monotonic()
        self._sent.add(number, payload)
        self._counts["batches"] += 1
        self._counts["events"] += len(events)
        self._counts["blocks"] += sum(
            len(event.block_hashes) for event in events if isinstance(event, BlockStored | BlockRemoved)
        )

    def _finish(self) -> None:
        until = time.monotonic() + _CLOSE_SECONDS / 2
        try:
            while time.monotonic() < until and self._step():
                pass
        except Exception:
            logger.exception("publishing the last KV events failed")
        # A moment for what is on its way; a reader that is stuck does not hold this up.
        self._context.destroy(linger=int(_CLOSE_SECONDS / 2 * 1000))
        bell, self._bell = self._bell, -1
        os.close(bell)


def _received(socket: zmq.Socket[bytes]) -> list[bytes] | None:
    try:
        return socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None
