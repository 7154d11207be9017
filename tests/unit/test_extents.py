"""Extents given another use: what is on the disk after each step, for the owner and for everybody else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from storage_backends.direct_io import DirectIo
from storage_backends.format import BLOCK, ExtentHeader, FormatError
from storage_backends.local import extents as extents_module
from storage_backends.local.device import START, Device
from storage_backends.local.extents import Extent, ExtentFiles, extent_numbers, retired_numbers

SIZE = BLOCK + 8 * 2 * BLOCK


@pytest.fixture
def files() -> ExtentFiles:
    return ExtentFiles(DirectIo(False, 1, 1))


def header(number: int, generation: int, namespace: bytes = b"a" * 16, slots: int = 8, slot: int = 2) -> ExtentHeader:
    return ExtentHeader(generation, slot * BLOCK, SIZE, slots, number, namespace, 1, b"{}")


def made(files: ExtentFiles, folder: Path) -> Extent:
    old = files.create(folder, header(3, 10))
    os.pwrite(old.fd, b"x" * BLOCK, old.offset(5))
    return old


def test_reuse_is_the_same_file_under_a_new_number(files: ExtentFiles, tmp_path: Path) -> None:
    old = made(files, tmp_path)
    inode = os.stat(old.path).st_ino
    new = files.reuse(tmp_path, old, header(4, 20, b"b" * 16, 4, 4))
    assert extent_numbers(tmp_path) == [4]
    assert os.stat(new.path).st_ino == inode == os.fstat(new.fd).st_ino
    assert files.header(tmp_path, 4) == new.header
    assert (old.fd, old.doomed, new.pins) == (-1, True, 0)
    assert new.serial != old.serial
    assert os.path.getsize(new.path) == SIZE


def test_stopped_at_any_step_it_is_the_old_extent_or_the_new_one_or_none(
    files: ExtentFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def torn(path: Path, new: ExtentHeader) -> None:
        raw = path.read_bytes()[:BLOCK]
        with open(path, "r+b") as file:
            file.write(new.encode()[:512] + raw[512:])
        raise OSError(5, "stopped")

    def stopped(*_: object) -> None:
        raise OSError(5, "stopped")

    def before(path: Path, new: ExtentHeader) -> None:
        raise OSError(5, "stopped")

    def seen(step: str, **patches: Callable[..., None]) -> ExtentHeader | None:
        folder = tmp_path / step
        folder.mkdir()
        old = made(files, folder)
        with monkeypatch.context() as patch:
            for name, value in patches.items():
                target = extents_module if name == "_write_header" else os
                patch.setattr(target, name, value)
            with pytest.raises(OSError, match="stopped"):
                files.reuse(folder, old, header(4, 20, b"b" * 16, 4, 4))
        (number,) = extent_numbers(folder)
        try:
            return files.header(folder, number)
        except FormatError:
            return None

    assert seen("before", _write_header=before) == header(3, 10)
    assert seen("torn", _write_header=torn) is None
    assert seen("between", rename=stopped) is None


def test_a_retired_extent_is_none_and_its_bytes_are_taken_until_it_is_deleted(
    files: ExtentFiles, tmp_path: Path
) -> None:
    made(files, tmp_path).doom()
    files.retire(tmp_path, 3)
    assert (extent_numbers(tmp_path), retired_numbers(tmp_path)) == ([], [3])
    assert files.disk_bytes(tmp_path) == SIZE
    with pytest.raises(FileNotFoundError):
        files.open(tmp_path, 3, write=False)
    files.delete(tmp_path, 3)
    assert files.disk_bytes(tmp_path) == 0
    assert os.listdir(tmp_path) == []
    files.delete(tmp_path, 3)


def test_on_a_device_reuse_keeps_the_place_and_retiring_does_not_free_it(tmp_path: Path) -> None:
    raw, folder = tmp_path / "raw", tmp_path / "meta" / "w0"
    with open(raw, "wb") as file:
        file.truncate(START + 3 * SIZE)
    device = Device(raw, tmp_path / "meta")
    folder.mkdir()
    first, second = device.create(folder, header(1, 10)), device.create(folder, header(2, 11))
    base = first.base
    again = device.reuse(folder, first, header(3, 20, b"b" * 16, 4, 4))
    assert again.base == base
    again.doom()
    for number, generation in ((3, 20), (2, 11)):
        opened = device.open(folder, number, write=False)
        assert opened.header.generation == generation
        opened.doom()
    second.doom()
    device.retire(folder, 2)
    assert device.disk_bytes(folder) == 2 * SIZE
    third = device.create(folder, header(4, 30))
    third.doom()
    assert third.base not in (base, second.base)
    device.delete(folder, 2)
    fourth = device.create(folder, header(5, 40))
    fourth.doom()
    assert fourth.base == second.base


def test_an_extent_in_use_is_not_given_away(files: ExtentFiles, tmp_path: Path) -> None:
    old = made(files, tmp_path)
    old.pins = 1
    with pytest.raises(AssertionError, match="in use"):
        files.reuse(tmp_path, old, header(4, 20))
