"""A process that tries cuFile: `python -m storage_backends.gds.trial ORDER`, started by decision.py alone.

Belongs here: pages of random bytes from device memory to a file and back, each way, and their checksums on the device.
Does not belong here: what follows from it.

ORDER is JSON: {"device": ordinal, "libraries": [paths], "directories": [paths], "ways": [names], "strict": bool}.
Answers are lines of JSON, written as they are known: {"problem": text}, or {"library", "version", "direct"} and then
{"way", "wrong"} for each way.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hicache_ext.cuda import CudaUnavailable, open_device
from storage_backends.buffers import OwnedMemory
from storage_backends.checksum import crc32c
from storage_backends.gds import volume

if TYPE_CHECKING:
    from hicache_ext import _cuda

_BYTES = 256 << 10
_NUMBERS = {"calls": 0, "batch": 1, "stream": 2}


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


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

    try:
        memory = _cuda.memory(device, 2 * _BYTES)
        lane = _cuda.cufile_lane(library)
    except (_cuda.Unavailable, _cuda.Failed) as error:
        say(problem=str(error))
        return
    registered = None
    with suppress(_cuda.Unavailable, _cuda.Failed):  # then it is used unregistered, as in a tier
        registered = _cuda.cufile_buffer(library, memory.address, _BYTES)
    for way in order["ways"]:
        wrong = ""
        for directory in order["directories"]:
            try:
                wrong = _round_trip(device, library, lane, memory, registered, _NUMBERS[way], Path(directory))
            except (_cuda.Unavailable, _cuda.Failed, OSError) as error:
                wrong = str(error)
            if wrong:
                break
        say(way=way, wrong=wrong)
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


def _round_trip(
    device: _cuda.Device, library: _cuda.CuFile, lane: _cuda.CuFileLane, memory: _cuda.Memory,
    registered: _cuda.CuFileBuffer | None, way: int, place: Path,
) -> str:  # fmt: skip
    """What went wrong, "" for nothing. A block device is only read. Writes go out of the memory's first half, which may
    be registered, and reads into the second, which is not: a way serves both kinds, or none."""
    from hicache_ext import _cuda

    host = OwnedMemory(_BYTES)
    there, back = memory.address, memory.address + _BYTES
    read_only = place.is_block_device()
    file = place if read_only else place / f".probe-{os.getpid()}-{os.urandom(4).hex()}"
    flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT | os.O_EXCL
    fd = os.open(file, flags | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    try:
        try:
            known = _cuda.cufile_file(library, fd)
        except _cuda.Unavailable as error:
            about = volume.problem(place) if str(volume.CODE) in str(error) else None
            return f"{error}: {about}" if about else str(error)
        if read_only:
            os.preadv(fd, [host.view], 0)
        else:
            os.posix_fallocate(fd, 0, _BYTES)
            host.view[:] = os.urandom(_BYTES)
            device.copy(there, host.address, _BYTES)
            if wrong := _move(lane, way, True, known, there, registered is not None):
                return f"a write gave {wrong}"
        if wrong := _move(lane, way, False, known, back, False):
            return f"a read gave {wrong}"
        wanted = bytes(host.view)
        device.copy(host.address, back, _BYTES)
        if bytes(host.view) != wanted:
            return "other bytes came back than were written"
        sums = np.zeros(1, np.uint32)
        lane.crc32c(np.array([back], np.uint64), np.array([_BYTES], np.uint32), sums, 1)
        return "" if int(sums[0]) == crc32c(wanted) else "a checksum on the device is wrong"
    finally:
        os.close(fd)
        if not read_only:
            file.unlink(missing_ok=True)


def _move(lane: _cuda.CuFileLane, way: int, write: bool, file: _cuda.CuFileFile, address: int, registered: bool) -> str:
    half = _BYTES // 2
    addresses = np.array([address, address + half], np.uint64)
    # Memory that cuFile does not know begins, for cuFile, where a piece does, and ends with it.
    bases = np.full(2, address, np.uint64) if registered else addresses
    lane.issue(
        way, write, [file], np.zeros(2, np.uint32), bases, addresses, np.full(2, half, np.uint64),
        np.array([0, half], np.uint64),
    )  # fmt: skip
    moved = np.zeros(2, np.int64)
    lane.results(moved)
    return "" if (moved == half).all() else str(moved.tolist())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
