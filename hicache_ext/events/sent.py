"""What a publisher has sent: its latest batches, and the numbers that it gave them.

Belongs here: keeping enough for readers that missed something, and numbers that no reader takes for old ones. Does not
belong here: sockets and requests (publisher.py).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from storage_backends.base import OptionError

#: Sequence numbers that a `sequence_file` is ahead, so that it is written once in a while.
_AHEAD = 1 << 20


class Sent:
    """Batches sent lately, oldest first: all since the last `AllBlocksCleared`, or the last `limit` bytes of them.

    What one telling of everything takes is not counted against the limit: who asks just after it can be given it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._batches: deque[tuple[int, bytes]] = deque()
        self._whole = False
        self._telling = False
        self._story = 0
        self.bytes = 0

    def begin(self) -> None:
        """What comes next is a telling of everything."""
        self.forget()
        self._whole = self._telling = True

    def told(self) -> None:
        """That telling has ended, if there was one."""
        if self._telling:
            self._telling = False
            self._story = self.bytes

    def forget(self) -> None:
        self._batches.clear()
        self._whole = self._telling = False
        self._story = self.bytes = 0

    def add(self, number: int, payload: bytes) -> None:
        self._batches.append((number, payload))
        self.bytes += len(payload)
        while not self._telling and self.bytes > self._limit + self._story:
            _, oldest = self._batches.popleft()
            self.bytes -= len(oldest)
            self._whole = False

    def covers(self, start: int) -> bool:
        """Whether a reader that is given all from `start` on then knows all."""
        return self._whole or bool(self._batches and start >= self._batches[0][0])

    def since(self, start: int) -> Iterable[tuple[int, bytes]]:
        return (batch for batch in self._batches if batch[0] >= start)


class Numbers:
    """Sequence numbers that only grow, over restarts as well."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._reserved = 0
        self.next = int(time.time() * 1e6)
        if file is not None:
            try:
                self.next = max(self.next, int(file.read_text()))
            except FileNotFoundError:
                pass
            except (OSError, ValueError) as error:
                raise OptionError("sequence_file", str(file), f"cannot be read: {error}", "remove it") from error
            self._reserve()

    def take(self) -> int:
        number, self.next = self.next, self.next + 1
        if self._file is not None and number >= self._reserved:
            self._reserve()
        return number

    def _reserve(self) -> None:
        assert self._file is not None
        self._reserved = self.next + _AHEAD
        fresh = self._file.with_name(self._file.name + ".new")
        try:
            fresh.write_text(str(self._reserved))
            fresh.replace(self._file)
        except OSError as error:
            raise OptionError(
                "sequence_file", str(self._file), f"cannot be written: {error}", "a folder that can be written"
            ) from error
