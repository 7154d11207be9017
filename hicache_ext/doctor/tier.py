"""One local tier of a configuration: its path, disk, direct I/O, room, file descriptors and what is in it.

Belongs here: what concerns one `path`. Does not belong here: the whole configuration (checkup.py).
"""

from __future__ import annotations

import contextlib
import os
import resource
import stat
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ByteSize

from hicache_ext.doctor import disk
from hicache_ext.doctor.finding import Finding, error, ok, warning
from storage_backends.base import OptionError
from storage_backends.direct_io import DirectIo, alignment_of, probe_direct
from storage_backends.format import FormatError
from storage_backends.local.device import home_of, is_device, is_missing_device, placement_of, usable_bytes
from storage_backends.local.extents import extent_numbers
from storage_backends.local.options import nearest
from storage_backends.local.survey import NamespaceSummary, NotATier, Problem, Trouble, summarise, survey

_MUCH_OVERHEAD = 0.10
_LEFT_FREE = 0.05
#: Descriptors for everything else in a server process: sockets, pipes, libraries.
_OTHER_DESCRIPTORS = 1024
#: How the tier cuts its share into extents.
_EXTENT_BYTES, _EXTENTS_PER_SHARE = 1 << 30, 32


@dataclass(frozen=True)
class Place:
    """One path of a local tier as configured. label: the tier's name. capacity: bytes. engine: as asked for. others:
    path and capacity of the tier's other disks. metadata: where a device has its locks and logs."""

    label: str
    path: Path
    capacity: int
    engine: str = "auto"
    others: tuple[tuple[Path, int], ...] = ()
    metadata: Path | None = None


def probe(place: Place) -> list[Finding]:
    """Everything about one tier; the first finding says where."""
    if is_missing_device(place.path) or is_device(place.path):
        return device(place)
    exists = nearest(place.path)
    findings = [path(place, exists), disk.probe(f"{place.label}: disk", exists)]
    if exists.is_dir() and os.access(exists, os.W_OK | os.X_OK):
        findings.append(direct_io(place.label, probe_direct(exists)))
    used = _bytes_in(place.path)
    room = os.statvfs(exists)
    # Disks on one file system share its room; what another has yet to take is not there for this one.
    beside = sum(
        max(0, capacity - _bytes_in(path))
        for path, capacity in place.others
        if os.stat(nearest(path)).st_dev == os.stat(exists).st_dev
    )
    findings += [
        space(place, max(0, room.f_bavail * room.f_frsize - beside), room.f_blocks * room.f_frsize, used),
        descriptors(place, _extents_in(place.path), *resource.getrlimit(resource.RLIMIT_NOFILE)),
        *contents(place),
    ]
    return findings


def device(place: Place) -> list[Finding]:
    """A raw device, and the directory of its locks and logs."""
    title = f"{place.label}: path"
    try:
        home, room = home_of(place.path, place.metadata), usable_bytes(place.path)
        fd = os.open(place.path, os.O_RDWR | os.O_CLOEXEC)
    except OptionError as problem:
        return [error(title, f"{place.path}: {problem.problem}", problem.fix)]
    except OSError as problem:
        return [
            error(
                title, f"{place.path}: {problem.strerror}", "name a device that is there and that this user may write"
            )
        ]
    try:
        direct, status = alignment_of(place.path, fd), os.fstat(fd)
    finally:
        os.close(fd)
    if stat.S_ISBLK(status.st_mode):
        below = disk.judge(f"{place.label}: disk", disk.Mount("", "raw device", ""), *disk.block_device(status.st_rdev))
    else:
        below = disk.probe(f"{place.label}: disk", place.path)
    inside, held = replace(place, path=home), _held(home)
    return [
        ok(title, f"{place.path}, locks and logs in {home}"),
        below,
        direct_io(place.label, direct),
        space(place, max(0, room - held), room, held),
        descriptors(place, _extents_in(home), *resource.getrlimit(resource.RLIMIT_NOFILE)),
        *contents(inside),
    ]


def path(place: Place, exists: Path) -> Finding:
    """exists: the path, or the nearest of its parents that is there."""
    title = f"{place.label}: path"
    make = f"sudo install -d -o $(id -un) {place.path}"
    if not exists.is_dir():
        return error(title, f"{exists} is not a directory", "set `path` to a directory")
    if not os.access(exists, os.W_OK | os.X_OK):
        return error(title, f"{exists} is not writable for user {os.geteuid()}", make)
    return ok(title, f"{place.path}" + ("" if exists == place.path else f" (will be made in {exists})"))


