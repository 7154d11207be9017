"""Memory limits and page sizes: what decides about half of the CPU cost of direct I/O.

Does not belong here: allocating for use (storage_backends.buffers).
"""

from __future__ import annotations

import re
import resource
from pathlib import Path

from hicache_ext.bench.machine import page_kind
from hicache_ext.doctor.finding import Finding, ok, warning
from storage_backends.buffers import OwnedMemory

_CAP_IPC_LOCK = 14
_ENOUGH_MEMLOCK = 1 << 30
_TRY_BYTES = 16 << 20
_THP = "/sys/kernel/mm/transparent_hugepage/enabled"


def memlock(limit: int, exempt: bool) -> Finding:
    """limit: RLIMIT_MEMLOCK in bytes, -1 for none. exempt: whether this process has CAP_IPC_LOCK."""
    said = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit >> 10} KiB"
    if exempt:
        return ok("memlock", f"{said}; does not count, this process has CAP_IPC_LOCK")
    if limit == resource.RLIM_INFINITY or limit >= _ENOUGH_MEMLOCK:
        return ok("memlock", said)
    return warning(
        "memlock", f"{said}: buffers cannot be registered with io_uring, which costs CPU",
        "ulimit -l unlimited (docker run --ulimit memlock=-1; systemd: LimitMEMLOCK=infinity)",
    )  # fmt: skip


def huge_pages(meminfo: str, mode: str, got: str) -> list[Finding]:
    """meminfo: /proc/meminfo. mode: the kernel's line on transparent huge pages, "" for none. got: pages of a trial."""
    numbers = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+)", meminfo, re.MULTILINE)}
    total, free = numbers.get("HugePages_Total", 0), numbers.get("HugePages_Free", 0)
    reserved = f"{free} of {total} free, {numbers.get('Hugepagesize', 0) >> 10} MiB each" if total else "none reserved"
    chosen = re.search(r"\[(\w+)\]", mode)
    setting = chosen.group(1) if chosen else "not in this kernel"
    findings = [ok("huge pages, hugetlb", reserved)]
    text = f"{setting}; a trial of {_TRY_BYTES >> 20} MiB got {got} pages"
    if setting in ("always", "madvise") and got != "4 KiB":
        findings.append(ok("huge pages, transparent", text))
    elif setting in ("always", "madvise"):
        # Memory is fragmented, or a limit is in the way: more may come later.
        fix = "echo 1 | sudo tee /proc/sys/vm/compact_memory"
        findings.append(warning("huge pages, transparent", text + ": I/O costs about twice the CPU", fix))
    else:
        fix = f"echo madvise | sudo tee {_THP}"
        findings.append(warning("huge pages, transparent", text + ": I/O costs about twice the CPU", fix))
    return findings


def probe() -> list[Finding]:
    trial = OwnedMemory(_TRY_BYTES)
    return [
        memlock(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], _has_capability(_CAP_IPC_LOCK)),
        *huge_pages(_read("/proc/meminfo"), _read(_THP), page_kind(trial.address)),
    ]


def _has_capability(number: int) -> bool:
    effective = re.search(r"^CapEff:\s+([0-9a-f]+)", _read("/proc/self/status"), re.MULTILINE)
    return bool(effective and int(effective.group(1), 16) >> number & 1)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
