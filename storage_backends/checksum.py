"""CRC32C of stored pages, by the fastest implementation that this install has.

What belongs here: the checksum values of the stored format, and the choice of who computes them.
What does not: where checksums lie in a slot and what a mismatch means (the slot format's and the
reader's business).

The values are part of the format, so every implementation gives the same ones. The choice is made once,
at import: the compiled module, else a wheel with hardware CRC32C. Never zlib: that is another polynomial.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK = 65536
"""Bytes under one checksum; a new chunk begins at each buffer."""

_native: Any = None
_wheel: Callable[..., int] | None = None
try:
    from hicache_ext import _native as _compiled

    _native = _compiled
except ImportError:
    from crc32c import crc32c as _wheel_crc32c
    from crc32c import hardware_based as _wheel_in_hardware

    _wheel = _wheel_crc32c


def implementation() -> str:
    """Who computes the checksums here, for logs: for example `native (sse4.2)`."""
    if _native is not None:
        return f"native ({_native.native_info()['crc32c']})"
    return "crc32c wheel (hardware)" if _wheel_in_hardware else "crc32c wheel (software)"


def chunk_count(lengths: NDArray[np.uint64]) -> int:
    """How many checksums buffers of these lengths (bytes) have."""
    return int(((lengths + np.uint64(CHUNK - 1)) // np.uint64(CHUNK)).sum())


def chunk_crcs(
    addresses: NDArray[np.uint64],
    lengths: NDArray[np.uint64],
    out: NDArray[np.uint32] | None = None,
) -> NDArray[np.uint32]:
    """CRC32C of each 64 KiB chunk of the buffers, in order; a buffer's last chunk may be short.

    `addresses` and `lengths` are one entry per buffer (bytes), uint64, and the memory must stay in place
    until the call returns; the GIL is released meanwhile. The result has `chunk_count(lengths)` entries: a
    view of `out` if that is given (contiguous uint32, at least as long), else a new array. Raises
    ValueError if sizes do not fit and TypeError for another dtype.
    """
    if addresses.shape != lengths.shape:
        raise ValueError(f"{addresses.shape} addresses but {lengths.shape} lengths")
    for name, array, dtype in (("addresses", addresses, np.uint64), ("lengths", lengths, np.uint64)):
        if array.dtype != dtype:
            raise TypeError(f"{name} must be uint64, not {array.dtype}")
    needed = chunk_count(lengths)
    if out is None:
        out = np.empty(needed, np.uint32)
    elif out.dtype != np.uint32:
        raise TypeError(f"out must be uint32, not {out.dtype}")
    elif out.size < needed:
        raise ValueError(f"out holds {out.size} checksums, {needed} are needed")
    if _native is not None:
        _native.crc32c_chunks(np.ascontiguousarray(addresses), np.ascontiguousarray(lengths), CHUNK, out)
    else:
        _chunk_crcs_by_wheel(addresses, lengths, out)
    return out[:needed]


def _chunk_crcs_by_wheel(addresses: NDArray[np.uint64], lengths: NDArray[np.uint64], out: NDArray[np.uint32]) -> None:
    assert _wheel is not None
    at = 0
    for address, length in zip(addresses.tolist(), lengths.tolist(), strict=True):
        if not length:
            continue
        memory = memoryview((ctypes.c_char * length).from_address(address))
        for start in range(0, length, CHUNK):
            # The wheel gives up the GIL by itself for pieces of 32 KiB and more.
            out[at] = _wheel(memory[start : start + CHUNK])
            at += 1


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """CRC32C of a contiguous buffer, such as a slot header."""
    if _native is None:
        assert _wheel is not None
        return _wheel(data)
    array = np.frombuffer(data, np.uint8)  # an address for read-only memory too, without a copy
    return int(_native.crc32c(array.ctypes.data, array.size))
