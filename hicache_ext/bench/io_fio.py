"""fio as the yardstick: what the kernel gives to a program that does nothing but io_uring, on the same file system.

Belongs here: fio's command line, its JSON, what kind of pages its buffers lie in. Does not belong here: rows.

Direct I/O, registered buffers and files, sequential over one file, nothing measured beyond the total. fio has no
option for transparent huge pages; the C library has one for all large allocations of a process (glibc 2.35).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from hicache_ext.bench.io_rounds import Subject, Timing

INSTALL = "fio is not installed, its rows are left out. Fix: apt-get install -y fio"
_HUGE_MALLOC = "glibc.malloc.hugetlb=1"
_RW = {"first fill": "write", "overwrite": "write", "cold": "read", "mixed": "rw"}


class Fio(Subject):
    """One job on one file. Its CPU is what fio itself counts for the job."""

    name, engine = "fio", "io_uring"

    def __init__(
        self, folder: Path, block: int, depth: int, size: int, huge: bool, pages: str, mixed: bool = False
    ) -> None:
        """huge: buffers in huge pages. pages: what they really are (see `pages_of`). mixed: that case as well."""
        self.cases = (*Subject.cases, "mixed") if mixed else Subject.cases
        self._file = folder / "fio.data"
        folder.mkdir(parents=True, exist_ok=True)
        self.depth, self.bytes, self.pages = depth, size, pages
        self._block, self._huge = block, huge

    def before(self, case: str) -> None:
        if case == "first fill":
            self._file.unlink(missing_ok=True)

    def go(self, case: str) -> None:
        raise NotImplementedError("fio times itself")

    def timed(self, case: str) -> Timing:
        command = arguments(self._file, _RW[case], self._block, self.depth, self.bytes, self._huge)
        done = subprocess.run(command, env=_environment(self._huge), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"fio failed ({done.returncode}): {(done.stderr or done.stdout).strip()[-300:]}")
        return parse(done.stdout)

    def close(self) -> None:
        self._file.unlink(missing_ok=True)


def available() -> bool:
    return shutil.which("fio") is not None


def version() -> str:
    return subprocess.run(["fio", "--version"], capture_output=True, text=True, check=False).stdout.strip()


def arguments(file: Path, rw: str, block: int, depth: int, size: int, huge: bool) -> list[str]:
    # Percent signs and colons mean something to fio in a file name; a benchmark's folder has none.
    return [
        "fio", "--name=bench", f"--filename={file}", f"--rw={rw}", f"--bs={block}", f"--size={size}",
        f"--iodepth={depth}", "--ioengine=io_uring", "--direct=1", "--fixedbufs=1", "--registerfiles=1",
        "--gtod_reduce=1", "--scramble_buffers=0", "--fallocate=posix",
        f"--mem={'mmaphuge' if huge and _reserved_bytes() > 2 * depth * block else 'malloc'}",
        "--output-format=json",
    ]  # fmt: skip


def parse(text: str) -> Timing:
    """What fio's JSON says of its one job."""
    # Warnings may come before the JSON.
    job: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
    if job.get("error"):
        raise RuntimeError(f"fio reports error {job['error']}")
    moved = sum(job[way]["io_bytes"] for way in ("read", "write"))
    seconds = max(job[way]["runtime"] for way in ("read", "write")) / 1e3
    if not moved or not seconds:
        raise RuntimeError(f"fio moved {moved} bytes in {seconds} s: too little to measure")
    return Timing(seconds, (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3, moved)


def pages_of(folder: Path, huge: bool) -> str:
    """What fio's buffers lie in on this machine, seen while it runs: "huge" or "4k"."""
    file = folder / "fio.probe"
    folder.mkdir(parents=True, exist_ok=True)
    command = [*arguments(file, "read", 2 << 20, 8, 32 << 20, huge), "--time_based", "--runtime=1"]
    job = subprocess.Popen(command, env=_environment(huge), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen = "4k"
    while job.poll() is None and seen == "4k":
        time.sleep(0.05)
        if any(_huge_bytes(pid) >= 8 << 20 for pid in _children(job.pid)):
            seen = "huge"
    job.wait()
    file.unlink(missing_ok=True)
    return seen


def _environment(huge: bool) -> dict[str, str]:
    return {**os.environ, "GLIBC_TUNABLES": _HUGE_MALLOC} if huge else dict(os.environ)


def _reserved_bytes() -> int:
    """Free memory in the machine's reserved huge pages."""
    found = {line.split(":")[0]: line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines()}
    return int(found.get("HugePages_Free", 0)) * int(found.get("Hugepagesize", 0)) * 1024


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _huge_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    kinds = ("AnonHugePages:", "Private_Hugetlb:")
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kinds))