def direct_io(label: str, direct: DirectIo) -> Finding:
    title = f"{label}: direct I/O"
    if direct.works:
        return ok(title, f"O_DIRECT, alignment {direct.memory} bytes in memory and {direct.offset} on the disk")
    return warning(
        title, f"none ({direct.reason}): pages go through the page cache, at several times the CPU",
        "use a file system with O_DIRECT: ext4 or xfs on a local disk",
    )  # fmt: skip


def space(place: Place, free: int, total: int, used: int) -> Finding:
    """free, total: bytes of the file system. used: bytes that the tier has already."""
    title = f"{place.label}: space"
    text = f"capacity {_size(place.capacity)}; {_size(free)} free of {_size(total)}, {_size(used)} in use by the tier"
    left = free + used - place.capacity
    if left < 0:
        return error(title, text, f"lower `capacity` to {_size(max(0, free + used))} or less, or use a larger disk")
    if left < total * _LEFT_FREE:
        return warning(
            title, f"{text}: a full tier leaves {_size(left)}, and a nearly full disk is slow",
            f"lower `capacity` to {_size(max(0, int(free + used - total * _LEFT_FREE)))}",
        )  # fmt: skip
    return ok(title, text)


def descriptors(place: Place, there: int, soft: int, hard: int) -> Finding:
    """there: extents on the disk. soft, hard: RLIMIT_NOFILE. A process keeps every extent open that it has used."""
    title = f"{place.label}: file descriptors"
    extents = max(there, _EXTENTS_PER_SHARE, -(-place.capacity // _EXTENT_BYTES))
    needed = extents + _OTHER_DESCRIPTORS
    said = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    text = f"limit {said}; a full tier has about {extents} extents"
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return ok(title, text)
    fix = f"ulimit -n {needed} (docker run --ulimit nofile={needed}; systemd: LimitNOFILE={needed})"
    if hard != resource.RLIM_INFINITY and hard < needed:
        return error(title, f"{text}, and the hard limit is {hard}", fix)
    return warning(title, text, fix)


def contents(place: Place) -> list[Finding]:
    """What is in the tier now; nothing to say where there is none yet."""
    title = f"{place.label}: contents"
    if not place.path.is_dir() or not os.listdir(place.path):
        return []
    try:
        found = survey(place.path)
    except NotATier as problem:
        text, _, fix = str(problem).partition(". Fix: ")
        return [error(title, text, f"{fix}, or set `path` to an empty directory")]
    namespaces = summarise(found)
    living = sum(folder.live for folder in found.folders)
    pages = sum(namespace.pages for namespace in namespaces)
    text = f"{pages} pages in {len(namespaces)} namespaces, {living} of {len(found.folders)} folders have a writer"
    return [ok(title, text), *overheads(place.label, namespaces), *problems(place, found.problems)]


def overheads(label: str, namespaces: Iterable[NamespaceSummary]) -> list[Finding]:
    """Namespaces whose pages are small for what a slot adds to them."""
    return [
        warning(
            f"{label}: overhead",
            f"namespace {namespace.digest.hex()}: header and padding add {namespace.overhead:.0%} "
            f"to pages of {namespace.payload_bytes} bytes",
            "a larger --page-size",
        )
        for namespace in namespaces
        if namespace.overhead is not None and namespace.overhead > _MUCH_OVERHEAD
    ]


def problems(place: Place, found: Iterable[Problem]) -> list[Finding]:
    title = f"{place.label}: contents"
    findings = []
    for problem in found:
        text = f"{problem.path}: {problem.kind}: {problem.text}"
        if problem.kind is Trouble.UNKNOWN_VERSION:
            findings.append(error(title, text, "use the version that wrote it, or delete the directory"))
        elif problem.kind is not Trouble.UNFINISHED:
            findings.append(warning(title, text, f"hicache-ext inspect {place.path}"))
    return findings


def _extents_in(directory: Path) -> int:
    return sum(len(extent_numbers(folder)) for folder in directory.glob("w*") if folder.is_dir())


def _bytes_in(directory: Path) -> int:
    return sum(extent.stat().st_size for extent in directory.glob("w*/e*.ext") if extent.is_file())


def _held(home: Path) -> int:
    """Bytes of a device that have their place (bytes)."""
    held = 0
    for file in home.glob("w*/e*.ext"):
        with contextlib.suppress(FormatError, OSError):
            held += placement_of(file).length
    return held


def _size(value: int) -> str:
    return ByteSize(value).human_readable()
