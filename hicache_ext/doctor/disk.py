"""What lies below a path: the mount, its file system, and the kind of disk.

Belongs here: reading mountinfo and /sys. Does not belong here: whether a tier fits on it (tier.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hicache_ext.doctor.finding import Finding, ok, warning

_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}
REMOTE = {"nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "9p", "virtiofs", "glusterfs", "beegfs", "gpfs", "wekafs"}
_COPY_ON_WRITE = {"btrfs", "zfs", "bcachefs"}
_BY_NAME = (
    ("nvme", "NVMe"), ("vd", "virtio"), ("xvd", "Xen"), ("sd", "SCSI or SATA"), ("dm-", "device mapper"),
    ("md", "software RAID"), ("zram", "memory (zram)"), ("ram", "memory"), ("loop", "loop device"),
    ("nbd", "network block device"), ("rbd", "network block device"), ("mmcblk", "flash card"),
)  # fmt: skip


@dataclass(frozen=True)
class Mount:
    point: str
    kind: str
    source: str
    options: str = ""


def mount_of(path: str, table: str) -> Mount:
    """The mount that holds an absolute, resolved path. table: /proc/self/mountinfo."""
    best = Mount("", "unknown", "unknown")
    for line in table.splitlines():
        fields, _, rest = line.partition(" - ")
        parts, after = fields.split(), rest.split()
        if len(parts) < 5 or len(after) < 2:
            continue
        point = parts[4].encode().decode("unicode_escape")  # a space is written as \040
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best.point):  # a later mount on the same place hides the earlier one
            best = Mount(point, *after[:3])
    return best


def block_device(device: int, sys: Path = Path("/sys")) -> tuple[str, bool]:
    """(name, whether it says that it rotates) of the disk with this device number; ("", False) where it has none."""
    link = sys / "dev" / "block" / f"{os.major(device)}:{os.minor(device)}"
    try:
        place = link.resolve(strict=True)
        if (place / "partition").exists():
            place = place.parent
        rotates = (place / "queue" / "rotational").read_text().strip() == "1"
    except OSError:
        return "", False
    return place.name, rotates


def judge(title: str, mount: Mount, name: str, rotates: bool) -> Finding:
    """name: the block device's, "" where there is none."""
    disk = next((kind for start, kind in _BY_NAME if name.startswith(start)), "disk") if name else ""
    text = f"{mount.kind} on {name or mount.source}" + (f", {disk}" if disk else "")
    base = mount.kind.partition(".")[0]
    if base in _MEMORY or disk.startswith("memory"):
        return warning(
            title, f"{text}: memory, not a disk; gone at the next boot, and taken from what the host pool could have",
            "set the tier's `path` to a folder on an NVMe disk",
        )  # fmt: skip
    if base in REMOTE or base == "fuse":
        return warning(
            title, f"{text}: not a disk of this machine; locks and reserved space may not hold there",
            "set the tier's `path` to a folder on a local disk",
        )  # fmt: skip
    if base == "overlay":
        return warning(
            title, f"{text}: the container's own layer, which goes with the container",
            "mount a folder of the host there (docker run -v /nvme/hicache-ext:PATH)",
        )  # fmt: skip
    if base in _COPY_ON_WRITE:
        return warning(
            title, f"{text}: copies on write, so overwriting slots fragments them",
            "use ext4 or xfs (btrfs: chattr +C on the empty folder)",
        )  # fmt: skip
    if rotates and disk not in ("virtio", "Xen", "loop device"):  # these say so of whatever lies below
        return warning(
            title, f"{text}, rotating: loading a page may take longer than computing it",
            "set the tier's `path` to a folder on an NVMe disk",
        )  # fmt: skip
    return ok(title, text)


def probe(title: str, path: Path) -> Finding:
    """For an existing path."""
    mount = mount_of(str(path.resolve()), mountinfo())
    device = os.stat(path).st_dev
    if not os.major(device) and mount.source.startswith("/dev/"):  # btrfs and its like number their volumes themselves
        try:
            device = os.stat(mount.source).st_rdev
        except OSError:
            pass
    return judge(title, mount, *block_device(device))


def mountinfo() -> str:
    """/proc/self/mountinfo, empty where it cannot be read."""
    try:
        return Path("/proc/self/mountinfo").read_text(errors="replace")
    except OSError:
        return ""
