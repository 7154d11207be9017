"""A disk that a test controls: a FUSE file system in memory, whose faults every I/O engine meets in the kernel.

Belongs here: the kernel's side of the protocol (include/uapi/linux/fuse.h), files in memory, faults by plan
(storage_backends.local.inject has the plan's rules), and the record of what was written. Does not belong here: what a
tier makes of it.

    python -m tests.fuse MOUNTPOINT PLAN RECORD [synchronous]      until its stdin ends

Faults hit reads and writes of extents (`*.ext`), past the extent's header, of segments (`*.seg`, `*.tmp`) and of
pages' files (`*.page`); everything else works. Requests are answered late and out of order, as a device with a queue
does: what comes while others are open is taken in first. All I/O is direct, so that a process's writes arrive here as
it made them.

The record is every change, in order: one `Event` after another as encoded by `Event.encode`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import heapq
import os
import random
import select
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from enum import IntEnum
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest

from storage_backends.local.inject import FaultPlan

_MAX_WRITE = 1 << 20
_HEADER_BYTES = 4096
_CAPACITY = 1 << 30
_IN = struct.Struct("<IIQQIIII")
_OUT = struct.Struct("<IiQ")
_MS_NOSUID_NODEV, _MNT_FORCE_DETACH = 2 | 4, 1 | 2


class Kind(IntEnum):
    MKDIR = 1
    CREATE = 2
    BEGIN = 3  # a write reached the device. number: its own. data: the bytes
    END = 4  # and was answered. number: of the write
    RESIZE = 5  # offset: the new size
    RENAME = 6  # data: the new path
    UNLINK = 7


class Event(NamedTuple):
    kind: Kind
    path: str = ""
    number: int = 0
    offset: int = 0
    data: bytes = b""

    def encode(self) -> bytes:
        path = self.path.encode()
        return struct.pack("<BHQQI", self.kind, len(path), self.number, self.offset, len(self.data)) + path + self.data


def events(record: Path) -> list[Event]:
    raw, at, found = record.read_bytes(), 0, []
    while at < len(raw):
        kind, path, number, offset, data = struct.unpack_from("<BHQQI", raw, at)
        at += 23
        name = raw[at : at + path].decode()
        found.append(Event(Kind(kind), name, number, offset, raw[at + path : at + path + data]))
        at += path + data
    return found


@contextlib.contextmanager
def fuse_disk(directory: Path, synchronous: bool = False) -> Iterator[Disk]:
    """Mounted at directory/disk. Skips the test where this user cannot mount.

    synchronous: the kernel sends a transfer's requests one after the other, and says when a device took only a part.
    """
    mountpoint = directory / "disk"
    mountpoint.mkdir()
    plan, record = directory / "faults.json", directory / "record"
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.fuse", str(mountpoint), str(plan), str(record),
         *["synchronous"] * synchronous],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        if (said := server.stdout.readline()) != "mounted\n":
            pytest.skip(f"no FUSE here: {said.strip()}")
        yield Disk(mountpoint, plan, record, server)
    finally:
        server.send_signal(signal.SIGCONT)
        server.stdin.close()
        server.wait()
        server.stdout.close()


class Disk(NamedTuple):
    """path: the mounted directory. plan: the fault plan's file. record: what was written. server: its process."""

    path: Path
    plan: Path
    record: Path
    server: subprocess.Popen[str]

    def hang(self) -> None:
        """Nothing is answered any more, whatever is asked, until `go_on`."""
        self.server.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.server.send_signal(signal.SIGCONT)


