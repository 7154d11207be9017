"""What a directory of the local tier holds, for people and tools. Read only, beside living servers as well.

Belongs here: extent headers, residency logs and locks as they lie on the disk, and what follows from them: pages,
ages, chains. Does not belong here: payloads and whether they are whole (scrub.py), or serving pages (backend.py).

Nothing here takes a lock, writes, truncates or deletes, and nothing that it meets is trusted: a directory may hold
files of others, of another version, or half of what it should.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from hicache_ext.page import NO_PARENT
from storage_backends.format import BLOCK, FORMAT_LINE, VERSION, ExtentHeader, FormatError, UnknownVersion
from storage_backends.local.device import LOCK as DEVICE_LOCK
from storage_backends.local.device import MARK, device_of, is_device, placement_of
from storage_backends.local.extents import extent_number, retired_number
from storage_backends.local.files import is_locked
from storage_backends.local.folder import LOCK, folder_number
from storage_backends.local.residency import MAGIC, NAME, RECORD_BYTES, Kind, LogReader, Record
from storage_backends.local.use import NAME as USE
from storage_backends.local.use import Told, read_use

_FORMAT = "FORMAT"
_OURS_IN_FOLDER = {LOCK, NAME, "residency.new", USE}

Pages = dict[int, dict[int, Record]]
"""A folder's pages: extent number -> slot number -> what the log says of it."""


class NotATier(ValueError):
    """Not a directory of the local tier, or one that cannot be read; `str()` is all that needs to be said."""


class Trouble(StrEnum):
    """Why a file of the directory is not what a file there should be."""

    NOT_OURS = "not ours"
    UNREADABLE = "unreadable"
    UNKNOWN_VERSION = "unknown version"
    DAMAGED = "damaged"
    UNFINISHED = "unfinished"  # being made now, or left by a writer that died while it made it: holds no page
    TRUNCATED = "truncated"


@dataclass(frozen=True)
class Problem:
    path: Path
    kind: Trouble
    text: str


@dataclass(frozen=True)
class ExtentFile:
    """One extent as its header describes it. file_bytes: what there is of it, which may be less.

    data, base: the file or device that holds its bytes, and where in it they begin.
    """

    path: Path
    number: int
    header: ExtentHeader
    file_bytes: int
    data: Path
    base: int = 0


class LogView:
    """The pages that a folder's residency log names now. `refresh` again to follow a living writer."""

    def __init__(self, folder: Path) -> None:
        self.pages: Pages = {}
        self._places: dict[tuple[bytes, bytes], tuple[int, int]] = {}
        self._reader = LogReader(folder / NAME)

    def refresh(self) -> None:
        """Raises UnknownVersion, OSError."""
        for record in self._reader.read():
            self._forget_if_restarted()
            self._apply(record)
        self._forget_if_restarted()  # replaced by a log without records

    def close(self) -> None:
        self._reader.close()

    def _forget_if_restarted(self) -> None:
        if self._reader.restarted:
            self._reader.restarted = False
            self.pages.clear()
            self._places.clear()

    def _apply(self, record: Record) -> None:
        page = (record.namespace, record.key)
        match record.kind:
            case Kind.STORED:
                self._drop(*self._places.get(page, (-1, -1)))
                self._drop(record.extent, record.slot)
                self.pages.setdefault(record.extent, {})[record.slot] = record
                self._places[page] = (record.extent, record.slot)
            case Kind.REMOVED:
                if self._places.get(page) == (record.extent, record.slot):
                    self._drop(record.extent, record.slot)
            case Kind.EXTENT_GONE:
                for gone in self.pages.pop(record.extent, {}).values():
                    self._places.pop((gone.namespace, gone.key), None)

    def _drop(self, extent: int, slot: int) -> None:
        record = self.pages.get(extent, {}).pop(slot, None)
        if record is not None:
            self._places.pop((record.namespace, record.key), None)


@dataclass
class FolderSurvey:
    """One `w<k>`. live: a process holds its lock. lost: pages that the log names in extents that are not there.

    use: what a living writer says of its use of the disk. retired_bytes: in extents that wait for their deletion.
    """

    path: Path
    live: bool = False
    extents: list[ExtentFile] = field(default_factory=list)
    pages: Pages = field(default_factory=dict)
    lost: int = 0
    use: Told | None = None
    retired_bytes: int = 0

    @property
    def slots(self) -> int:
        return sum(extent.header.slots for extent in self.extents)

    @property
    def file_bytes(self) -> int:
        return sum(extent.file_bytes for extent in self.extents)


