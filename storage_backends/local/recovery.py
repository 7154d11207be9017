"""The header scan: finds pages that reached the disk but not the residency log (a crash, a lost, damaged or old log).

Belongs here: which slots of our folder are looked at, beside the serving, and when. Does not belong here: reading a
header (headers.py), taking a page in (writer.py), what the log says (residency.py), or trust in a payload (every read
verifies it).

Slots that the log does not name are looked at. Those that it names are sampled first, and looked at as well if a
single one of them holds another page than the log says: then the log is older than the data (a copy was restored, or
a power cut took its end), and its names stand in the way of the pages that are there. A log that is wrong about one
page in a hundred is found out by 512 samples in 994 of 1,000 cases; what a smaller fault hides is less than that one
page in a hundred, and costs misses only.

Only the folder that this process writes is scanned: in somebody else's, a slot that no record names may be being
written now, and taking it in would take the lock that its writer asks for. So the unlogged pages of an abandoned
folder are unknown until a writer comes back for it, which the first write of its namespace does.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from storage_backends.local.extents import Extent
from storage_backends.local.headers import Found, read_headers
from storage_backends.local.slots import CancelFlag

if TYPE_CHECKING:
    from storage_backends.local.index_choice import AnyIndex
    from storage_backends.local.writer import Writer

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 5.0
#: Slots of which headers are read in one call.
_CHUNK = 4096
#: Pages that are taken in at a time under the lock.
_PIECE = 256
_SAMPLES = 512


class HeaderScan:
    """One scan of the folder that `writer` has just claimed. `run` it on a thread of its own.

    done, total: slots looked at or passed over, of all. found: pages that came back. ended: the scan.
    """

    def __init__(self, writer: Writer, index: AnyIndex, lock: threading.RLock, stop: CancelFlag) -> None:
        self._writer, self._index, self._lock, self._stop = writer, index, lock, stop
        self._extents = list(writer.extents.values())
        self._everything = not writer.log_is_whole
        self.total = sum(extent.header.slots for extent in self._extents)
        self.done = self.found = 0
        self.ended = False

    def run(self) -> None:
        began = said = time.monotonic()
        self._everything = self._everything or self._log_is_old()
        if self._everything:
            logger.info("%s: the residency log is damaged, or older than the data: every slot is looked at",
                        self._writer.path)  # fmt: skip
        for extent in self._extents:
            for first in range(0, extent.header.slots, _CHUNK):
                if self._stop.is_set():
                    return
                count = min(_CHUNK, extent.header.slots - first)
                self._look(extent, range(first, first + count))
                self.done += count
                now = time.monotonic()
                if now - said > _PROGRESS_SECONDS:
                    said = now
                    rate = self.done / (now - began)
                    logger.info(
                        "%s: header scan: %d of %d slots, %d pages found, %.0f slots a second, %.0f s left",
                        self._writer.path, self.done, self.total, self.found, rate, (self.total - self.done) / rate,
                    )  # fmt: skip
        self.ended = True
        if self.found:
            logger.info("%s: header scan: %d pages found that the residency log did not name, in %.1f s",
                        self._writer.path, self.found, time.monotonic() - began)  # fmt: skip

    def _look(self, extent: Extent, slots: range) -> None:
        with self._lock:
            wanted = slots if self._everything else self._writer.free_slots(extent.number, slots)
            newest = self._writer.newest_generation
        found = self._read(extent, wanted)
        for at in range(0, len(found), _PIECE):
            with self._lock:
                self.found += self._writer.recover(extent, found[at : at + _PIECE], newest)
        for at in range(0, len(wanted), _PIECE):
            with self._lock:
                if not self._stop.is_set():  # else not all of them were looked at
                    self._writer.looked_at(extent, wanted[-at - _PIECE : len(wanted) - at])

    def _read(self, extent: Extent, slots: Sequence[int]) -> list[Found]:
        """Nothing holds these slots still: `Writer.recover` looks again under the lock."""
        with self._lock:
            if extent.doomed or not slots:
                return []
            extent.pins += 1
        try:
            return read_headers(extent, slots, self._stop)
        finally:
            with self._lock:
                extent.unpin()

    def _log_is_old(self) -> bool:
        """Whether any of the sampled slots holds another page than the log says."""
        chance = random.Random(self.total)
        left = _SAMPLES
        for _ in range(8):
            drawn = (
                chance.choices(self._extents, [e.header.slots for e in self._extents], k=_SAMPLES) if self.total else []
            )
            chosen: dict[int, set[int]] = {}
            for extent in drawn:
                chosen.setdefault(extent.number, set()).add(chance.randrange(extent.header.slots))
            for extent in self._extents:
                if left <= 0 or self._stop.is_set():
                    return False
                number = extent.number
                with self._lock:
                    places = [
                        (slot, self._index.at(self._writer.number, number, slot)) for slot in chosen.get(number, ())
                    ]
                named = {slot: page for slot, page in places if page is not None}
                left -= len(named)
                for header in self._read(extent, list(named)):
                    page = named[header.slot]
                    if (header.key, header.generation) == (page.key, page.generation):
                        continue
                    with self._lock:
                        now = self._index.at(self._writer.number, number, header.slot)
                    if now is not None and now.generation == page.generation:
                        return True
        return False
