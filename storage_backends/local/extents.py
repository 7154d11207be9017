"""Extents of writer folders: which there are, and how one is made, opened, given another use and deleted.

Belongs here: where an extent's bytes lie. Does not belong here: who gets its slots (writer.py), what a folder's log
says (folder.py), or what the bytes mean (format.py).

An extent is one file, `e<number>.ext`. Numbers are never used again within a folder: when an extent is given to
another namespace its file gets a new header and a new number, so that nobody takes its old pages for new ones. Freeing
the space of a large file can take seconds, so an extent that goes is first renamed to `e<number>.gone` and deleted when
nobody waits; what a crash leaves of those the folder's next owner deletes.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from storage_backends.direct_io import DirectIo
from storage_backends.format import BLOCK, ExtentHeader, FormatError
from storage_backends.local.files import open_extent, preallocate


@dataclass(slots=True, eq=False)
class Extent:
    """An open extent. pins: I/O that uses `fd` now; a doomed extent is closed when the last pin goes.

    base: where it begins in what `fd` is open on (bytes). serial: a number that no other open extent of this process
    ever has, unlike `fd`.
    """

    path: Path
    number: int
    header: ExtentHeader
    fd: int
    base: int = 0
    pins: int = 0
    doomed: bool = False
    serial: int = field(default_factory=count(1).__next__)

    def offset(self, slot: int) -> int:
        """Where a slot begins in what `fd` is open on (bytes)."""
        return self.base + self.header.slot_offset(slot)

    def unpin(self, pins: int = 1) -> None:
        self.pins -= pins
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


def retired_path(folder: Path, number: int) -> Path:
    return folder / f"e{number:010d}.gone"


def retired_number(name: str) -> int | None:
    """The number in the name of an extent that waits for its deletion; None for another name."""
    return extent_number(name.removesuffix(".gone") + ".ext") if name.endswith(".gone") else None


def extent_numbers(folder: Path) -> list[int]:
    """Numbers of the extents in a folder, ascending. Only regular files: opening a pipe would wait for ever."""
    return _numbers(folder, extent_number)


def retired_numbers(folder: Path) -> list[int]:
    """Numbers of the extents that wait for their deletion, ascending."""
    return _numbers(folder, retired_number)


def _numbers(folder: Path, number_in: Callable[[str], int | None]) -> list[int]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_file()]
    except FileNotFoundError:
        return []
    return sorted(number for name in names if (number := number_in(name)) is not None)


class ExtentFiles:
    """Extents as files in the writer folders of one file system."""

    def __init__(self, direct: DirectIo) -> None:
        self.direct = direct

    def header(self, folder: Path, number: int) -> ExtentHeader:
        """Raises FormatError, UnknownVersion, OSError."""
        with open(extent_path(folder, number), "rb", buffering=0) as file:
            header = ExtentHeader.decode(file.read(BLOCK) or b"")
        if header.number != number:
            raise FormatError(f"extent {number} says that it is {header.number}")
        return header

    def open(self, folder: Path, number: int, write: bool) -> Extent:
        """Raises FormatError, UnknownVersion, OSError."""
        header = self.header(folder, number)
        path = extent_path(folder, number)
        return Extent(path, number, header, open_extent(path, self.direct, write))

    def create(self, folder: Path, header: ExtentHeader) -> Extent:
        """A new extent, its space reserved. OSError (ENOSPC, ...) when there is none; nothing is left behind then."""
        path = extent_path(folder, header.number)
        fd = open_extent(path, self.direct, write=True, create=True)
        try:
            preallocate(fd, header.extent_bytes)
            _write_header(path, header)
        except BaseException:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        return Extent(path, header.number, header, fd)

    def reuse(self, folder: Path, old: Extent, header: ExtentHeader) -> Extent:
        """Give an extent that nothing uses (no pins) another use, in O(1). `old` is closed.

        header: with a new number, a new generation, and the old size.

        Header first, then the name: stopped in between, the file's name and its header disagree, which makes it no
        extent at all, and the folder's next owner deletes it. Slots of the former use are still there; their
        generations are below the new one. Who has the old file open elsewhere reads slots that say whose they are.
        OSError when the device refuses; the file is then no extent, as after a stop.
        """
        assert not old.pins, "an extent in use"
        assert header.extent_bytes == old.header.extent_bytes, "an extent keeps its size"
        path = extent_path(folder, header.number)
        _write_header(old.path, header)
        os.rename(old.path, path)
        fd, old.fd = old.fd, -1
        old.doom()
        return Extent(path, header.number, header, fd, old.base)

    def retire(self, folder: Path, number: int) -> None:
        """An extent is one no more, for anybody; its bytes are taken until `delete`, which may take long. OSError."""
        os.rename(extent_path(folder, number), retired_path(folder, number))

    def delete(self, folder: Path, number: int) -> None:
        """Free its space, retired or not. OSError when the file system refuses; one that is gone is no error."""
        extent_path(folder, number).unlink(missing_ok=True)
        retired_path(folder, number).unlink(missing_ok=True)

    def disk_bytes(self, folder: Path) -> int:
        """What the folder's extents take (bytes), retired ones too."""
        total = 0
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                if extent_number(entry.name) is not None or retired_number(entry.name) is not None:
                    with contextlib.suppress(OSError):
                        total += entry.stat(follow_symlinks=False).st_size
        return total


def _write_header(path: Path, header: ExtentHeader) -> None:
    with open(path, "r+b", buffering=0) as plain:  # not through O_DIRECT, which wants aligned memory
        plain.write(header.encode())
