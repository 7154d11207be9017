"""CRC32C: known vectors, every implementation of this CPU against the portable one, and the chunk walk.

What belongs here: values and memory safety of the checksum functions. Speed is the bench's business.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_backends import checksum

try:
    from hicache_ext import _native
except ImportError:
    _native = None

needs_native = pytest.mark.skipif(_native is None, reason="this install has no compiled module")

# RFC 3720, appendix B.4, and the usual check value.
VECTORS = [
    (b"", 0x00000000),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(reversed(range(32))), 0x113FDB5C),
]


def reference(data: bytes, crc: int = 0) -> int:
    """Bit by bit from the definition: slow, short, and independent of every table."""
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize(("data", "expected"), VECTORS)
def test_known_vectors(data: bytes, expected: int) -> None:
    assert reference(data) == expected
    assert checksum.crc32c(data) == expected
    assert checksum.crc32c(memoryview(bytearray(data))) == expected


@needs_native
@pytest.mark.parametrize(("data", "expected"), VECTORS)
def test_known_vectors_in_every_implementation(data: bytes, expected: int) -> None:
    array = np.frombuffer(data + b"\0", np.uint8)
    for name in _native.native_info()["crc32c_available"]:
        assert _native.crc32c_with(name, array.ctypes.data, len(data)) == expected, name


# Around every threshold at which an implementation changes its method, and at every alignment.
LENGTHS = sorted(
    {
        max(0, base + delta)
        for base in (0, 8, 64, 240, 256, 480, 1024, 1280, 4080, 4096, 8160, 65520, 65536, 131040, 200_000)
        for delta in (-9, -8, -1, 0, 1, 7, 8, 255)
    }
)


@needs_native
@pytest.mark.parametrize("offset", [0, 1, 3, 8, 63])
def test_implementations_agree_around_thresholds(offset: int) -> None:
    memory = np.random.default_rng(7).integers(0, 256, max(LENGTHS) + 64, np.uint8)
    at = memory.ctypes.data + offset
    for length in LENGTHS:
        expected = _native.crc32c_with("portable", at, length, 0x1234567)
        for name in _native.native_info()["crc32c_available"]:
            assert _native.crc32c_with(name, at, length, 0x1234567) == expected, (name, length)


@needs_native
@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=3000), seed=st.integers(0, 2**32 - 1), cut=st.integers(0, 3000))
def test_implementations_match_the_definition(data: bytes, seed: int, cut: int) -> None:
    array = np.frombuffer(data + b"\0", np.uint8)
    expected = reference(data, seed)
    cut = min(cut, len(data))
    for name in _native.native_info()["crc32c_available"]:
        assert _native.crc32c_with(name, array.ctypes.data, len(data), seed) == expected, name
        first = _native.crc32c_with(name, array.ctypes.data, cut, seed)
        assert _native.crc32c_with(name, array.ctypes.data + cut, len(data) - cut, first) == expected, name


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 4095, 4096, 65535, 65536, 65537, 131072, 200_001]), max_size=6),
    seed=st.integers(0, 2**32),
)
def test_chunks_restart_at_each_buffer(lengths: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    buffers = [random.integers(0, 256, length, np.uint8) for length in lengths]
    expected = [
        checksum.crc32c(buffer[start : start + checksum.CHUNK].tobytes())
        for buffer in buffers
        for start in range(0, buffer.size, checksum.CHUNK)
    ]
    addresses = np.array([buffer.ctypes.data for buffer in buffers], np.uint64)
    sizes = np.array(lengths, np.uint64)
    assert checksum.chunk_count(sizes) == len(expected)
    assert checksum.chunk_crcs(addresses, sizes).tolist() == expected
    out = np.full(len(expected) + 2, 0xABCD, np.uint32)
    given_back = checksum.chunk_crcs(addresses, sizes, out)
    assert given_back.tolist() == expected
    assert np.shares_memory(given_back, out) or not expected
    assert out[len(expected) :].tolist() == [0xABCD, 0xABCD]  # nothing behind the result is touched


def test_sizes_and_types_that_do_not_fit_are_refused() -> None:
    buffer = np.zeros(70_000, np.uint8)
    addresses = np.array([buffer.ctypes.data], np.uint64)
    lengths = np.array([buffer.size], np.uint64)
    with pytest.raises(ValueError, match="2 are needed"):
        checksum.chunk_crcs(addresses, lengths, np.empty(1, np.uint32))
    with pytest.raises(ValueError, match="lengths"):
        checksum.chunk_crcs(addresses, lengths[:0])
    with pytest.raises(TypeError, match="uint64"):
        checksum.chunk_crcs(addresses.astype(np.int64), lengths)
    with pytest.raises(TypeError, match="uint32"):
        checksum.chunk_crcs(addresses, lengths, np.empty(2, np.int32))


@needs_native
def test_native_refuses_what_it_would_overrun() -> None:
    buffer = np.zeros(100, np.uint8)
    addresses = np.array([buffer.ctypes.data, buffer.ctypes.data], np.uint64)
    out = np.full(1, 7, np.uint32)
    with pytest.raises(ValueError, match="too small"):
        _native.crc32c_chunks(addresses, np.array([10, 10], np.uint64), 65536, out)
    # Lengths whose sum wraps 64 bits must not get past the check.
    with pytest.raises(ValueError, match="too small"):
        _native.crc32c_chunks(addresses, np.array([2**63, 2**63], np.uint64), 1, out)
    assert out[0] == 7
    with pytest.raises(ValueError, match="chunk"):
        _native.crc32c_chunks(addresses, np.array([1, 1], np.uint64), 0, out)
    with pytest.raises(TypeError):
        _native.crc32c_chunks(addresses.astype(np.float64), np.array([1, 1], np.uint64), 65536, out)
    with pytest.raises(ValueError, match="no such"):
        _native.crc32c_with("zlib", int(addresses[0]), 1)


@needs_native
def test_memcpy_many() -> None:
    source = np.random.default_rng(1).integers(0, 256, 10_000, np.uint8)
    target = np.zeros(10_000, np.uint8)
    offsets = np.array([0, 5_000, 9_000], np.uint64)
    lengths = np.array([1_000, 3, 0], np.uint64)
    _native.memcpy_many(offsets + np.uint64(target.ctypes.data), offsets + np.uint64(source.ctypes.data), lengths)
    expected = np.zeros_like(target)
    expected[:1_000] = source[:1_000]
    expected[5_000:5_003] = source[5_000:5_003]
    assert np.array_equal(target, expected)
    with pytest.raises(ValueError, match="differ"):
        _native.memcpy_many(offsets, offsets[:1], lengths)


def test_the_gil_is_free_meanwhile() -> None:
    buffer = np.zeros(256 << 20, np.uint8)
    addresses = np.array([buffer.ctypes.data], np.uint64)
    lengths = np.array([buffer.size], np.uint64)
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        begin = time.perf_counter()
        for _ in range(4):
            checksum.chunk_crcs(addresses, lengths)
        end = time.perf_counter()
    finally:
        stop.set()
        ticker.join()
    # With the GIL held each call would be one gap; a tick well inside shows that it is not.
    assert sum(begin < at < end for at in ticks) > 8


def test_without_the_compiled_module_the_values_are_the_same() -> None:
    """The wheel's path, in a process where the compiled module cannot be imported."""
    script = """
        import sys
        sys.modules["hicache_ext._native"] = None
        import numpy as np
        from storage_backends import checksum
        assert "wheel" in checksum.implementation(), checksum.implementation()
        buffers = [np.random.default_rng(i).integers(0, 256, n, np.uint8) for i, n in enumerate((0, 7, 65536, 150001))]
        addresses = np.array([b.ctypes.data for b in buffers], np.uint64)
        lengths = np.array([b.size for b in buffers], np.uint64)
        print(checksum.chunk_crcs(addresses, lengths).tolist(), checksum.crc32c(b"123456789"))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    buffers = [np.random.default_rng(i).integers(0, 256, n, np.uint8) for i, n in enumerate((0, 7, 65536, 150001))]
    addresses = np.array([b.ctypes.data for b in buffers], np.uint64)
    expected = checksum.chunk_crcs(addresses, np.array([b.size for b in buffers], np.uint64)).tolist()
    assert done.stdout.split("\n")[0] == f"{expected} {0xE3069283}"


def test_the_implementation_is_named() -> None:
    assert checksum.implementation().startswith(("native (", "crc32c wheel ("))
