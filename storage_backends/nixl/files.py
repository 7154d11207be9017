"""Pages as files, for the plugins that move files: one file a page, whole or not there.

Belongs here: names, opening, publishing, removing. Does not belong here: moving bytes (agent.py, backend.py), or how
much may lie there (room.py).

    PATH/prefix/version/namespace/xx/key.page    a page: the object of object.py with a header of whole 4 KiB, padded
                                                 to 4 KiB. xx: the key's first byte
    PATH/prefix/tmp/random.page                  on its way; gets the page's name when all of it is written

A file is written under another name, with its room taken first, so that a disk that is full says so before anything
moves, and a reader meets whole files only. That is a courtesy: what counts is that a page's checksums are right.

Where a page has to go for another one of its size, its file becomes that one's: to make a file and find its blocks
costs as much as to write them, or more. Whoever reads the old page meanwhile may meet the new one in its file: what he
read fails its checksums, and the file's times tell that it has changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from storage_backends.direct_io import probe_direct
from storage_backends.nixl.room import Room, Taken
from storage_backends.object_backend import Unreachable

BLOCK = 4096
SUFFIX = ".page"
#: What is younger was used lately enough: a page's time is set at most this often. Seconds.
_USED_SECONDS = 60.0
#: What is on its way for longer belongs to a process that died.
_LEFT_SECONDS = 3600.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_Made = TypeVar("_Made")
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


class Full(Exception):
    """There is no room for the page."""


class PageFile:
    """An open file: of a page that is read, or of one that is on its way to its name (`NewFile`)."""

    name = ""  # NIXL knows it by its device

    def __init__(self, fd: int, path: str = "") -> None:
        """path: the page's own, where it is read."""
        self.device, self._read_from = fd, path
        self._was = os.fstat(fd).st_mtime_ns if path else 0

    def changed(self) -> bool:
        """Whether the file of a page that is read has become another one's, or was written to, since it was opened."""
        now = os.fstat(self.device)
        if now.st_mtime_ns != self._was:
            return True
        try:
            return os.stat(self._read_from).st_ino != now.st_ino
        except OSError:
            return True

    def publish(self, replace: bool) -> bool:
        """Give it the page's name. False: there is a page of that name, and it was not to be replaced."""
        raise NotImplementedError

    def abandon(self) -> None:
        """What is on its way gets no name: it is gone before anybody hears that the page was not stored."""

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a share that is gone; it is closed all the same
            os.close(self.device)


