"""One memory tier of a configuration: whether there is room for it, and of which pages it would be.

Does not belong here: this process's own memory (memory.py), or taking any.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ByteSize

from hicache_ext.config import TierConfig
from hicache_ext.doctor.finding import Finding, error, ok, warning
from storage_backends.memory.region import (
    PRIVATE_HUGE,
    SHMEM_HUGE,
    Pages,
    Room,
    left,
    private_pages,
    reserved_bytes,
    shmem_pages,
)
from storage_backends.memory.sharers import living


@dataclass(frozen=True)
class Place:
    """A memory tier as configured. label: its name. region: empty where it is one process's alone."""

    label: str
    capacity: int
    region: str
    directory: Path


def places(chosen: TierConfig) -> list[Place]:
    """The tier, where it is one of memory."""
    from storage_backends.memory import MemoryBackend, MemoryOptions
    from storage_backends.registry import backend_class

    backend = backend_class(chosen.type)
    if not issubclass(backend, MemoryBackend):
        return []
    options = MemoryOptions.model_validate(chosen.options)
    return [Place(chosen.label, int(options.capacity), options.region, options.directory)]


def probe(place: Place) -> list[Finding]:
    processes = living(place.directory, place.region) if place.region else 0
    pages = shmem_pages() if place.region else private_pages()
    return judge(place, processes, reserved_bytes(), left(), pages)


def judge(place: Place, processes: int, reserved: int, room: Room, pages: Pages) -> list[Finding]:
    """processes: that have the region now. reserved: bytes of free hugetlb pages. pages: of other memory of
    this kind."""
    title, size = f"{place.label}: memory", ByteSize(place.capacity).human_readable()
    if processes:
        return [ok(title, f"region {place.region!r} is there, {processes} processes have it")]
    if reserved > place.capacity * 1.01:
        return [ok(title, f"{size} from reserved huge pages")]
    there = ByteSize(room.bytes).human_readable()
    if place.capacity > room.bytes:
        found = error(title, f"{size}, of which {room.of} has {there} left", f"lower `capacity` to less than {there}")
    else:
        found = ok(title, f"{size}, of which {room.of} has {there} left")
    if pages is Pages.TRANSPARENT:
        return [found, ok(f"{place.label}: huge pages", str(pages))]
    kind, way = ("shared", f"echo advise | sudo tee {SHMEM_HUGE}") if place.region else (
        "private", f"echo madvise | sudo tee {PRIVATE_HUGE}"
    )  # fmt: skip
    fix = f"{way} (or reserve: sudo sysctl vm.nr_hugepages={(place.capacity >> 21) + 32})"
    return [found, warning(f"{place.label}: huge pages", f"none for {kind} memory: {pages}, copies are slower", fix)]
