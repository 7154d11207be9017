"""Where vLLM's blocks are: every shape that a KV tensor comes in, against the tensor itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hicache_ext.page import Namespace, PageLayout
from hicache_ext.vllm.blocks import UnsupportedLayout, blocks_of
from hicache_ext.vllm.identity import Rank

torch = pytest.importorskip("torch")

BLOCKS, HEADS, TOKENS, DIM = 6, 2, 4, 8
SPACE = Namespace("m", "w", PageLayout("mha", "x", "float32", TOKENS, (64,)))


def numbered(*shape: int) -> "torch.Tensor":  # noqa: UP037
    return torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape)


@pytest.mark.parametrize(
    ("make", "block"),
    [
        (lambda: numbered(BLOCKS, HEADS, TOKENS, 2 * DIM), lambda t, b: [t[b]]),
        (lambda: numbered(2, BLOCKS, TOKENS, HEADS, DIM), lambda t, b: [t[0, b], t[1, b]]),
        # Kernel blocks: three to a block.
        (lambda: numbered(BLOCKS * 3, HEADS, TOKENS, DIM), lambda t, b: [t[3 * b : 3 * b + 3]]),
        # The layers of a block side by side: this tensor is one layer of it.
        (lambda: numbered(BLOCKS, 3, HEADS, TOKENS, DIM)[:, 1], lambda t, b: [t[b]]),
        # The kernel's own order within the block.
        (lambda: numbered(BLOCKS, TOKENS, HEADS, DIM).permute(0, 2, 1, 3), lambda t, b: [t[b].permute(1, 0, 2)]),
    ],
    ids=["one piece", "K and V apart", "kernel blocks", "layers in a block", "permuted"],
)
def test_a_block_is_its_bytes(make: Callable[[], "torch.Tensor"], block: Callable[..., list["torch.Tensor"]]) -> None:  # noqa: UP037
    tensor = make()
    found = blocks_of({"layer": tensor}, ["layer"], BLOCKS)
    numbers = [4, 0, 5]
    batch = found.batch(SPACE, bytes(96), None, numbers)
    for page, number in enumerate(numbers):
        wanted = [np.ascontiguousarray(part.numpy()).tobytes() for part in block(tensor, number)]
        assert [bytes(buffer) for buffer in batch.buffers(page)] == wanted


def test_layers_in_order_and_shared_ones_once() -> None:
    one, two = numbered(BLOCKS, 8), numbered(BLOCKS, 8) + 1000
    found = blocks_of({"a": one, "b": two, "c": one}, ["b", "a", "c"], BLOCKS)
    assert found.starts.tolist() == [two.data_ptr(), one.data_ptr()]


@pytest.mark.parametrize(
    ("tensor", "layer"),
    [
        (numbered(BLOCKS, TOKENS, 2 * DIM)[:, :, :DIM], "layer"),  # half of every row
        (numbered(HEADS, 7, TOKENS, DIM), "layer"),  # no dimension of blocks
        (numbered(BLOCKS * 2, TOKENS, DIM)[:, :2], "layer"),  # kernel blocks with gaps between them
        (numbered(BLOCKS, 8), "another"),
    ],
)
def test_what_has_no_address_is_refused(tensor: "torch.Tensor", layer: str) -> None:  # noqa: UP037
    with pytest.raises(UnsupportedLayout, match="layer"):
        blocks_of({"layer": tensor}, [layer], BLOCKS)


def test_no_block_beyond_the_last() -> None:
    found = blocks_of({"layer": numbered(BLOCKS, 8)}, ["layer"], BLOCKS)
    with pytest.raises(IndexError):
        found.batch(SPACE, bytes(32), None, [BLOCKS])


def test_ranks_that_hold_the_same_part_share_it_and_one_writes() -> None:
    ranks = [Rank(rank, 8, shards=2) for rank in range(8)]
    assert [(rank.shard.tp_rank, rank.shard.tp_size) for rank in ranks] == [(0, 2)] * 4 + [(1, 2)] * 4
    assert [rank.writes for rank in ranks] == [True, False, False, False] * 2
    assert all(Rank(rank, 4, shards=4).writes for rank in range(4))
