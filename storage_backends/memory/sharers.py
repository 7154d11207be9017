"""The processes that share a region: how one finds the others, gets the memory from them, and who of them lives.

    directory/region/   lock        byte 0 is held while somebody joins, byte k for as long as process number k lives
                        <k>.sock    process k hands the memory to whoever of the same user connects

Every process of a region holds its memfd and hands it on, so the region lives as long as any of them, the first one
or not. Locks belong to open file descriptions and go with their process, however it ends.

Belongs here: joining and leaving. Does not belong here: the memory (region.py), or what lies in it (csrc/memory).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import stat
import struct
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from storage_backends.base import OptionError
from storage_backends.memory.region import Pages, SharedMemory

logger = logging.getLogger(__name__)

#: Seconds until somebody who joins, or who is asked for the memory, is given up: it is stopped, or its machine is.
_PATIENCE = 3.0
_PAUSE = 0.02
_MOST = 1024
_LONGEST = 100
_SMALL = 64
_open: weakref.WeakSet[Sharers] = weakref.WeakSet()


class Sharers:
    """This process among those of one region, from joining on.

    number: this process's own, 1 or more. fd: the lock file, whose bytes tell who lives. memory: the region's.
    first: this process made the memory, and nothing is in it.
    """

    def __init__(
        self, directory: Path, name: str, make: Callable[[], SharedMemory], prepare: Callable[[SharedMemory], None]
    ) -> None:
        """make: makes the memory if nobody has it; prepare: makes a region of new memory, before anybody can see it.

        OptionError where the directory is not ours alone; ConnectionError where others have it and do not answer.
        """
        self._folder = directory / name
        _own_folder(directory)
        _own_folder(self._folder)
        self.fd = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._socket: socket.socket | None = None
        _open.add(self)
        try:
            self._join(make, prepare)
        except BaseException:
            self.close()
            raise

    def _join(self, make: Callable[[], SharedMemory], prepare: Callable[[SharedMemory], None]) -> None:
        until = time.monotonic() + _PATIENCE
        while not _try_lock(self.fd, 0):
            if time.monotonic() > until:
                raise ConnectionError(f"{self._folder}: another process is joining and does not get on")
            time.sleep(_PAUSE)
        try:
            found = self._ask(until)
            self.first = found is None
            self.memory = make() if found is None else found
            if found is None:
                prepare(self.memory)
            self.number = next((k for k in range(1, _MOST) if _try_lock(self.fd, k)), 0)
            if not self.number:
                raise ConnectionError(f"{self._folder}: {_MOST - 1} processes have it already")
            self._listen()
        finally:
            _unlock(self.fd, 0)

    def alive(self) -> list[int]:
        """Numbers of the other processes that live."""
        return [k for path in self._folder.glob("*.sock") if (k := _number(path)) and _is_locked(self.fd, k)]

    def _ask(self, until: float) -> SharedMemory | None:
        """The memory, from whoever has it; None where nobody has."""
        while others := self.alive():
            for number in others:
                with contextlib.suppress(OSError):
                    return self._fetch(number)
            if time.monotonic() > until:
                raise ConnectionError(f"{self._folder}: processes {others} have it and do not answer")
            time.sleep(_PAUSE)
        return None

    def _fetch(self, number: int) -> SharedMemory:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_PATIENCE / 3)
            connection.connect(str(self._folder / f"{number}.sock"))
            if _user_of(connection) != os.geteuid():
                raise PermissionError("another user's")
            said, fds, _, _ = socket.recv_fds(connection, _SMALL, 1)
        if not fds:
            raise ConnectionError("no memory came")
        os.set_inheritable(fds[0], False)
        try:
            memory = SharedMemory(fds[0], Pages(said.decode()))
            if not memory.sealed:
                raise ConnectionError("memory that may be cut short")
        except (ValueError, OSError):
            os.close(fds[0])
            raise
        return memory

    def _listen(self) -> None:
        path = self._folder / f"{self.number}.sock"
        path.unlink(missing_ok=True)  # of a process that died
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        path.chmod(0o600)
        self._socket.listen(16)
        threading.Thread(target=_serve, args=(self._socket, self.memory), name="hicache-memory", daemon=True).start()

    def close(self) -> None:
        """Leave. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd < 0:
            return
        if self._socket is not None:
            (self._folder / f"{self.number}.sock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
            _unlock(fd, self.number)  # others may hold the description
        os.close(fd)
        _open.discard(self)

    def let_go(self) -> None:
        """In a forked child: what is the parent's stays the parent's alone."""
        for fd in (self.fd, -1 if self._socket is None else self._socket.fileno()):
            if fd >= 0:
                os.close(fd)
        self.fd = -1
        if self._socket is not None:
            self._socket.detach()
            self._socket = None


def living(directory: Path, name: str) -> int:
    """How many processes have the region. Changes nothing."""
    folder = directory / name
    try:
        fd = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        return sum(_is_locked(fd, k) for path in folder.glob("*.sock") if (k := _number(path)))
    finally:
        os.close(fd)


def _let_go_of_all() -> None:
    for sharers in list(_open):
        with contextlib.suppress(OSError):
            sharers.let_go()
    _open.clear()


os.register_at_fork(after_in_child=_let_go_of_all)


def _serve(listening: socket.socket, memory: SharedMemory) -> None:
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            if listening.fileno() < 0 or not _listens(listening):
                return
            time.sleep(_PAUSE)  # no descriptor left, for now
            continue
        with connection, contextlib.suppress(OSError, ValueError):
            if _user_of(connection) == os.geteuid() and memory.fd >= 0:
                connection.settimeout(_PATIENCE)
                socket.send_fds(connection, [str(memory.pages).encode()], [memory.fd])


def _listens(listening: socket.socket) -> bool:
    try:
        return bool(listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False


def _user_of(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1]


def _own_folder(path: Path) -> None:
    fix = "remove it, or set `directory` to a folder of this user's own"
    if len(str(path)) > _LONGEST:
        raise OptionError("directory", str(path), f"has more than {_LONGEST} letters", "name a shorter one")
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise OptionError("directory", str(path), f"cannot be made: {error.strerror}", fix) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise OptionError("directory", str(path), "is not a folder that this user alone may enter (mode 0700)", fix)


def _number(path: Path) -> int:
    return int(path.stem) if path.stem.isdigit() else 0


def _try_lock(fd: int, byte: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _range(fcntl.F_WRLCK, byte))
    except BlockingIOError:
        return False
    return True


def _unlock(fd: int, byte: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _range(fcntl.F_UNLCK, byte))


def _is_locked(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _range(fcntl.F_WRLCK, byte))
    return struct.unpack_from("@h", answer)[0] != fcntl.F_UNLCK


def _range(kind: int, byte: int) -> bytes:
    """struct flock over one byte; its process id must be 0 for this kind of lock."""
    return struct.pack("@hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)
