"""Work on the folder that this process writes, beside the serving: the header scan after a claim, log compaction.

Belongs here: threads, and when they begin. Does not belong here: what they do (recovery.py, own_log.py).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from storage_backends.local.index_choice import AnyIndex
from storage_backends.local.recovery import HeaderScan
from storage_backends.local.slots import CancelFlag
from storage_backends.local.writer import Writer

logger = logging.getLogger(__name__)


class Upkeep:
    """The backend's lock is around every method. closing: ends all work; whoever sets it joins `threads`."""

    def __init__(self, index: AnyIndex, lock: threading.RLock, closing: CancelFlag) -> None:
        self._index, self._lock, self._closing = index, lock, closing
        self._scans: list[HeaderScan] = []
        self._compaction: threading.Thread | None = None
        self.threads: list[threading.Thread] = []

    def claimed(self, writer: Writer) -> None:
        """Look for pages that the log of the folder we just took does not name."""
        scan = HeaderScan(writer, self._index, self._lock, self._closing)
        self._scans.append(scan)
        self._start("hicache-scan", scan.run)

    def turn(self, writer: Writer) -> None:
        """Begin what is due; called now and then."""
        if self._compaction is not None and self._compaction.is_alive():
            return
        if writer.log.due(len(self._index)):
            self._compaction = self._start("hicache-compact", lambda: self._compact(writer))

    def stats(self) -> Mapping[str, int]:
        counts = {
            "scan_done": sum(scan.done for scan in self._scans),
            "scan_total": sum(scan.total for scan in self._scans),
        }
        if self._scans and all(scan.ended for scan in self._scans):
            counts["recovered_by_scan"] = sum(scan.found for scan in self._scans)
        return counts

    def _start(self, name: str, run: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                run()
            except Exception:
                logger.exception("local tier: %s failed", name)

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        self.threads = [other for other in self.threads if other.is_alive()] + [thread]
        thread.start()
        return thread

    def _compact(self, writer: Writer) -> None:
        steps = writer.log.compact(self._index, writer.number, self._lock)
        try:
            for _ in steps:
                if self._closing.is_set():
                    return
        finally:
            steps.close()
