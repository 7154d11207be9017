"""CRC32C on the device: the values that the CPU gives, for any length, alignment and content."""

from __future__ import annotations

import numpy as np
import pytest

from hicache_ext.cuda import open_device
from storage_backends.checksum import crc32c

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


def on_the_device(data: torch.Tensor, cuts: list[tuple[int, int]], blocks: int = 8) -> list[int]:
    addresses = np.array([data.data_ptr() + start for start, _ in cuts], np.uint64)
    lengths = np.array([length for _, length in cuts], np.uint32)
    out = np.zeros(len(cuts), np.uint32)
    open_device().crc32c(addresses, lengths, out, torch.cuda.current_stream().cuda_stream, blocks)
    return out.tolist()


def test_every_length_and_alignment() -> None:
    host = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8)
    device = host.cuda()
    lengths = [*range(70), 255, 256, 4095, 4096, 4097, 4112, 65535, 65536, 65537, 70272, 262144]
    cuts = [(start, length) for length in lengths for start in (0, 1, 7, 16, 4096 + 13)]
    data = host.numpy().tobytes()
    assert on_the_device(device, cuts) == [crc32c(data[start : start + length]) for start, length in cuts]


def test_the_known_value() -> None:
    device = torch.frombuffer(bytearray(b"123456789"), dtype=torch.uint8).cuda()
    assert on_the_device(device, [(0, 9)]) == [0xE3069283]


def test_a_flipped_bit_anywhere_is_seen() -> None:
    host = torch.randint(0, 256, (65536,), dtype=torch.uint8)
    device = host.cuda()
    (good,) = on_the_device(device, [(0, 65536)])
    for at in (0, 1, 15, 16, 4095, 4096, 32768, 65520, 65535):
        device[at] ^= 0x10
        assert on_the_device(device, [(0, 65536)]) != [good]
        device[at] ^= 0x10
    assert on_the_device(device, [(0, 65536)]) == [good]


@pytest.mark.parametrize("blocks", [1, 4, 1000])
def test_more_chunks_than_blocks(blocks: int) -> None:
    host = torch.randint(0, 256, (300, 65536), dtype=torch.uint8)
    cuts = [(i * 65536, 65536) for i in range(300)]
    assert on_the_device(host.cuda(), cuts, blocks) == [crc32c(row.tobytes()) for row in host.numpy()]
