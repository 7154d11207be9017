"""A process that tries cuFile: `python -m storage_backends.gds.trial ORDER`, started by decision.py alone.

Belongs here: random bytes from device memory to a file and back, as a tier's lanes move them: each way, all lanes at
the same time, memory that cuFile knows and memory that it does not, pieces in the middle of it, checksums on the
device. Does not belong here: what follows from it.

ORDER is JSON: {"device": ordinal, "libraries": [paths], "directories": [paths], "ways": [names], "strict": bool}.
Answers are lines of JSON, written as they are known: {"problem": text}, or {"library", "version", "direct"} and then
{"way", "wrong"} for each way.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hicache_ext.cuda import CudaUnavailable, open_device
from storage_backends.buffers import OwnedMemory
from storage_backends.checksum import crc32c
from storage_backends.gds import volume
from storage_backends.gds.decision import Way
from storage_backends.gds.route import CHECKSUM_BLOCKS, NUMBERS, THREADS

if TYPE_CHECKING:
    from hicache_ext import _cuda

#: A piece, and pieces of a lane.
_PIECE, _PIECES = 64 << 10, 8


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


@dataclass(frozen=True)
class _Trial:
    """All lanes of a way. kinds: two pieces of memory with room for twice `bytes` each: where one begins, and the same
    again where cuFile knows it, else None. bytes: what all lanes move at a time."""

    device: _cuda.Device
    library: _cuda.CuFile
    lanes: list[_cuda.CuFileLane]
    threads: ThreadPoolExecutor
    way: int
    kinds: tuple[tuple[int, int | None], ...]

    @property
    def bytes(self) -> int:
        return len(self.lanes) * _PIECES * _PIECE


def main(order: dict[str, Any]) -> None:
    try:
        device = open_device(order["device"])
    except CudaUnavailable as error:
        say(problem=str(error))
        return
    library = _open(device, order["libraries"], order["strict"])
    if library is None:
        return
    from hicache_ext import _cuda

    lanes = max(THREADS.values())
    half = 2 * lanes * _PIECES * _PIECE
    try:
        memory = _cuda.memory(device, 2 * half)
        made = [_cuda.cufile_lane(library) for _ in range(lanes)]
    except (_cuda.Unavailable, _cuda.Failed) as error:
        say(problem=str(error))
        return
    known = None
    with suppress(_cuda.Unavailable, _cuda.Failed):  # then it is used unregistered, as in a tier
        known = _cuda.cufile_buffer(library, memory.address, half)
    kinds = ((memory.address, None if known is None else memory.address), (memory.address + half, None))
    for name in order["ways"]:
        way, wrong = Way(name), ""
        with ThreadPoolExecutor(THREADS[way]) as threads:
            those = made[: THREADS[way]]
            trial = _Trial(device, library, those, threads, NUMBERS[way], kinds)
            for directory in order["directories"]:
                try:
                    wrong = _round_trip(trial, Path(directory))
                except (_cuda.Unavailable, _cuda.Failed, OSError) as error:
                    wrong = str(error)
                if wrong:
                    break
        say(way=name, wrong=wrong)
    # A driver that hangs while it is taken down has nothing to add.
    os._exit(0)


def _open(device: _cuda.Device, paths: list[str], strict: bool) -> _cuda.CuFile | None:
    from hicache_ext import _cuda

    problems = []
    for path in paths:
        try:
            library = _cuda.cufile(device, path, strict)
        except _cuda.Unavailable as error:
            problems.append(str(error))
            continue
        number = library.version
        version = f"{number // 1000}.{number % 1000 // 10}" if number else "(unknown version)"
        direct = library.peer_to_peer or Path("/proc/driver/nvidia-fs").exists()
        say(library=path, version=version, direct=direct)
        return library
    # The first is what the linker finds; where it was found elsewhere too, that says more.
    say(problem=problems[-1])
    return None


def _round_trip(trial: _Trial, place: Path) -> str:
    """What went wrong, "" for nothing. A block device is only read. Both kinds of memory are written from and read
    into: a way serves both, or none."""
    from hicache_ext import _cuda

    read_only = place.is_block_device()
    file = place if read_only else place / f".probe-{os.getpid()}-{os.urandom(4).hex()}"
    flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT | os.O_EXCL
    fd = os.open(file, flags | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    try:
        try:
            known = _cuda.cufile_file(trial.library, fd)
        except _cuda.Unavailable as error:
            about = volume.problem(place) if str(volume.CODE) in str(error) else None
            return f"{error}: {about}" if about else str(error)
        if not read_only:
            os.posix_fallocate(fd, 0, trial.bytes)
        for begin, base in trial.kinds:
            if wrong := _there_and_back(trial, None if read_only else known, known, fd, begin, base):
                return wrong
        return ""
    finally:
        os.close(fd)
        if not read_only:
            file.unlink(missing_ok=True)


def _there_and_back(
    trial: _Trial, writes: _cuda.CuFileFile | None, reads: _cuda.CuFileFile, fd: int, begin: int, base: int | None
) -> str:
    """From `begin` to the file and from there into what follows. writes: None: what lies in the file is read."""
    host = OwnedMemory(trial.bytes)
    if writes is None:
        os.preadv(fd, [host.view], 0)
    else:
        host.view[:] = os.urandom(trial.bytes)
        trial.device.copy(begin, host.address, trial.bytes)
        if wrong := _move(trial, True, writes, begin, base, None):
            return f"a write gave {wrong}"
    wanted = bytes(host.view)
    back, pieces = begin + trial.bytes, range(0, trial.bytes, _PIECE)
    sums = np.zeros((len(trial.lanes), _PIECES), np.uint32)
    if wrong := _move(trial, False, reads, back, base, sums):
        return f"a read gave {wrong}"
    trial.device.copy(host.address, back, trial.bytes)
    if bytes(host.view) != wanted:
        return "other bytes came back than were written"
    right = [crc32c(wanted[at : at + _PIECE]) for at in pieces]
    return "" if sums.reshape(-1).tolist() == right else "a checksum on the device is wrong"


def _move(
    trial: _Trial, write: bool, file: _cuda.CuFileFile, begin: int, base: int | None, sums: np.ndarray | None
) -> str:
    """Every lane its share, all at the same time. sums: of each lane's pieces, by the device, after what was issued."""

    def share(number: int) -> str:
        lane, at = trial.lanes[number], (np.arange(_PIECES) + number * _PIECES).astype(np.uint64) * np.uint64(_PIECE)
        addresses = at + np.uint64(begin)
        # Memory that cuFile does not know begins, for cuFile, where a piece does, and ends with it.
        bases = addresses if base is None else np.full(_PIECES, base, np.uint64)
        which, lengths = np.zeros(_PIECES, np.uint32), np.full(_PIECES, _PIECE, np.uint64)
        lane.issue(trial.way, write, [file], which, bases, addresses, lengths, at)
        if sums is not None:
            lane.crc32c(addresses, lengths.astype(np.uint32), sums[number], CHECKSUM_BLOCKS)
        moved = np.zeros(_PIECES, np.int64)
        lane.results(moved)
        return "" if (moved == _PIECE).all() else str(moved.tolist())

    return next(filter(None, trial.threads.map(share, range(len(trial.lanes)))), "")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