class NewFile(PageFile):
    """A file of `size` bytes under a name of its own, whose room is taken; given back unless it is published."""

    def __init__(self, fd: int, temporary: str, path: str, size: int, room: Room) -> None:
        super().__init__(fd)
        self._temporary, self._path, self._size, self._room = temporary, path, size, room
        self._published = False
        self._named = False  # whether the temporary name is gone

    def publish(self, replace: bool) -> bool:
        self._published = self._link() if not replace else self._rename()
        return self._published

    def abandon(self) -> None:
        if not self._named:
            self._named = True
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)

    def close(self) -> None:
        super().close()
        self.abandon()
        if not self._published:
            self._room.give(self._size)

    def _link(self) -> bool:
        try:
            _in_its_folder(lambda: _rename_if_free(self._temporary, self._path), self._path)
            self._named = True
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        try:
            _in_its_folder(lambda: os.link(self._temporary, self._path), self._path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            return self._rename()  # a file system without links
        return True

    def _rename(self) -> bool:
        _in_its_folder(lambda: os.replace(self._temporary, self._path), self._path)
        self._named = True
        return True


class Files:
    """root: exists from here on. Raises OSError where it cannot be made. prefix: what all names begin with."""

    kind = "FILE"
    step = pad = BLOCK

    def __init__(self, root: Path, prefix: str, room: Room) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root, self._room = root, room
        self._tmp = root / prefix / "tmp"
        self.direct = probe_direct(root)
        self._flags = os.O_CLOEXEC | (os.O_DIRECT if self.direct.works else 0)
        with contextlib.suppress(OSError):
            for old in os.scandir(self._tmp):
                if time.time() - old.stat().st_mtime > _LEFT_SECONDS:
                    os.unlink(old.path)

    def sizes(self, names: list[str]) -> list[int]:
        self.ready()
        return [_size(self._path(name)) for name in names]

    def open(self, name: str, size: int) -> PageFile | int:
        """A page's file to read, of `size` bytes; else the size that it has, -1: there is none."""
        path = self._path(name)
        try:
            fd = os.open(path, os.O_RDONLY | self._flags)
        except FileNotFoundError:
            return -1
        found = os.fstat(fd)
        if found.st_size != size:
            os.close(fd)
            return found.st_size
        if time.time() - found.st_mtime > _USED_SECONDS:
            with contextlib.suppress(OSError):  # a share that is mounted for reading only
                os.utime(fd)
        return PageFile(fd, path)

    def create(self, name: str, size: int) -> NewFile:
        """A file for a page, `size` bytes long, new or of a page that had to go. Raises Full, OSError."""
        temporary = f"{self._tmp}/{os.urandom(12).hex()}{SUFFIX}"
        taken = self._room.take(size, temporary)
        if taken is Taken.NOTHING:
            raise Full
        try:
            fd = self._reuse(temporary, size) if taken is Taken.FILE else self._make(temporary, size)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            self._room.give(size)
            if isinstance(error, OSError) and error.errno in _FULL:
                raise Full from None
            raise
        finally:
            self._room.made(size)
        return NewFile(fd, temporary, self._path(name), size, self._room)

    def full(self, size: int) -> bool:
        """Whether the disk, not the capacity, has no room for a file of this size."""
        with contextlib.suppress(OSError):
            there = os.statvfs(self._root)
            return there.f_bavail * there.f_frsize < size
        return False

    def touch(self, names: list[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):
                os.utime(self._path(name))

    def delete(self, names: list[str]) -> list[bool]:
        return [self._room.remove(self._path(name)) for name in names]

    def clear_start(self, start: str) -> None:
        """Remove a namespace: at once for everybody who looks, then the files."""
        self.ready()
        self._tmp.mkdir(parents=True, exist_ok=True)
        aside = self._tmp / f"cleared.{os.urandom(6).hex()}"
        try:
            os.rename(self._root / start, aside)
        except FileNotFoundError:
            return
        shutil.rmtree(aside, ignore_errors=True)
        self._room.look()

    def close(self) -> None:
        self._room.close()

    def _reuse(self, temporary: str, size: int) -> int:
        try:
            fd = os.open(temporary, os.O_RDWR | self._flags)
        except PermissionError:  # another user's, who let us remove it
            os.unlink(temporary)
            return self._make(temporary, size)
        if os.fstat(fd).st_size != size:  # somebody changed it since it was counted
            os.ftruncate(fd, size)
        return fd

    def _make(self, temporary: str, size: int) -> int:
        opening = os.O_RDWR | os.O_CREAT | os.O_EXCL | self._flags
        fd = _in_its_folder(lambda: os.open(temporary, opening, 0o644), temporary)
        try:
            _allocate(fd, size)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _path(self, name: str) -> str:
        folder, _, key = name.rpartition("/")
        return f"{self._root}/{folder}/{key[:2]}/{key}{SUFFIX}"

    def ready(self) -> None:
        """Before pages are stored. Unreachable where the directory itself is gone: an unmounted disk's pages must not
        fill the one below."""
        if not self._root.is_dir():
            raise Unreachable(f"{self._root} is not there")


def _allocate(fd: int, size: int) -> None:
    """Room on the disk for the whole file. Raises OSError."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        there = os.fstatvfs(fd)  # a file system that cannot: a share, say
        if there.f_bavail * there.f_frsize < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None


def _rename_if_free(old: str, new: str) -> None:
    """FileExistsError where there is a file of that name. OSError (EINVAL, ENOSYS) where that cannot be asked for."""
    if _renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if _renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _RENAME_NOREPLACE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), new)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return -1


def _in_its_folder(call: Callable[[], _Made], path: str) -> _Made:
    """Call; once more where the folder of `path` was missing."""
    try:
        return call()
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return call()