@dataclass
class Survey:
    path: Path
    folders: list[FolderSurvey] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def survey(path: Path) -> Survey:
    """Everything but payloads. Raises NotATier."""
    found = Survey(path)
    if is_device(path):
        raise NotATier(
            f"{path}: a device or a file. Fix: name the directory of a tier, for a device the one below `metadata`"
        )
    try:
        names = sorted(os.listdir(path))
        _check_format(path, names)
        device = device_of(path) if is_plain(path / MARK) else None
    except OSError as error:
        raise NotATier(f"{path}: {error.strerror}. Fix: name the directory of a local tier that this user may read") \
            from error  # fmt: skip
    for name in names:
        inside = path / name
        if folder_number(name) is not None and inside.is_dir():
            found.folders.append(_folder(inside, device, found.problems))
        elif name not in (_FORMAT, MARK, DEVICE_LOCK) and not name.startswith(".probe-"):
            found.problems.append(Problem(inside, Trouble.NOT_OURS, "not a file of the local tier"))
    found.folders.sort(key=lambda folder: int(folder.path.name[1:]))
    return found


def _check_format(path: Path, names: list[str]) -> None:
    if _FORMAT not in names or not is_plain(path / _FORMAT):
        raise NotATier(f"{path}: not a local tier: it has no {_FORMAT} file. Fix: name the `path` of a local tier")
    with open(path / _FORMAT, "rb") as file:
        line = file.read(200)
    if line != FORMAT_LINE.format(VERSION).encode():
        said = line.decode(errors="replace").strip()[:80]
        raise NotATier(
            f"{path}: holds {said!r}, and this program reads format {VERSION}. Fix: use the version that wrote it"
        )


def _folder(path: Path, device: Path | None, problems: list[Problem]) -> FolderSurvey:
    folder = FolderSurvey(path)
    try:
        names = sorted(os.listdir(path))
        folder.live = is_plain(path / LOCK) and is_locked(path / LOCK)
    except OSError as error:
        problems.append(Problem(path, Trouble.UNREADABLE, str(error.strerror)))
        return folder
    for name in names:
        if not is_plain(path / name) and os.path.lexists(path / name):
            problems.append(Problem(path / name, Trouble.NOT_OURS, "not a plain file"))
        elif (number := extent_number(name)) is not None:
            extent = _extent(path / name, number, device, problems)
            if extent is not None:
                folder.extents.append(extent)
        elif retired_number(name) is not None:
            with contextlib.suppress(OSError):
                folder.retired_bytes += os.stat(path / name).st_size
        elif name not in _OURS_IN_FOLDER:
            problems.append(Problem(path / name, Trouble.NOT_OURS, "not a file of the local tier"))
    if folder.live:
        folder.use = read_use(path)
        if folder.use is None and USE in names:
            text = "says nothing that can be read: its writer counts as average"
            problems.append(Problem(path / USE, Trouble.DAMAGED, text))
    for number, slots in _log_pages(path, problems).items():
        header = next((extent.header for extent in folder.extents if extent.number == number), None)
        kept = {
            slot: record
            for slot, record in slots.items()
            if header is not None and slot < header.slots and record.namespace == header.namespace
        }
        folder.lost += len(slots) - len(kept)
        if kept:
            folder.pages[number] = kept
    return folder


def _log_pages(folder: Path, problems: list[Problem]) -> Pages:
    path = folder / NAME
    if not is_plain(path):
        return {}
    try:
        with open(path, "rb") as file:
            strange = file.read(RECORD_BYTES)[: len(MAGIC)] not in (MAGIC, b"")
    except OSError:
        strange = False  # said below
    if strange:
        problems.append(Problem(path, Trouble.DAMAGED, "not a residency log: the folder is known by its slots alone"))
        return {}
    log = LogView(folder)
    try:
        log.refresh()
    except UnknownVersion as error:
        problems.append(Problem(path, Trouble.UNKNOWN_VERSION, f"{error}: its pages are not counted"))
    except OSError as error:
        problems.append(Problem(path, Trouble.UNREADABLE, str(error.strerror)))
    finally:
        log.close()
    return log.pages


