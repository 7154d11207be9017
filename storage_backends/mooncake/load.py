"""The pages of one request to Mooncake, and where their bytes are for its process.

Belongs here: addresses of heads and payloads, and the copies that cannot be avoided. Does not belong here: the request.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from storage_backends.base import Buffers
from storage_backends.mooncake.client import Process
from storage_backends.mooncake.memory import Part, copy, views
from storage_backends.object_backend import Group


class Load:
    """Pages of `group`, added one by one. Heads lie in the window's `part`, of which the load has all.

    pages: their numbers in the batch. heads: of each, in the window. through: by index, the payloads in the window of
    those that are not used where they lie.
    """

    def __init__(self, process: Process, part: Part, group: Group) -> None:
        self._regions, self._part, self._group = process.regions, part, group
        part.clear()
        self.pages: list[int] = []
        self.heads: list[memoryview] = []
        self.through: dict[int, Buffers] = {}
        self._at: list[list[int]] = []
        self._sizes: list[list[int]] = []

    @property
    def where(self) -> dict[str, Any]:
        """The part of a request that says it."""
        return {"at": self._at, "sizes": self._sizes}

    def add(self, page: int, copied: bool) -> bool:
        """One more page; False when the window's part is full. copied: its payload goes through the window."""
        batch, head_bytes = self._group.batch, self._group.form.head_bytes
        own = slice(int(batch.offsets[page]), int(batch.offsets[page + 1]))
        lengths = batch.lengths[own]
        payload = int(lengths.sum())
        there = self._regions.there(batch.addresses[own], lengths)
        direct = not copied and bool(there.all())
        # What goes through the window goes in one piece, head and all: each piece is a request of its own over TCP.
        room = self._part.take(head_bytes if direct else head_bytes + payload)
        if room is None:
            return False
        address, view = room
        first = int(self._regions.there(np.array([address], np.uint64), np.array([1], np.uint64))[0])
        if direct:
            self._at.append([first, *there.tolist()])
            self._sizes.append([head_bytes, *lengths.tolist()])
        else:
            self.through[len(self.pages)] = views(address + head_bytes, lengths.tolist())
            self._at.append([first])
            self._sizes.append([head_bytes + payload])
        self.pages.append(page)
        self.heads.append(view[:head_bytes])
        return True

    def fill(self) -> None:
        """Put the last page's bytes there, to be written."""
        head, buffers = self._group.form.prepare(self._group.batch, self.pages[-1])
        copy([head], [self.heads[-1]])
        through = self.through.get(len(self.pages) - 1)
        if through is not None:
            copy(buffers, through)

    def deliver(self, i: int) -> None:
        """Put the payload that arrived into page number `i`'s own buffers, where it is not."""
        through = self.through.get(i)
        if through is not None:
            copy(through, self._group.batch.buffers(self.pages[i]))
