"""What a measurement ran on: without these facts its numbers mean nothing.

Belongs here: facts of hardware, kernel, file systems, memory and versions. Does not belong here: measuring.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from storage_backends import checksum

_PACKAGES = ("hicache-ext", "sglang", "torch", "numpy", "liburing", "crc32c")


def facts(folder: Path) -> dict[str, str | int | float]:
    """This machine, and the file system that holds `folder`."""
    cards = [_after(path, "Model") for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]
    return {
        "cpu": _after(Path("/proc/cpuinfo"), "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        **({"gpus": ", ".join(cards)} if cards else {}),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "file_system": file_system(folder),
        "python": platform.python_version(),
        "checksums": checksum.implementation(),
        **{name: found for name in _PACKAGES if (found := _version(name))},
    }


def file_system(folder: Path) -> str:
    """Type, device and options of the mount that holds `folder`."""
    resolved = str(folder.resolve())
    best, answer = "", "unknown"
    for line in _lines(Path("/proc/self/mounts")):
        device, mount, kind, options = line.split()[:4]
        mount = mount.encode().decode("unicode_escape")  # spaces are written as \040
        inside = resolved == mount or resolved.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):  # a later mount on the same place hides the earlier one
            best, answer = mount, f"{kind} on {device} ({options})"
    return answer


def page_kind(address: int) -> str:
    """Which pages back the memory at `address`: decides about half of what direct I/O costs."""
    inside = False
    for line in _lines(Path("/proc/self/smaps")):
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
            size_kib = (end - start) // 1024
        elif inside and first == "KernelPageSize:" and int(line.split()[1]) > 4:
            return f"{int(line.split()[1]) // 1024} MiB (hugetlb)"
        elif inside and first in ("AnonHugePages:", "ShmemPmdMapped:") and int(line.split()[1]) > size_kib // 2:
            return "2 MiB (transparent)"
    return "4 KiB"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _after(path: Path, key: str) -> str:
    return next((line.split(":", 1)[1].strip() for line in _lines(path) if line.startswith(key)), "")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
