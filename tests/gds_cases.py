"""Cases of the gds tier, for pages in whatever memory a test takes for a device's.

Belongs here: what must be so on a GPU (gpu/test_gds.py) and over libraries that stand in for one (gds_worker.py). Does
not belong here: either kind of device memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from storage_backends.base import Backend, Dispatcher, Outcome
from storage_backends.format import SlotHeader
from storage_backends.gds import GdsBackend
from storage_backends.gds.slots import DeviceSlots
from storage_backends.local import LocalBackend
from tests.pages import HostPool, chain, namespace

OnDevice = Callable[[Any, int], Any]
"""Makes a HostPool whose pages lie on the device: (namespace, pages). Its `pull` brings `bytes` up to date."""

#: As they travel: in one piece, in two buffers that touch, of odd sizes, in many chunks.
LENGTHS = [(8192,), (8192, 8192), (70272,), (100_000, 4096), (9 << 20,)]


def cufile_mode() -> str:
    """Of the gds tier, where cuFile is to be used as well as it can be: past the CPU, else in compatibility mode."""
    stand_in = "direct" in os.environ.get("STAND_IN_CUFILE", "")
    return "auto" if stand_in or Path("/proc/driver/nvidia-fs").exists() else "compatibility"


def opened(folder: Path, kind: type[LocalBackend] = GdsBackend, **options: Any) -> Any:
    values = {"path": folder, "capacity": 256 << 20, **options}
    if kind is GdsBackend:
        values.setdefault("mode", cufile_mode())
    return kind(kind.Options.model_validate(values), Dispatcher())


def disk_of(backend: LocalBackend) -> Any:
    return backend._disks.in_use[0]


def place_of(backend: LocalBackend, space: Any, key: bytes) -> tuple[Path, int]:
    """File and offset of a page's slot."""
    page = backend._index.get(space.digest, key)
    assert page is not None
    extent = backend._tier.extent(page.folder, page.extent)
    assert extent is not None
    return extent.path, extent.offset(page.slot)


def flip(file: Path, at: int) -> None:
    with open(file, "r+b", buffering=0) as target:
        target.seek(at)
        byte = target.read(1)[0]
        target.seek(at)
        target.write(bytes([byte ^ 0x40]))
        os.fsync(target.fileno())


def read(backend: Any, pool: HostPool, keys: list[bytes]) -> list[Outcome]:
    """Every HIT holds what its identity asks for."""
    pool.poison()
    outcomes: list[Outcome] = backend.read(pool.batch(keys)).result(30)
    for page, outcome in enumerate(outcomes):
        assert outcome != Outcome.HIT or pool.right(page, keys[page]), "a wrong page was served"
    return outcomes


def filled(
    folder: Path, device: OnDevice, pages: int = 6, lengths: tuple[int, ...] = (8192, 8192), **options: Any
) -> Any:
    """Backend, namespace, keys that lie in it, a pool on the device."""
    space, keys = namespace(lengths), chain("one", pages)
    backend = opened(folder, **options)
    assert "device" in backend.capabilities.memory, backend.decision
    pool = device(space, pages)
    assert backend.write(pool.write_batch(keys)).result(30) == [Outcome.HIT] * pages
    return backend, space, keys, pool


def both_routes_read_what_either_wrote(folder: Path, device: OnDevice, **options: Any) -> GdsBackend:
    """Gives the tier, closed."""
    backend: GdsBackend = opened(folder, **options)
    assert "device" in backend.capabilities.memory, backend.decision
    for lengths in LENGTHS:
        space = namespace(lengths)
        ours, theirs = chain("by the device", 5), chain("by the host", 5)
        there, host = device(space, 5), HostPool(space, 5)
        assert backend.write(there.write_batch(ours)).result(30) == [Outcome.HIT] * 5
        assert backend.write(host.write_batch(theirs)).result(30) == [Outcome.HIT] * 5
        for keys in (ours, theirs):
            assert read(backend, there, keys) == read(backend, host, keys) == [Outcome.HIT] * 5
    backend.close()
    # A plain local tier over the same directory.
    plain = opened(folder, LocalBackend)
    for lengths in LENGTHS:
        space = namespace(lengths)
        pool = HostPool(space, 5)
        for name in ("by the device", "by the host"):
            assert read(plain, pool, chain(name, 5)) == [Outcome.HIT] * 5
    plain.close()
    return backend


def bytes_around_a_page_are_left_alone(folder: Path, device: OnDevice) -> None:
    backend = opened(folder)
    leaves_bytes_around_a_page_alone(backend, device)
    backend.close()


