"""Extents given another use: what is on the disk after each step, for the owner and for everybody else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from storage_backends.format import BLOCK, ExtentHeader, FormatError
from storage_backends.local import extents as extents_module
from storage_backends.local.extents import Extent, ExtentFiles, extent_numbers
from storage_backends.local.files import DirectIo

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


def test_an_extent_in_use_is_not_given_away(files: ExtentFiles, tmp_path: Path) -> None:
    old = made(files, tmp_path)
    old.pins = 1
    with pytest.raises(AssertionError, match="in use"):
        files.reuse(tmp_path, old, header(4, 20))
