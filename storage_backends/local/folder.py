"""A writer folder as any process sees it: its extents, opened when first read, and its residency log, tailed.

Belongs here: reading somebody's folder into the index. Does not belong here: changing it (writer.py).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from storage_backends.local.files import DirectIo, is_locked, open_extent
from storage_backends.local.format import BLOCK, ExtentHeader, FormatError, UnknownVersion
from storage_backends.local.index_choice import AnyIndex
from storage_backends.local.residency import NAME, LogReader

logger = logging.getLogger(__name__)

LOCK = "lock"


@dataclass(slots=True, eq=False)
class Extent:
    """An open extent. pins: I/O that uses `fd` now; a doomed extent is closed when the last pin goes.

    serial: a number that no other open extent of this process ever has, unlike `fd`.
    """

    path: Path
    number: int
    header: ExtentHeader
    fd: int
    pins: int = 0
    doomed: bool = False
    serial: int = field(default_factory=count(1).__next__)

    def unpin(self) -> None:
        self.pins -= 1
        self.close_if_unused()

    def doom(self) -> None:
        self.doomed = True
        self.close_if_unused()

    def close_if_unused(self) -> None:
        if self.doomed and not self.pins and self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def extent_path(folder: Path, number: int) -> Path:
    return folder / f"e{number:010d}.ext"


def extent_number(name: str) -> int | None:
    """The number in an extent's file name; None for a name that no writer gives."""
    found = re.fullmatch(r"e([0-9]{10,})\.ext", name)
    return int(found.group(1)) if found and name == extent_path(Path(), int(found.group(1))).name else None


def folder_number(name: str) -> int | None:
    """The number in a writer folder's name; None for a name that no writer gives."""
    return int(name[1:]) if re.fullmatch(r"w(0|[1-9][0-9]{0,8})", name) else None


def extent_numbers(folder: Path) -> list[int]:
    """Numbers of the extents in a folder, ascending. Only regular files: opening a pipe would wait for ever."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_file()]
    except FileNotFoundError:
        return []
    return sorted(number for name in names if (number := extent_number(name)) is not None)


def read_extent_header(path: Path) -> ExtentHeader:
    """Raises FormatError, UnknownVersion, OSError."""
    with open(path, "rb", buffering=0) as file:
        return ExtentHeader.decode(file.read(BLOCK) or b"")


def open_existing(path: Path, number: int, direct: DirectIo, write: bool) -> Extent:
    """Raises FormatError, UnknownVersion, OSError."""
    header = read_extent_header(path)
    if header.number != number:
        raise FormatError(f"extent {number} says that it is {header.number}")
    return Extent(path, number, header, open_extent(path, direct, write))


class Folder:
    """One `w<k>`, read only. Not thread-safe: the backend's lock is around it."""

    def __init__(self, path: Path, direct: DirectIo) -> None:
        self.path = path
        self.number = int(path.name[1:])
        self.direct = direct
        self.extents: dict[int, Extent] = {}
        self._log = LogReader(path / NAME)

    def has_owner(self) -> bool:
        """Whether a living process writes here."""
        return is_locked(self.path / LOCK)

    def poll(self, index: AnyIndex) -> None:
        """Bring the index up to date with this folder's log."""
        for block in self._log.blocks():
            self._forget_if_restarted(index)
            taken, _, gone = index.apply_log(self.number, block.data, block.at_end)
            self._log.took(taken)
            for number in gone:
                extent = self.extents.pop(number, None)
                if extent is not None:
                    extent.doom()
        self._forget_if_restarted(index)  # replaced by a log without records

    def _forget_if_restarted(self, index: AnyIndex) -> None:
        if self._log.restarted:
            self._log.restarted = False
            index.drop(self.number)

    def extent(self, number: int) -> Extent | None:
        """The extent, opened if need be; None when it is gone or not readable as one (its pages are then misses)."""
        found = self.extents.get(number)
        if found is None:
            try:
                found = open_existing(extent_path(self.path, number), number, self.direct, write=False)
            except FormatError as error:
                logger.warning("%s: %s; its pages count as misses", extent_path(self.path, number), error)
                return None
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                    logger.warning("%s: %s; its pages count as misses", extent_path(self.path, number), error)
                return None
            self.extents[number] = found
        return found

    def namespaces(self) -> dict[bytes, int]:
        """Extents per namespace, from the headers on disk: what this folder is for, log or no log.

        Raises UnknownVersion when an extent is of a format that this program does not know.
        """
        found: dict[bytes, int] = {}
        for number in extent_numbers(self.path):
            try:
                namespace = read_extent_header(extent_path(self.path, number)).namespace
                found[namespace] = found.get(namespace, 0) + 1
            except UnknownVersion:
                raise
            except (FormatError, OSError):
                continue
        return found

    def disk_bytes(self) -> int:
        """Bytes of its extents on disk."""
        total = 0
        for number in extent_numbers(self.path):
            with contextlib.suppress(OSError):
                total += os.stat(extent_path(self.path, number)).st_size
        return total

    def close(self) -> None:
        self._log.close()
        for extent in self.extents.values():
            extent.doom()
        self.extents.clear()
