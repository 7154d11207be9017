"""vLLM's blocks for tests, in every order that its kernels have them in, and their pages by another way than ours.

Used on host memory, over a driver that stands in for CUDA's, and on a GPU: `device` says where the blocks are.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from hicache_ext import canonical
from hicache_ext.canonical import Shape
from hicache_ext.config import Config
from hicache_ext.page import KEY_BYTES, Namespace, PageLayout
from hicache_ext.store import TieredStore
from hicache_ext.store.copies import CopyBudget
from hicache_ext.vllm.device_blocks import DeviceBlocks, own_blocks, shared_blocks
from hicache_ext.vllm.device_moves import DeviceMoves
from hicache_ext.vllm.pages import Pages
from hicache_ext.vllm.sharing import halves
from storage_backends.base import Outcome

LAYERS, BLOCKS, TOKENS, HEADS, DIM = 3, 24, 16, 2, 64
SHAPE = Shape("mha", LAYERS, 0, HEADS, DIM, "bfloat16", TOKENS)
POISON = -77.0


def _apart(order: Sequence[int], sizes: Sequence[int], device: str) -> Any:
    """A tensor of these sizes whose memory has the dimensions in this order."""
    memory = torch.empty([sizes[i] for i in order], dtype=torch.bfloat16, device=device)
    return memory.permute([list(order).index(i) for i in range(len(sizes))])


def _blocks_0_25(order: Sequence[int], kernel: int = TOKENS) -> Callable[[str], list[Any]]:
    """[blocks, 2, tokens, heads, dim]: FlashAttention, FlashInfer, Triton. kernel: tokens of the kernel's block."""
    sizes = (BLOCKS * TOKENS // kernel, 2, kernel, HEADS, DIM)
    return lambda device: [_apart(order, sizes, device) for _ in range(LAYERS)]


def _blocks_0_32(order: Sequence[int]) -> Callable[[str], list[Any]]:
    """One tensor [layers, blocks, heads, tokens, K then V] for all layers."""
    sizes = (LAYERS, BLOCKS, HEADS, TOKENS, 2 * DIM)
    return lambda device: list(_apart(order, sizes, device))


#: By name: the KV tensors of every layer. A name that ends in "*" has blocks that do not lie in one piece.
LAYOUTS: dict[str, Callable[[str], list[Any]]] = {
    "0.25 NHD": _blocks_0_25((0, 1, 2, 3, 4)),
    "0.25 HND": _blocks_0_25((0, 1, 3, 2, 4)),
    "0.25 kernel blocks": _blocks_0_25((0, 1, 2, 3, 4), TOKENS // 2),
    "K and V first": lambda device: [
        torch.empty(2, BLOCKS, TOKENS, HEADS, DIM, dtype=torch.bfloat16, device=device) for _ in range(LAYERS)
    ],
    "LBHNC": _blocks_0_32((0, 1, 2, 3, 4)),
    "LBNHC": _blocks_0_32((0, 1, 3, 2, 4)),
    "BLHNC": _blocks_0_32((1, 0, 2, 3, 4)),
    "BLNHC": _blocks_0_32((1, 0, 3, 2, 4)),
    "LHBNC*": _blocks_0_32((0, 2, 1, 3, 4)),
    "BHLNC*": _blocks_0_32((1, 2, 0, 3, 4)),
}


class Counted(Counter[str]):
    """Statistics by name."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def count(self, name: str, number: int) -> None:
        with self._lock:
            self[name] += number


@dataclass
class Case:
    """tensors: on the device. host: the same in host memory, changed by torch alone. page: tokens."""

    tensors: list[Any]
    host: list[Any]
    blocks: DeviceBlocks
    space: Namespace
    store: Any
    moves: DeviceMoves
    counts: Counted
    page: int

    def pages(self, name: str, first: int, count: int, blocks: Sequence[int], lead: int = 0) -> Pages:
        """Pages `first` on of the chain of that name, whose tokens lie in these blocks."""
        keys = keys_of(name, first + count)
        parent = keys[(first - 1) * KEY_BYTES : first * KEY_BYTES] if first else b""
        skip = first * self.page % TOKENS
        return Pages(name, keys[first * KEY_BYTES :], parent, tuple(blocks), skip, lead)

    def save(self, *pages: Pages) -> Counter[str]:
        """Outcomes by name, "dropped" among them, once all are known."""
        told: Counter[str] = Counter()
        cond = threading.Condition()

        def saved(group: int, outcomes: bytes, dropped: int) -> None:
            assert group == 0
            with cond:
                told.update(Outcome(one).name for one in outcomes)
                told["dropped"] += dropped
                cond.notify_all()

        sent = self.moves.save(pages, [self.space], saved)
        self.counts.count("saved", sent)
        with cond:
            assert cond.wait_for(lambda: sum(told.values()) >= sent, 60), told
        return +told

    def load(self, pages: Pages, seconds: float = 60.0) -> tuple[list[int], list[Outcome]]:
        """Blocks that are not there, and the outcomes."""
        told: list[Any] = []
        done = threading.Event()

        def loaded(bad: Sequence[int], outcomes: bytes) -> None:
            told.append((sorted(bad), [Outcome(one) for one in outcomes]))
            done.set()

        self.counts.count("loaded", pages.count)
        self.moves.load(pages, self.space, time.monotonic() + seconds, loaded)
        assert done.wait(seconds + 60)
        assert len(told) == 1
        return told[0]

    def kv(self, where: list[Any]) -> Any:
        """[layers, 2, tokens of all blocks, heads, dim] in host memory."""
        views = [[part.cpu().flatten(0, 1) for part in halves(tensor, SHAPE)] for tensor in where]
        return torch.stack([torch.stack(parts) for parts in views])

    def differing(self) -> list[int]:
        """Blocks in which the device and what torch did to host memory are not the same."""
        same = (bits(self.kv(self.tensors)) == bits(self.kv(self.host))).flatten(3).all(-1).all(0).all(0)
        return (~same.view(BLOCKS, TOKENS).all(1)).nonzero().flatten().tolist()

    def poison(self) -> None:
        for tensor in (*self.tensors, *self.host):
            tensor.fill_(POISON)

    def canonical_pages(self, pages: Pages) -> list[bytes]:
        """What the store holds of these pages, read by itself."""
        batch = CopyBudget(1 << 26).take(canonical.pages(self.space, pages.keys, None))
        assert batch is not None
        assert self.store.read(batch).result(60) == [Outcome.HIT] * len(batch)
        return [bytes(batch.buffers(page)[0]) for page in range(len(batch))]


def bits(values: Any) -> Any:
    return values.contiguous().view(torch.int16)


def keys_of(name: str, pages: int) -> bytes:
    return b"".join(hashlib.sha256(f"{name}/{i}".encode()).digest() for i in range(pages))


@contextmanager
def opened(
    layout: str, device: str, page: int | None = None, load_bytes: int = 1 << 20, wrap: Any = None, store: Any = None,
    mark: Any = None, device_bytes: int = 0, tiers: Any = None,
) -> Iterator[Case]:  # fmt: skip
    """page: tokens of a shared page; None: a page is a block as it lies. wrap: what becomes of each tensor before it is
    registered. store: what becomes of the store. tiers: instead of one in memory. device_bytes: for slots on the
    device, where a tier reaches it."""
    tensors = LAYOUTS[layout](device)
    generator = torch.Generator().manual_seed(1)
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    host = LAYOUTS[layout]("cpu")
    for tensor, copy in zip(tensors, host, strict=True):
        copy.copy_(tensor)
    seen = [wrap(tensor) for tensor in tensors] if wrap else tensors
    if page is None:
        names = [f"layer.{i}" for i in range(LAYERS)]
        blocks = own_blocks(dict(zip(names, seen, strict=True)), names, BLOCKS, TOKENS)
        form = PageLayout("mha", "blocks", "bfloat16", TOKENS, (blocks.page_bytes,))
    else:
        shape = replace(SHAPE, page_size=page)
        blocks = shared_blocks([halves(tensor, shape) for tensor in seen], shape, TOKENS)
        form = shape.layout
    space = Namespace("model", "weights", form, tag="canonical")
    counts = Counted()
    tiered = TieredStore.open(Config.load({"tiers": tiers or [{"type": "memory", "capacity": "64MiB"}]}))
    used = store(tiered) if store else tiered
    moves = DeviceMoves(used, [blocks], [space], load_bytes, load_bytes, device_bytes, counts.count, mark)
    try:
        yield Case(tensors, host, blocks, space, tiered, moves, counts, page or TOKENS)
    finally:
        moves.close()
        tiered.close()


def move_in_host(case: Case, source: Any, first: int, tokens: int, numbers: Sequence[int]) -> None:
    """What a load does, by torch: `tokens` of `source` (as Case.kv) from token `first` on into these blocks of host."""
    for layer, tensor in enumerate(case.host):
        for part, view in enumerate(halves(tensor, SHAPE)):
            kernel = view.shape[1]
            for token in range(tokens):
                block, within = numbers[token // TOKENS], token % TOKENS
                row = block * (TOKENS // kernel) + within // kernel
                view[row, within % kernel] = source[layer, part, first + token]
