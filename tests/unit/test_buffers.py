"""Owned memory: aligned, prefaulted, huge where the machine has it, and not a forked child's."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage_backends.buffers import HUGE_PAGE, BufferPool, OwnedMemory
from storage_backends.mooncake.memory import shared_regions


def smaps(address: int) -> dict[str, int]:
    """The kernel's numbers (kB) of the mapping that holds `address`."""
    values: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            inside = start <= address < end
        elif inside and line.endswith("kB"):
            values[head[:-1]] = int(line.split()[1])
    return values


@pytest.mark.parametrize("size", [4096, 100_000, HUGE_PAGE, 5 * HUGE_PAGE + 4096])
def test_alignment_and_use(size: int) -> None:
    memory = OwnedMemory(size)
    assert memory.address % (HUGE_PAGE if size >= HUGE_PAGE else 4096) == 0
    assert len(memory.view) == size
    assert bytes(memory.view[:16]) == bytes(16)
    memory.view[-1] = 7
    assert ctypes.c_ubyte.from_address(memory.address + size - 1).value == 7
    assert memory.map[memory.offset + size - 1] == 7
    memory.close()


def test_it_is_prefaulted_and_huge_if_the_machine_allows() -> None:
    memory = OwnedMemory(16 * HUGE_PAGE)
    numbers = smaps(memory.address)
    resident = numbers.get("Rss", 0) + numbers.get("Private_Hugetlb", 0)
    assert resident >= 16 * 2048
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if memory.kind == "transparent huge pages" and modes.exists() and "[never]" not in modes.read_text():
        assert numbers["AnonHugePages"] > 0


def test_a_forked_child_does_not_get_what_is_not_for_it() -> None:
    memory = OwnedMemory(HUGE_PAGE, not_in_children=True)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        ctypes.c_ubyte.from_address(memory.address).value = 1
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGSEGV


def test_a_pool_lends_each_buffer_once() -> None:
    pool = BufferPool(4096, 3)
    taken = [pool.take() for _ in range(3)]
    assert len(set(taken)) == 3
    assert pool.take(0.01) is None
    assert taken[0] is not None
    pool.give(taken[0])
    assert pool.take(0.01) == taken[0]


def test_shared_memory_is_seen_by_another_process() -> None:
    memory = OwnedMemory(4 << 20, shared=True)
    assert memory.address % HUGE_PAGE == 0
    (region,) = shared_regions(memory.address, memory.size)
    assert region.address <= memory.address
    assert region.address + region.length >= memory.address + memory.size
    program = (
        "import mmap, sys; fd, length, offset, at = map(int, sys.argv[1:]);"
        "m = mmap.mmap(fd, length, mmap.MAP_SHARED, offset=offset); assert m[at] == 7; m[at] = 8"
    )
    memory.view[5] = 7
    words = [region.fd, region.length, region.offset, memory.address + 5 - region.address]
    subprocess.run([sys.executable, "-c", program, *map(str, words)], pass_fds=[region.fd], check=True)
    assert memory.view[5] == 8
    os.close(region.fd)
    assert shared_regions(OwnedMemory(4 << 20).address, 4 << 20) == [], "private memory is nobody else's"
