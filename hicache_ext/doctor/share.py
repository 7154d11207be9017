"""One shared_fs tier of a configuration: its path and mount, what kind of share it is, direct I/O, room and clock.

Belongs here: what concerns one share. Does not belong here: the whole configuration (checkup.py), or segments.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import ByteSize

from hicache_ext.doctor.disk import REMOTE, Mount, mount_of, mountinfo
from hicache_ext.doctor.finding import Finding, error, ok, warning
from storage_backends.direct_io import DirectIo, probe_direct

_SKEW_SECONDS = 3600
_NOTABLE_SECONDS = 60


@dataclass(frozen=True)
class SharePlace:
    """A tier as configured. label: its name. mount: None where none is named. capacity: bytes, 0 for no limit."""

    label: str
    path: Path
    mount: Path | None
    capacity: int


def probe(place: SharePlace) -> list[Finding]:
    """Everything about one share; the first finding says where."""
    exists = place.path if place.path.exists() else place.path.parent
    found = [path(place, exists)]
    if not exists.is_dir():
        return found
    found.append(kind(place, mount_of(str(exists.resolve()), mountinfo())))
    room = os.statvfs(exists)
    found.append(space(place, room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize))
    if os.access(exists, os.W_OK | os.X_OK):
        found.append(direct_io(place.label, probe_direct(exists)))
        ahead = _clock(exists)
        if ahead is not None:
            found.append(clock(place.label, ahead))
    return found


def path(place: SharePlace, exists: Path) -> Finding:
    """exists: the path, or its parent."""
    title = f"{place.label}: path"
    if place.mount is not None and not os.path.ismount(place.mount):
        return error(title, f"nothing is mounted on {place.mount}", f"sudo mount {place.mount}")
    if not exists.is_dir():
        return error(title, f"{exists} is not there", f"mount the share, or make {exists}: only the last part is made")
    if not os.access(exists, os.W_OK | os.X_OK):
        return warning(
            title, f"{exists} is not writable for user {os.geteuid()}: pages of others are read, none are written",
            "chown or chmod the directory; servers with several users need a common group and umask 007",
        )  # fmt: skip
    return ok(title, f"{place.path}" + ("" if exists == place.path else f" (will be made in {exists})"))


def kind(place: SharePlace, mount: Mount) -> Finding:
    """What is mounted there, and how."""
    title = f"{place.label}: share"
    text = f"{mount.kind} on {mount.source}, mounted on {mount.point}"
    base = mount.kind.partition(".")[0]
    if base not in REMOTE and base != "fuse":
        return warning(
            title, f"{text}: not known as a file system that hosts share",
            "mount the share there; pages that stay on this machine belong into a `local` tier",
        )  # fmt: skip
    options = mount.options.split(",")
    if base.startswith("nfs") and "soft" in options:
        return warning(title, f"{text}: soft, so that a slow server is an I/O error", "mount it with `hard`")
    if base.startswith("nfs") and "noac" in options:
        return warning(title, f"{text}: noac, at a request for every look at a file", "mount it without `noac`")
    if place.mount is None and mount.point != "/":
        return warning(
            title, f"{text}: `mount` is not set, so without the mount pages would go to the disk below it",
            f"mount: {mount.point}",
        )  # fmt: skip
    return ok(title, text)


def space(place: SharePlace, free: int, total: int) -> Finding:
    """free, total: bytes of the file system."""
    title = f"{place.label}: space"
    text = f"{_size(free)} free of {_size(total)}"
    if not place.capacity:
        return warning(
            title, f"no capacity; {text}: the tier grows until the share is full, or its pages are too old",
            "set `capacity`, the same on all hosts, or leave it to the hosts that have one",
        )  # fmt: skip
    text = f"capacity {_size(place.capacity)}; {text}"
    if place.capacity > total:
        return error(title, text, f"lower `capacity` to {_size(total)} or less")
    return ok(title, text)


def direct_io(label: str, direct: DirectIo) -> Finding:
    title = f"{label}: direct I/O"
    if direct.works:
        return ok(title, f"O_DIRECT, alignment {direct.memory} bytes in memory and {direct.offset} in the file")
    return warning(title, f"none ({direct.reason}): pages go through the page cache, at more CPU", "nothing to do here")


def clock(label: str, ahead: float) -> Finding:
    """ahead: seconds that the share's clock is ahead of this host's."""
    title = f"{label}: clock"
    text = f"the share's is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this host's"
    if abs(ahead) > _SKEW_SECONDS:
        return warning(
            title, f"{text}: on Lustre, which stamps files with the hosts' time, segments go early", "chronyc makestep"
        )
    return ok(title, text if abs(ahead) > _NOTABLE_SECONDS else "the share's and this host's agree")


def _clock(directory: Path) -> float | None:
    probe = directory / f".probe-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        probe.write_bytes(b"")
        return probe.stat().st_mtime - time.time()
    except OSError:
        return None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _size(value: int) -> str:
    return ByteSize(value).human_readable()
