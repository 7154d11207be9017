"""Extents on a raw device: whose it is, where they lie, and that nothing of anybody else's is taken."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_backends.base import OptionError
from storage_backends.format import BLOCK, ExtentHeader, FormatError
from storage_backends.local.device import START, Device, Placement, device_of, is_device, usable_bytes
from storage_backends.local.extents import extent_path
from tests.devices import KINDS, blank_device

_SIZE = 32 << 20
_EXTENT = 4 << 20


@pytest.fixture(params=KINDS)
def raw(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with blank_device(request.param, tmp_path / "disk.img", _SIZE) as path:
        yield path


def _header(number: int, size: int = _EXTENT) -> ExtentHeader:
    slot = 64 << 10
    return ExtentHeader(100 + number, slot, size, (size - BLOCK) // slot, number, bytes(range(16)), 5)


def _folder(metadata: Path, number: int = 0) -> Path:
    folder = metadata / f"w{number}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_extents_keep_their_bytes_apart(raw: Path, tmp_path: Path) -> None:
    """Two processes fill the device; every extent reads back what was written to it, and the device is then full."""
    metadata = tmp_path / "meta"
    devices = [Device(raw, metadata), Device(raw, metadata)]
    assert devices[0].id == devices[1].id
    made = []
    for number in range((_SIZE - START) // _EXTENT):
        device, folder = devices[number % 2], _folder(metadata, number % 2)
        extent = device.create(folder, _header(number))
        with open(raw, "r+b") as plain:
            plain.seek(extent.offset(extent.header.slots - 1))
            plain.write(bytes([number + 1]) * BLOCK)
        made.append((folder, number))
        extent.doom()
    with pytest.raises(OSError, match="has no room") as full:
        devices[0].create(_folder(metadata), _header(100))
    assert full.value.errno == errno.ENOSPC
    fresh = Device(raw, metadata)
    for folder, number in made:
        extent = fresh.open(folder, number, write=False)
        with open(raw, "rb") as plain:
            plain.seek(extent.offset(extent.header.slots - 1))
            assert plain.read(BLOCK) == bytes([number + 1]) * BLOCK
        extent.doom()
    assert sum(fresh.disk_bytes(_folder(metadata, w)) for w in (0, 1)) == len(made) * _EXTENT
    fresh.delete(*made[0])
    fresh.create(_folder(metadata), _header(500)).doom()  # the room came back, for every process


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=40))
def test_places_never_overlap(steps: list[tuple[bool, int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("places")
    with blank_device("file", place / "disk.img", _SIZE) as path:
        device, folder = Device(path, place / "meta"), _folder(place / "meta")
        held: dict[int, tuple[int, int]] = {}
        for number, (make, blocks) in enumerate(steps):
            if make or not held:
                size = blocks * 16 * BLOCK + 2 * (64 << 10)
                try:
                    extent = device.create(folder, _header(number, size))
                except OSError:
                    edges = [START, *itertools.chain.from_iterable(sorted(held.values())), _SIZE]
                    assert all(
                        end - begin < size for begin, end in zip(edges[::2], edges[1::2], strict=True)
                    )  # no room indeed
                    continue
                held[number] = (extent.base, extent.base + size)
                extent.doom()
            else:
                gone = sorted(held)[blocks % len(held)]
                device.delete(folder, gone)
                del held[gone]
            spans = sorted(held.values())
            assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
            assert not spans or (spans[0][0] >= START and spans[-1][1] <= _SIZE)


def test_what_is_not_ours_is_refused(raw: Path, tmp_path: Path) -> None:
    with open(raw, "r+b") as file:
        file.seek(100_000)
        file.write(b"x")
    with pytest.raises(OptionError, match=r"is not blank.*dd if=/dev/zero"):
        Device(raw, tmp_path / "meta")
    with open(raw, "rb") as file:
        assert file.read(BLOCK) == bytes(BLOCK)
    with open(raw, "r+b") as file:
        file.seek(100_000)
        file.write(b"\0")
    assert Device(raw, tmp_path / "meta").id


def test_a_file_system_is_refused(raw: Path, tmp_path: Path) -> None:
    if subprocess.run(["mkfs.ext4", "-q", "-F", raw], capture_output=True).returncode:
        pytest.skip("no mkfs.ext4")
    with pytest.raises(OptionError, match="is not blank"):
        Device(raw, tmp_path / "meta")


def test_device_and_metadata_belong_together(tmp_path: Path) -> None:
    with blank_device("file", tmp_path / "a", _SIZE) as a, blank_device("file", tmp_path / "b", _SIZE) as b:
        one = Device(a, tmp_path / "meta-a")
        with pytest.raises(OptionError, match=r"belongs to a tier with its metadata in .*meta-a"):
            Device(a, tmp_path / "meta-b")
        with pytest.raises(OptionError, match=r"is not the device that .*meta-a is the metadata of"):
            Device(b, tmp_path / "meta-a")
        assert device_of(tmp_path / "meta-a") == a
        os.rename(a, tmp_path / "renamed")
        assert Device(tmp_path / "renamed", tmp_path / "meta-a").id == one.id
        assert device_of(tmp_path / "meta-a") == tmp_path / "renamed"


def test_a_damaged_superblock_is_refused(raw: Path, tmp_path: Path) -> None:
    Device(raw, tmp_path / "meta")
    with open(raw, "r+b") as file:
        file.seek(60)
        file.write(b"?")
    with pytest.raises(OptionError, match="superblock checksum"):
        Device(raw, tmp_path / "meta")


def test_an_extent_that_was_overwritten_is_noticed(raw: Path, tmp_path: Path) -> None:
    device, folder = Device(raw, tmp_path / "meta"), _folder(tmp_path / "meta")
    extent = device.create(folder, _header(3))
    device.open(folder, 3, write=True).doom()
    with open(raw, "r+b") as file:
        file.seek(extent.base + 20)
        file.write(b"????")
    with pytest.raises(FormatError, match="is not on the device any more"):
        device.open(folder, 3, write=True)


@given(data=st.binary(max_size=2 * BLOCK))
def test_a_placement_of_any_bytes_is_refused_or_right(data: bytes) -> None:
    with pytest.raises(FormatError):
        Placement.decode(data)
    whole = Placement(bytes(16), START, _EXTENT).encode()
    assert Placement.decode(whole) == Placement(bytes(16), START, _EXTENT)
    torn = whole[:512] + data[:512].ljust(512, b"\1") + whole[1024:]
    with pytest.raises(FormatError):
        Placement.decode(torn)


def test_half_made_placements_hold_no_room(tmp_path: Path) -> None:
    """A crash in the middle of making an extent."""
    with blank_device("file", tmp_path / "disk", _SIZE) as path:
        device, folder = Device(path, tmp_path / "meta"), _folder(tmp_path / "meta")
        first = device.create(folder, _header(0))
        with open(extent_path(folder, 0), "r+b") as file:
            file.truncate(BLOCK + 100)
        with pytest.raises(FormatError):
            device.open(folder, 0, write=True)
        assert Device(path, tmp_path / "meta").create(folder, _header(1)).base == first.base


def test_a_mounted_device_is_not_taken(tmp_path: Path) -> None:
    with blank_device("loop", tmp_path / "disk.img", _SIZE) as loop:
        holder = os.open(loop, os.O_RDWR | os.O_EXCL)  # as a mount holds it
        try:
            with pytest.raises(OptionError, match="is in use"):
                Device(loop, tmp_path / "meta")
        finally:
            os.close(holder)
        assert not (tmp_path / "meta" / "DEVICE").exists()
        assert Device(loop, tmp_path / "meta").id


def test_what_is_a_device(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(START + 5))
    assert is_device(file)
    assert not is_device(tmp_path)
    assert not is_device(tmp_path / "none")
    assert is_device(file / "below") is False
    assert usable_bytes(file) == 5
