"""The reading end of an event stream: batches in order, those that were missed asked for.

Belongs here: sockets, sequence numbers and gaps as a reader sees them. Does not belong here: what the events mean
(view.py, check.py).
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import zmq

from hicache_ext.events.model import SEQUENCE_BYTES, Decoded, decode
from storage_backends.base import OptionError

_REPLAY_SECONDS = 10.0


@dataclass(frozen=True)
class Received:
    """One batch. missed: how many numbers before it nobody gave us. stale: its number is not higher than one before.

    replayed: it came as the answer to a request, not live.
    """

    number: int
    topic: bytes
    decoded: Decoded
    missed: int = 0
    stale: bool = False
    replayed: bool = False


class Subscriber:
    """Reads one stream. With a replay endpoint it asks for what it missed, from the beginning too, as routers do.

    batches: how many may wait to be received; of more some are missed.
    answered: whether a request was ever answered to its end; None before the first. malformed: messages that were not
    three frames with a number of eight bytes.
    """

    def __init__(
        self, endpoint: str, replay_endpoint: str | None = None, topic: str = "", batches: int = 10_000
    ) -> None:
        self._context = zmq.Context()
        self._live = self._context.socket(zmq.SUB)
        self._live.setsockopt(zmq.RCVHWM, batches)
        self._live.setsockopt(zmq.SUBSCRIBE, topic.encode())
        self._connect(self._live, "endpoint", endpoint)
        self._replay: zmq.Socket[bytes] | None = None
        if replay_endpoint is not None:
            self._replay = self._context.socket(zmq.DEALER)
            self._replay.setsockopt(zmq.RCVHWM, 0)
            self._connect(self._replay, "replay_endpoint", replay_endpoint)
        self._last: int | None = None
        self._heard = -1  # the last one that came live
        self._ready: deque[Received] = deque()
        self.answered: bool | None = None
        self.malformed = 0

    def _connect(self, socket: zmq.Socket[bytes], option: str, endpoint: str) -> None:
        socket.setsockopt(zmq.LINGER, 0)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise OptionError(
                option, endpoint, str(error).lower(), "an address such as tcp://127.0.0.1:5557"
            ) from error

    def receive(self, seconds: float) -> Received | None:
        """The next batch; None when none came within `seconds`. A batch that is stale comes too, and says so."""
        until = time.monotonic() + seconds
        while not self._ready:
            if not self._live.poll(max(0, round((until - time.monotonic()) * 1000))):
                return None
            frames = self._live.recv_multipart()
            if len(frames) != 3 or len(frames[1]) != SEQUENCE_BYTES:
                self.malformed += 1
                continue
            self._met(int.from_bytes(frames[1], "big"), frames[0], frames[2])
        return self._ready.popleft()

    def _met(self, number: int, topic: bytes, payload: bytes) -> None:
        expected = 0 if self._last is None else self._last + 1
        if number > expected and self._replay is not None:
            self._ask(self._replay, expected)
            expected = 0 if self._last is None else self._last + 1
        heard, self._heard = self._heard, max(self._heard, number)
        if heard < number < expected:  # an answer had it already
            return
        first = self._last is None
        # Who comes late without a way to ask has missed an unknown number: not a gap.
        missed = 0 if first and self._replay is None else max(0, number - expected)
        self._ready.append(Received(number, topic, decode(payload), missed, stale=number < expected))
        self._last = number if self._last is None else max(self._last, number)

    def _ask(self, socket: zmq.Socket[bytes], start: int) -> None:
        socket.send_multipart((b"", start.to_bytes(SEQUENCE_BYTES, "big")))
        until = time.monotonic() + _REPLAY_SECONDS
        while socket.poll(max(0, round((until - time.monotonic()) * 1000))):
            # A delimiter, a topic that older engines leave out, number, payload.
            *before, raw, payload = socket.recv_multipart()
            if not payload:
                self.answered = True
                return
            if len(raw) != SEQUENCE_BYTES:
                self.malformed += 1
                continue
            number = int.from_bytes(raw, "big")
            if self._last is not None and number <= self._last:
                continue
            topic = before[1] if len(before) > 1 else b""
            missed = 0 if self._last is None else max(0, number - self._last - 1)
            self._ready.append(Received(number, topic, decode(payload), missed, replayed=True))
            self._last = number
        self.answered = False

    def close(self) -> None:
        self._context.destroy(linger=0)

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