def leaves_bytes_around_a_page_alone(backend: Backend, device: OnDevice) -> None:
    """Of any tier that moves pages of a device."""
    keys, pool = chain("one", 2), device(namespace((70272,)), 3)
    assert backend.write(pool.write_batch(keys)).result(30) == [Outcome.HIT] * 2
    pool.poison()
    assert backend.read(pool.batch(keys, pages=[0, 2])).result(30) == [Outcome.HIT] * 2
    pool.pull()
    step = -(-70272 // 4096) * 4096
    assert (pool.bytes[step : 2 * step] == 0xEE).all(), "the page between was written to"
    assert (pool.bytes[70272:step] == 0xEE).all(), "bytes behind a page were written to"
    assert pool.right(0, keys[0])
    assert pool.right(2, keys[1])


def a_flipped_byte_is_never_served(folder: Path, device: OnDevice) -> None:
    backend, space, keys, pool = filled(folder, device, 8, (100_000, 4096))
    shape = disk_of(backend).io(pool.batch(keys)).shape
    places = [place_of(backend, space, key) for key in keys]
    payload = shape.header_bytes
    for number_, at in enumerate([payload, payload + 65535, payload + 65536, payload + 104_095, 64, 200]):
        flip(places[number_][0], places[number_][1] + at)
    wanted = [Outcome.CORRUPT] * 6 + [Outcome.HIT] * 2
    assert read(backend, pool, keys) == wanted
    assert read(backend, pool, keys) == [Outcome.MISS] * 6 + [Outcome.HIT] * 2, "it is quarantined"
    assert backend.write(pool.write_batch(keys)).result(30) == [Outcome.HIT] * 8
    assert read(backend, pool, keys) == [Outcome.HIT] * 8, "the next write heals it"
    assert backend.stats()["corrupt"] == 6
    # What lies behind the payload is nobody's.
    flip(places[7][0], places[7][1] + shape.header_bytes + shape.payload_bytes + 5)
    assert read(backend, pool, keys) == [Outcome.HIT] * 8
    backend.close()


def rewritten(folder: Path, device: OnDevice, when: str, what: str) -> list[Outcome]:
    """A slot gets another page (what: "page") or another generation of its own ("generation") in mid-read."""
    backend, space, keys, pool = filled(folder, device, 4)
    other = chain("another", 1)
    shape = disk_of(backend).io(pool.batch(keys)).shape
    assert backend.write(pool.write_batch(other)).result(30) == [Outcome.HIT]
    source, target = place_of(backend, space, other[0]), place_of(backend, space, keys[1])
    with open(source[0], "rb") as file:
        file.seek(source[1])
        slot = bytearray(file.read(shape.slot_bytes))
    if what == "generation":
        with open(target[0], "rb") as file:
            file.seek(target[1])
            slot = bytearray(file.read(shape.slot_bytes))
        header = SlotHeader.decode(slot[: shape.header_bytes])
        view = memoryview(slot)[: shape.header_bytes]
        replace(header, generation=header.generation + 99).encode_into(view)

    def rewrite() -> None:
        with open(target[0], "r+b", buffering=0) as file:
            file.seek(target[1])
            file.write(slot)
            os.fsync(file.fileno())

    payload = DeviceSlots.payload

    def with_a_writer(self: DeviceSlots, *arguments: Any) -> Any:
        if when == "before":
            rewrite()
        result = payload(self, *arguments)
        if when == "after":
            rewrite()
        return result

    DeviceSlots.payload = with_a_writer  # type: ignore[method-assign]
    try:
        outcomes = read(backend, pool, keys)
    finally:
        DeviceSlots.payload = payload  # type: ignore[method-assign]
    assert backend.stats().get("corrupt", 0) == 0, "a lost race is nobody's damage"
    backend.close()
    return outcomes


def a_slot_that_is_rewritten_in_mid_read_is_a_miss(folder: Path, device: OnDevice) -> None:
    wanted = [Outcome.HIT, Outcome.MISS, Outcome.HIT, Outcome.HIT]
    for when in ("before", "after"):
        for what in ("page", "generation"):
            assert rewritten(folder / f"{when}-{what}", device, when, what) == wanted, (when, what)


def without_the_second_look_at_the_header_it_would_be_served(folder: Path, device: OnDevice) -> None:
    """Negative control: what the test above sees is the second look's doing."""
    again = DeviceSlots._again
    DeviceSlots._again = lambda *_: None  # type: ignore[method-assign]
    try:
        assert rewritten(folder, device, "after", "page")[1] == Outcome.HIT
    finally:
        DeviceSlots._again = again  # type: ignore[method-assign]