class _Node:
    def __init__(self, number: int, path: str, directory: bool) -> None:
        self.number, self.path = number, path
        self.children: dict[str, _Node] | None = {} if directory else None
        self.data = bytearray()
        self.mode = (stat.S_IFDIR | 0o755) if directory else (stat.S_IFREG | 0o644)
        self.changed = time.time_ns()

    def attributes(self) -> bytes:
        seconds, ns = divmod(self.changed, 10**9)
        size = len(self.data)
        return struct.pack(
            "<6Q10I", self.number, size, -(-size // 512), seconds, seconds, seconds, ns, ns, ns, self.mode, 1,
            os.getuid(), os.getgid(), 0, 4096, 0,
        )  # fmt: skip


class _Refused(Exception):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Server:
    def __init__(self, fd: int, plan: FaultPlan, record: Path, synchronous: bool) -> None:
        self.fd, self.plan, self._synchronous = fd, plan, synchronous
        self._record = open(record, "wb", buffering=0)  # noqa: SIM115 - for the life of the process
        self._chance = random.Random(1)
        self._numbers = count(1)
        self._root = _Node(next(self._numbers), "", True)
        self._nodes = {self._root.number: self._root}
        self._writes = count(1)
        self._late: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._calls = {
            1: self._lookup, 3: self._getattr, 4: self._setattr, 9: self._mkdir, 10: self._unlink, 11: self._unlink,
            12: self._rename, 14: self._open, 15: self._read, 16: self._write, 17: self._statfs, 18: self._nothing,
            20: self._nothing, 25: self._nothing, 26: self._init, 27: self._open, 28: self._readdir,
            29: self._nothing, 30: self._nothing, 34: self._nothing, 35: self._create, 43: self._fallocate,
            45: self._rename2,
        }  # fmt: skip

    def run(self) -> None:
        ready = select.poll()
        ready.register(self.fd, select.POLLIN)
        ready.register(sys.stdin.fileno(), 0)  # says when the other end is closed
        while True:
            wait = None if not self._late else max(0.0, self._late[0][0] - time.monotonic()) * 1000
            if found := dict(ready.poll(wait)):
                if self.fd not in found:
                    return
                try:
                    request = os.read(self.fd, _MAX_WRITE + 8192)
                except OSError as error:
                    if error.errno == errno.ENODEV:  # unmounted
                        return
                    continue  # whoever asked is gone
                self._serve(request)
            elif self._late:
                heapq.heappop(self._late)[2]()

    def _serve(self, request: bytes) -> None:
        length, opcode, unique, node, *_ = _IN.unpack_from(request)
        if opcode in (2, 36, 42):  # forget, interrupt, forget many: no answer
            return
        call = self._calls.get(opcode)
        try:
            if call is None:
                raise _Refused(errno.ENOSYS)
            answer = call(self._nodes.get(node, self._root), request[_IN.size : length], unique)
        except _Refused as refused:
            self._answer(unique, b"", refused.number)
        else:
            if answer is not None:
                self._answer(unique, answer)

    def _answer(self, unique: int, data: bytes, error: int = 0) -> None:
        with contextlib.suppress(OSError):  # whoever asked is dead
            data = b"" if error else data
            os.write(self.fd, _OUT.pack(_OUT.size + len(data), -error, unique) + data)

    def _say(self, *event: object) -> None:
        self._record.write(Event(*event).encode())  # type: ignore[arg-type]

    # Each: (node, request without its head, number of the request) to the answer; None: it comes later.

    def _init(self, node: _Node, data: bytes, unique: int) -> bytes:
        major, _, readahead, offered = struct.unpack_from("<IIII", data)
        # Asynchronous reads and direct I/O (in which the kernel makes a short write an EIO), big requests.
        wanted = (1 << 0 | 1 << 5 | (not self._synchronous) << 15 | 1 << 18 | 1 << 22) & offered
        return struct.pack(
            "<IIIIHHIIHHI7I", major, 31, readahead, wanted, 64, 48, _MAX_WRITE, 1, _MAX_WRITE // 4096, 0, 0, *[0] * 7
        )

    def _entry(self, node: _Node) -> bytes:
        return struct.pack("<QQQQII", node.number, 0, 0, 0, 0, 0) + node.attributes()

    def _child(self, node: _Node, name: bytes) -> _Node:
        found = (node.children or {}).get(name.rstrip(b"\0").decode())
        if found is None:
            raise _Refused(errno.ENOENT)
        return found

    def _make(self, node: _Node, name: bytes, directory: bool) -> _Node:
        text = name.rstrip(b"\0").decode()
        assert node.children is not None
        if text in node.children:
            raise _Refused(errno.EEXIST)
        made = _Node(next(self._numbers), f"{node.path}/{text}".lstrip("/"), directory)
        node.children[text] = self._nodes[made.number] = made
        node.changed = time.time_ns()
        self._say(Kind.MKDIR if directory else Kind.CREATE, made.path)
        return made

    def _lookup(self, node: _Node, data: bytes, unique: int) -> bytes:
        return self._entry(self._child(node, data))

    def _getattr(self, node: _Node, data: bytes, unique: int) -> bytes:
        return struct.pack("<QII", 0, 0, 0) + node.attributes()

    def _setattr(self, node: _Node, data: bytes, unique: int) -> bytes:
        valid, _, _, size, _, _, changed, _, _, changed_ns = struct.unpack_from("<IIQQQQQQII", data)
        if valid & 8:
            self._resize(node, size)
        if valid & 1 << 8:
            node.changed = time.time_ns()
        elif valid & 1 << 5:
            node.changed = changed * 10**9 + changed_ns
        return self._getattr(node, data, unique)

    def _resize(self, node: _Node, size: int) -> None:
        del node.data[size:]
        node.data.extend(bytes(size - len(node.data)))
        node.changed = time.time_ns()
        self._say(Kind.RESIZE, node.path, 0, size)

    def _mkdir(self, node: _Node, data: bytes, unique: int) -> bytes:
        return self._entry(self._make(node, data[8:], True))

    def _create(self, node: _Node, data: bytes, unique: int) -> bytes:
        made = self._make(node, data[16:], False)
        return self._entry(made) + self._open(made, b"", unique)

    def _open(self, node: _Node, data: bytes, unique: int) -> bytes:
        return struct.pack("<QIi", node.number, 0 if node.children is not None else 1 | 1 << 6, 0)

    def _unlink(self, node: _Node, data: bytes, unique: int) -> bytes:
        child = self._child(node, data)
        if child.children:
            raise _Refused(errno.ENOTEMPTY)
        assert node.children is not None
        del node.children[data.rstrip(b"\0").decode()]
        self._say(Kind.UNLINK, child.path)
        child.path = ""  # what is still written to it is nobody's
        node.changed = time.time_ns()
        return b""

    def _rename(self, node: _Node, data: bytes, unique: int, skip: int = 8) -> bytes:
        target = self._nodes[struct.unpack_from("<Q", data)[0]]
        old, new = data[skip:].rstrip(b"\0").decode().split("\0")
        child = self._child(node, old.encode())
        assert node.children is not None
        assert target.children is not None
        replaced = target.children.get(new)
        path = f"{target.path}/{new}".lstrip("/")
        self._say(Kind.RENAME, child.path, 0, 0, path.encode())
        if replaced is not None:
            replaced.path = ""
        del node.children[old]
        target.children[new], child.path = child, path
        node.changed = target.changed = time.time_ns()
        return b""

    def _rename2(self, node: _Node, data: bytes, unique: int) -> bytes:
        return self._rename(node, data, unique, 16)

    def _fallocate(self, node: _Node, data: bytes, unique: int) -> bytes:
        _, offset, length = struct.unpack_from("<QQQ", data)
        if offset + length > len(node.data):
            self._resize(node, offset + length)
        return b""

    def _nothing(self, node: _Node, data: bytes, unique: int) -> bytes:
        return b""

    def _statfs(self, node: _Node, data: bytes, unique: int) -> bytes:
        blocks = _CAPACITY // 4096
        return struct.pack("<5Q10I", blocks, blocks, blocks, 1 << 20, 1 << 20, 4096, 255, 4096, *[0] * 7)

    def _readdir(self, node: _Node, data: bytes, unique: int) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", data)
        out = b""
        for at, (name, child) in enumerate(list((node.children or {}).items())):
            raw = name.encode()
            one = struct.pack("<QQII", child.number, at + 1, len(raw), child.mode >> 12) + raw
            one += bytes(-len(one) % 8)
            if at >= offset:
                if len(out) + len(one) > size:
                    break
                out += one
        return out

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._late, (time.monotonic() + seconds, next(self._order), call))

    def _read(self, node: _Node, data: bytes, unique: int) -> bytes | None:
        _, offset, size = struct.unpack_from("<QQI", data)
        if not _may_fail(node, offset):
            return bytes(node.data[offset : offset + size])
        faults = self.plan.decide(False)
        self.plan.report()

        def answer() -> None:
            found = bytearray(node.data[offset : offset + size])
            if faults.flip and found:
                found[self._chance.randrange(len(found))] ^= 1 << self._chance.randrange(8)
            if faults.cut:
                del found[_half(len(found)) :]
            self._answer(unique, bytes(found), faults.error)

        self._later(faults.delay, answer)
        return None

    def _write(self, node: _Node, data: bytes, unique: int) -> bytes | None:
        _, offset, size = struct.unpack_from("<QQI", data)
        payload, number = data[40 : 40 + size], next(self._writes)
        if not _may_fail(node, offset):
            self._say(Kind.BEGIN, node.path, number, offset, payload)
            self._put(node, offset, payload)
            self._say(Kind.END, "", number)
            return struct.pack("<II", size, 0)
        faults = self.plan.decide(True)
        self.plan.report()
        taken = b"" if faults.error else payload[: _half(size)] if faults.cut else payload
        self._say(Kind.BEGIN, node.path, number, offset, taken)

        def answer() -> None:
            self._put(node, offset, taken)
            self._say(Kind.END, "", number)
            self._answer(unique, struct.pack("<II", size if faults.cut == "torn" else len(taken), 0), faults.error)

        # A moment, and not the same for all: others arrive meanwhile and are answered in another order.
        self._later(faults.delay + self._chance.uniform(0, 0.002), answer)
        return None

    def _put(self, node: _Node, offset: int, data: bytes) -> None:
        node.data.extend(bytes(max(0, offset + len(data) - len(node.data))))
        node.data[offset : offset + len(data)] = data
        node.changed = time.time_ns()


def _may_fail(node: _Node, offset: int) -> bool:
    return node.path.endswith((".seg", ".tmp", ".page")) or (node.path.endswith(".ext") and offset >= _HEADER_BYTES)


def _half(size: int) -> int:
    """A part of a transfer, in whole sectors."""
    return size // 2 // 512 * 512


def main(mountpoint: str, plan: str, record: str, mode: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        print(error)
        return
    options = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}".encode()
    if libc.mount(b"hicache-test", mountpoint.encode(), b"fuse", _MS_NOSUID_NODEV, options):
        print(f"mount: {os.strerror(ctypes.get_errno())}")
        return
    print("mounted", flush=True)
    try:
        Server(fd, FaultPlan.from_file(plan), Path(record), mode == "synchronous").run()
    finally:
        libc.umount2(mountpoint.encode(), _MNT_FORCE_DETACH)


if __name__ == "__main__":
    main(*sys.argv[1:])
