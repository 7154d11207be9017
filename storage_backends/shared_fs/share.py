"""The share as this process meets it: whether it is there, answers, does direct I/O, and what time it has.

Belongs here: facts about the mount, decided once or kept up to date. Does not belong here: segments, or where they lie.

The share's time is what it stamps on a file that is written there, so hosts whose clocks differ agree on the age of a
file. (Lustre stamps files with the time of the client that writes: there ages are as wrong as the clocks, which is why
nothing younger than an hour is ever removed for its age.)
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage_backends.direct_io import DirectIo, alignment
from storage_backends.shared_fs.directory import CLOCK, VERSION_DIRECTORY

#: What a file says that another host has removed.
GONE = (errno.ENOENT, errno.ESTALE)
_BUFFERED = DirectIo(False, 1, 1)
FILE_MODE = 0o660
_DIRECTORY_MODE = 0o770


class Share:
    """path, mount: as configured. direct: None until the first file is open. timeout: seconds that a call may take.

    Nothing here is called on a caller's thread but `stuck`, `away` and `now_ns`: the others ask the share.
    """

    def __init__(self, path: Path, mount: Path | None, direct: bool, timeout: float) -> None:
        self.path, self.root = path, path / VERSION_DIRECTORY
        self.direct = None if direct else _BUFFERED
        self.problem = "has not answered yet"
        self.timeout = timeout
        self._mount = mount
        self._ahead_ns = time.time_ns() - time.monotonic_ns()
        self._calls: dict[object, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around whatever may hang with the share."""
        token = object()
        self._calls[token] = time.monotonic()
        try:
            yield
        finally:
            del self._calls[token]

    def stuck(self) -> float:
        """Seconds that the oldest call has been waiting."""
        began = min(list(self._calls.values()), default=None)
        return 0.0 if began is None else time.monotonic() - began

    @property
    def away(self) -> bool:
        """Whether a call has been waiting for too long. It ends by itself when the share answers."""
        return self.stuck() > self.timeout

    @property
    def state(self) -> str:
        return "does not answer" if self.away else self.problem or "ok"

    def now_ns(self) -> int:
        """The share's time, ns since 1970; this host's until the share has said it once."""
        return time.monotonic_ns() + self._ahead_ns

    def learn_time(self, stamp_ns: int) -> None:
        """stamp_ns: what the share has just stamped on a file."""
        self._ahead_ns = stamp_ns - time.monotonic_ns()

    def prepare(self) -> None:
        """Look whether the share can be used, make what is missing, ask for its time. OSError when it cannot be used.

        A share that is read-only can be used.
        """
        try:
            with self.call():
                self.check_mounted()
                try:
                    self.make_directory(self.root)
                except OSError:
                    if not self.root.is_dir():
                        raise
                self._ask_time()
        except OSError as error:
            self.problem = f"{error.strerror or error}: {error.filename or self.path}"
            raise
        self.problem = ""

    def listed(self, *parts: str) -> list[str]:
        """Names in a directory below PATH/v1; none where there is none. OSError otherwise."""
        with self.call():
            try:
                return os.listdir(self.root.joinpath(*parts))
            except OSError as error:
                if error.errno not in GONE:
                    raise
                return []

    def status(self, path: str) -> os.stat_result | None:
        """Of a file below PATH/v1; None where there is none. OSError otherwise."""
        with self.call():
            try:
                return os.stat(self.root / path)
            except OSError as error:
                if error.errno not in GONE:
                    raise
                return None

    def unlink(self, path: str) -> bool:
        """Remove a file below PATH/v1; whether it was there. OSError when it cannot be removed."""
        with self.call():
            try:
                os.unlink(self.root / path)
            except OSError as error:
                if error.errno not in GONE:
                    raise
                return False
        return True

    def remove_empty(self, *parts: str) -> None:
        """Remove a directory below PATH/v1 if there is nothing in it."""
        with self.call():
            try:
                os.rmdir(self.root.joinpath(*parts))
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, *GONE):
                    raise

    def touch(self, path: str) -> None:
        """Mark a file as used, at the share's time. Nobody's loss when that cannot be."""
        with self.call():
            try:
                os.utime(path)
            except OSError:
                pass

    def check_mounted(self) -> None:
        """OSError when the mount point has nothing mounted on it."""
        if self._mount is not None and not os.path.ismount(self._mount):
            raise OSError(errno.ENODEV, "nothing is mounted", str(self._mount))

    def make_directory(self, directory: Path) -> None:
        """With all its parents on the share, but nothing above `path`: that is an empty mount point, or a mistake."""
        missing = [directory]
        while missing[-1] != self.path:
            missing.append(missing[-1].parent)
        for each in reversed(missing):
            try:
                os.mkdir(each, _DIRECTORY_MODE)
            except FileExistsError:
                continue
            except PermissionError:
                if not each.is_dir():
                    raise

    def open(self, path: str, flags: int) -> int:
        """A descriptor, for direct I/O where that works; found out with the first file. OSError as open raises it."""
        with self.call():
            return self._opened(path, flags | os.O_CLOEXEC)

    def _opened(self, path: str, flags: int) -> int:
        direct = self.direct
        if direct is None:
            with self._lock:
                if self.direct is None:
                    return self._open_first(path, flags)
            direct = self.direct
        return os.open(path, flags | (os.O_DIRECT if direct.works else 0), FILE_MODE)

    def _open_first(self, path: str, flags: int) -> int:
        try:
            fd = os.open(path, flags | os.O_DIRECT, FILE_MODE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            if flags & os.O_EXCL:  # some file systems refuse after they made the file
                flags &= ~os.O_EXCL
            fd = os.open(path, flags, FILE_MODE)
            self.direct = _BUFFERED
            return fd
        found = alignment(fd)
        if not found.works:
            os.close(fd)
            fd = os.open(path, flags & ~os.O_EXCL, FILE_MODE)
        self.direct = found
        return fd

    def _ask_time(self) -> None:
        clock = self.root / CLOCK
        try:
            os.close(os.open(clock, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, FILE_MODE))
            os.utime(clock)
            self.learn_time(os.stat(clock).st_mtime_ns)
        except OSError:
            pass  # read-only, or another user's: what is written here says it as well