def is_plain(path: Path) -> bool:
    """Whether this is a plain file: opening another kind (a pipe, a device) may wait for ever."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _extent(path: Path, number: int, device: Path | None, problems: list[Problem]) -> ExtentFile | None:
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            raw = file.read(BLOCK) or b""
    except FileNotFoundError:
        return None  # deleted by its writer since the listing
    except OSError as error:
        problems.append(Problem(path, Trouble.UNREADABLE, str(error.strerror)))
        return None
    if not any(raw):
        problems.append(Problem(path, Trouble.UNFINISHED, "no header yet, so no page"))
        return None
    try:
        header = ExtentHeader.decode(raw)
    except UnknownVersion as error:
        problems.append(Problem(path, Trouble.UNKNOWN_VERSION, f"{error}, and this program reads {VERSION}"))
        return None
    except FormatError as error:
        problems.append(Problem(path, Trouble.DAMAGED, f"{error}: its pages are lost"))
        return None
    if header.number != number:
        problems.append(Problem(path, Trouble.DAMAGED, f"says that it is extent {header.number}: its pages are lost"))
        return None
    data, base = path, 0
    if device is not None:
        try:
            place = placement_of(path)
        except UnknownVersion as error:
            problems.append(Problem(path, Trouble.UNKNOWN_VERSION, f"{error}, and this program reads {VERSION}"))
            return None
        except (FormatError, OSError) as error:
            problems.append(Problem(path, Trouble.DAMAGED, f"{error}: its pages are lost"))
            return None
        data, base, size = device, place.offset, place.length
    if size < header.extent_bytes:
        text = f"has {size} of {header.extent_bytes} bytes: pages beyond the end are lost"
        problems.append(Problem(path, Trouble.TRUNCATED, text))
    return ExtentFile(path, number, header, size, data, base)


@dataclass(frozen=True)
class Chains:
    """How pages hang together by their parents. A chain ends in a page that no resident page names as its parent.

    usable: pages whose ancestors are all here, up to one without a known parent; an engine can use them without any
    other tier. orphaned: the others, of use only while their heads are in the engine's memory. Lengths in pages.
    """

    chains: int = 0
    longest: int = 0
    median: float = 0.0
    usable: int = 0
    orphaned: int = 0


def chains(pages: Iterable[tuple[bytes, bytes]]) -> Chains:
    """From (key, parent key; zeroes = unknown) of one namespace's pages. Linear in the pages, whatever they claim."""
    parents = dict(pages)
    depths: dict[bytes, int] = {}  # 0: some ancestor is missing
    for key in parents:
        path: list[bytes] = []
        at = key
        while at in parents and at not in depths:
            depths[at] = 0  # so that a ring of parents ends here, as orphans
            path.append(at)
            at = parents[at]
        depth = depths.get(at, 0)
        usable = at == NO_PARENT or depth > 0
        for page in reversed(path):
            depth = depth + 1 if usable else 0
            depths[page] = depth
    with_children = set(parents.values())
    lengths = [depth for key, depth in depths.items() if depth and key not in with_children]
    orphaned = sum(not depth for depth in depths.values())
    return Chains(
        len(lengths), max(lengths, default=0), statistics.median(lengths or [0]), len(depths) - orphaned, orphaned
    )


@dataclass
class NamespaceSummary:
    """One namespace of a directory. Bytes of a page: `slot_bytes` on the disk, of them `payload_bytes` the page's own.

    payload_bytes is None where the extents do not say. copies: pages that more than one writer stored. Ages in seconds.
    """

    digest: bytes
    description: dict[str, Any]
    slot_bytes: int
    payload_bytes: int | None
    folders: int
    extents: int
    slots: int
    file_bytes: int
    pages: int
    copies: int
    oldest: float
    newest: float
    median: float
    chains: Chains

    @property
    def overhead(self) -> float | None:
        """Header and padding, as a fraction of the page."""
        return self.slot_bytes / self.payload_bytes - 1 if self.payload_bytes else None


def summarise(found: Survey, now: float | None = None) -> list[NamespaceSummary]:
    """Every namespace that has an extent, the one with most pages first."""
    extents: dict[bytes, list[ExtentFile]] = {}
    pages: dict[bytes, dict[bytes, Record]] = {}
    total: dict[bytes, int] = {}
    for folder in found.folders:
        for extent in folder.extents:
            extents.setdefault(extent.header.namespace, []).append(extent)
        for record in (record for slots in folder.pages.values() for record in slots.values()):
            total[record.namespace] = total.get(record.namespace, 0) + 1
            pages.setdefault(record.namespace, {})[record.key] = record
    clock = time.time() if now is None else now
    return sorted(
        (_summary(digest, files, pages.get(digest, {}), total.get(digest, 0), clock)
         for digest, files in extents.items()),
        key=lambda summary: -summary.pages,
    )  # fmt: skip


def _summary(
    digest: bytes, files: list[ExtentFile], pages: dict[bytes, Record], total: int, now: float
) -> NamespaceSummary:
    description = describe(files[0].header)
    ages = [max(0.0, now - record.time_ns / 1e9) for record in pages.values()] or [0.0]
    return NamespaceSummary(
        digest,
        description,
        files[0].header.slot_bytes,
        _payload_bytes(description, files[0].header.slot_bytes),
        len({extent.path.parent for extent in files}),
        len(files),
        sum(extent.header.slots for extent in files),
        sum(extent.file_bytes for extent in files),
        len(pages),
        total - len(pages),
        max(ages),
        min(ages),
        statistics.median(ages),
        chains((key, record.parent) for key, record in pages.items()),
    )


def describe(header: ExtentHeader) -> dict[str, Any]:
    """The namespace's fields from an extent header; empty where it has none that can be read."""
    try:
        fields = json.loads(header.description)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _payload_bytes(description: dict[str, Any], slot_bytes: int) -> int | None:
    layout = description.get("layout")
    lengths = layout.get("buffer_lengths") if isinstance(layout, dict) else None
    if not isinstance(lengths, list) or not all(type(length) is int and length > 0 for length in lengths):
        return None
    payload = sum(lengths)
    return payload if 0 < payload < slot_bytes else None
