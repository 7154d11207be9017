"""A decode as an engine runs it, small: a CUDA graph that reads and writes pages of a pool which others use as well.

Belongs here: the pool, the steps, what a quiet run gave. Does not belong here: who disturbs it (test_stress).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hicache_ext.cuda import BlockShape, Side
from tests.blocks import filled

LAYERS, TOKENS, HEADS, DIM, BATCH = 8, 16, 4, 64, 4
SHAPE = BlockShape(LAYERS, 2, TOKENS, HEADS, DIM * 2)
#: Pages of a sequence: those of its prompt, which nobody writes, and those that the steps fill.
PROMPT, GROWN = 12, 4
PAGES, STEPS = 256, GROWN * TOKENS


class Decode:
    """`run` takes STEPS steps from the same beginning: the same outputs each time, bit for bit, or a page is not right.

    buffer: uint8 [LAYERS, 2, PAGES, TOKENS, HEADS, DIM * 2], the pool; view: it by page; side: it for a Copier.
    free, prompts: numbers of the pages that the decode does not use, and of those that it only reads.
    """

    def __init__(self, device: str = "cuda") -> None:
        make = torch.Generator(device).manual_seed(5)

        def drawn(*dims: int) -> Any:
            return torch.randn(dims, generator=make, device=device, dtype=torch.bfloat16)

        def pool(dims: tuple[int, ...]) -> Any:
            return torch.randint(0, 120, dims, generator=make, device=device, dtype=torch.uint8)

        self.buffer, self.view, self.side = filled("paged", SHAPE, PAGES, pool)
        width = HEADS * DIM
        numbers = np.random.default_rng(5).permutation(PAGES)
        table = numbers[: BATCH * (PROMPT + GROWN)].reshape(BATCH, -1)
        self.free, self.prompts, self._grown = numbers[table.size :], table[:, :PROMPT].ravel(), table[:, PROMPT:]
        self._kv = self.buffer.view(torch.bfloat16).view(LAYERS, 2, PAGES * TOKENS, HEADS, DIM)
        slots = table[:, :, None] * TOKENS + np.arange(TOKENS)
        self._slots = torch.from_numpy(slots.reshape(BATCH, -1)).to(device)
        self._kv[:, :, self._slots[:, : PROMPT * TOKENS].ravel()] = drawn(
            LAYERS, 2, BATCH * PROMPT * TOKENS, HEADS, DIM
        )
        self._weights = [tuple(drawn(width, width) / width**0.5 for _ in range(4)) for _ in range(LAYERS)]
        self._tokens = drawn(STEPS, BATCH, width)
        self._places = torch.arange(self._slots.shape[1], device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self._x = torch.zeros(BATCH, width, dtype=torch.bfloat16, device=device)
        self._outputs = torch.zeros_like(self._tokens)
        self._replay, self._stream = self._step, None
        if device == "cuda":
            self._stream = torch.cuda.Stream()
            self._capture()
        self.expected, self.grown = self.run()

    def run(self) -> tuple[Any, Any]:
        """(outputs of all steps, the pages that they filled), on the host."""
        if self._stream is None:
            return self._run()
        with torch.cuda.stream(self._stream):
            return self._run()

    def check(self) -> None:
        """A run's outputs and pages are those of the first run, which nobody disturbed."""
        outputs, grown = self.run()
        assert torch.equal(outputs, self.expected), "a step's output is not that of the quiet run"
        assert torch.equal(grown, self.grown), "a page that the steps filled is not that of the quiet run"

    def _run(self) -> tuple[Any, Any]:
        self._at.zero_()
        self._x.zero_()
        self._kv[:, :, self._slots[:, PROMPT * TOKENS :].ravel()] = 0
        self._outputs.zero_()
        for _ in range(STEPS):
            self._replay()
        # `cpu` waits for this stream alone.
        return self._outputs.cpu(), self.view[torch.from_numpy(self._grown.ravel()).to(self.view.device)].cpu()

    def _capture(self) -> None:
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            self._step()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._step()
        self._replay = self._graph.replay
        torch.cuda.synchronize()

    def _step(self) -> None:
        place = self._at + PROMPT * TOKENS
        mine = self._slots.index_select(1, place).view(-1)
        seen = self._places <= place
        x = torch.tanh(self._x + self._tokens.index_select(0, self._at)[0])
        for kv, (q, k, v, out) in zip(self._kv, self._weights, strict=True):
            kv[0].index_copy_(0, mine, (x @ k).view(BATCH, HEADS, DIM))
            kv[1].index_copy_(0, mine, (x @ v).view(BATCH, HEADS, DIM))
            keys, values = kv[:, self._slots].transpose(2, 3)  # [BATCH, HEADS, places, DIM]
            scores = ((x @ q).view(BATCH, HEADS, 1, DIM) @ keys.transpose(2, 3)).float() / DIM**0.5
            part = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(torch.bfloat16)
            x = x + (part @ values).reshape(BATCH, -1) @ out
            x = x / x.float().norm(dim=-1, keepdim=True).to(torch.bfloat16) * 8
        self._x.copy_(x)
        self._outputs.index_copy_(0, self._at, x[None])
        self._at += 1


def side_of(name: str, count: int, device: str = "cuda", seed: int | None = None) -> tuple[Any, Any, Side]:
    """Page buffers in pinned memory: random, or poisoned without a seed."""

    def host(dims: tuple[int, ...]) -> Any:
        if seed is None:
            made = torch.full(dims, 0xA5, dtype=torch.uint8)
        else:
            made = torch.randint(0, 256, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        return made.pin_memory() if device == "cuda" else made

    return filled(name, SHAPE, count, host)
