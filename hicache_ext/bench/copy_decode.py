"""A decode beside a load: by how much copies slow down the kernels that an engine runs meanwhile.

Belongs here: the decode-like step and its times. Does not belong here: how fast copies are (copy).

The step stands for a decode step of Llama-3.1-8B's shape, batch 16, 4,096 tokens of context each: in each of 32 layers
four matrix products, with weights of their own (bf16, 436 MB a layer), and attention over a KV cache (torch's
scaled_dot_product_attention, grouped queries), replayed as a CUDA graph. Norms, rotations and sampling are left out. It
is bound by memory bandwidth, as decode is.
"""

from __future__ import annotations

import itertools
import statistics
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from hicache_ext.cuda import BlockShape, Copier, CopyError, Way, layouts
from hicache_ext.cuda.copier import LAYER_MULTIPROCESSORS

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 32, 4096, 14336, 32, 8, 128
BATCH, CONTEXT = 16, 4096
PAGE_TOKENS, PAGES = 64, 128
#: Layouts, and what the kernel may use; None: what it is given by default.
BESIDE: tuple[tuple[str, int | None], ...] = (
    ("page_first", None),
    ("page_first", 1),
    ("page_first", 2),
    ("page_first", 3),
    ("page_first", 4),
    ("page_first_direct", None),
)


class Step:
    """One decode step as a graph."""

    def __init__(self) -> None:
        import torch

        def weights(rows: int, columns: int) -> Any:
            return torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda") * 0.01

        self._layers = [
            (
                weights(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
                weights(HEADS * HEAD_DIM, HIDDEN),
                weights(HIDDEN, 2 * INNER),
                weights(INNER, HIDDEN),
            )
            for _ in range(LAYERS)
        ]
        cache = (LAYERS, 2, BATCH, KV_HEADS, CONTEXT, HEAD_DIM)
        self._cache = torch.randn(cache, dtype=torch.bfloat16, device="cuda")
        self._x = torch.randn(BATCH, HIDDEN, dtype=torch.bfloat16, device="cuda")
        self._graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(2):
                self._forward()
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph):
            self._out = self._forward()

    def _forward(self) -> Any:
        import torch
        import torch.nn.functional as F

        x = self._x
        for (qkv, out, up, down), cache in zip(self._layers, self._cache, strict=True):
            q = (x @ qkv)[:, : HEADS * HEAD_DIM].view(BATCH, HEADS, 1, HEAD_DIM)
            a = F.scaled_dot_product_attention(q, cache[0], cache[1], enable_gqa=True)
            x = x + a.reshape(BATCH, HEADS * HEAD_DIM) @ out
            gate, value = (x @ up).chunk(2, dim=-1)
            x = x + (F.silu(gate) * value) @ down
            x = x / x.float().norm(dim=-1, keepdim=True).to(torch.bfloat16)
        return x

    def times(self, steps: int) -> list[float]:
        """Milliseconds of each of `steps` steps, one right after the other."""
        import torch

        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        for mark in marks[:-1]:
            mark.record()
            self._graph.replay()
        marks[-1].record()
        torch.cuda.synchronize()
        return [one.elapsed_time(other) for one, other in itertools.pairwise(marks)]


class Loader:
    """Layer-wise loads of PAGES pages, one after another on a stream of their own, until stopped."""

    def __init__(self, layout: str, limit: int | None, pool: Any, host: Any) -> None:
        import torch

        shape = BlockShape(LAYERS, 2, PAGE_TOKENS, KV_HEADS, HEAD_DIM * 2)
        half = PAGES * shape.page_bytes // 2
        planes = [pool[kv, layer].data_ptr() for layer in range(LAYERS) for kv in range(2)]
        bases = [host.data_ptr(), host.data_ptr() + half]
        make = layouts.page_first if layout == "page_first" else layouts.page_first_direct
        limit = limit or LAYER_MULTIPROCESSORS
        self._copier = Copier(
            shape, layouts.paged(planes, shape, PAGES), make(bases, shape, PAGES), layer_multiprocessors=limit
        )
        self.way = self._copier.order(PAGES, layer_wise=True)[0]
        self.multiprocessors = 0 if self.way is Way.engine else limit
        draw = np.random.default_rng(3)
        self._numbers = draw.permutation(PAGES), draw.permutation(PAGES)
        self._stream = torch.cuda.Stream()
        self._bytes = PAGES * shape.page_bytes
        self._stop = threading.Event()
        self.times: list[float] = []
        self.failed: list[str] = []

    def __enter__(self) -> Loader:
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        import torch

        events = self._copier.events()
        while not self._stop.is_set():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(self._stream)
            try:
                self._copier.load_layers(*self._numbers, self._stream.cuda_stream, events)
            except CopyError as error:
                self.failed.append(str(error))
                return
            end.record(self._stream)
            end.synchronize()
            self.times.append(begin.elapsed_time(end) / 1e3)

    @property
    def gb_per_s(self) -> float:
        return self._bytes / 1e9 / statistics.median(self.times)


def run(say: Callable[[str], None], steps: int = 150) -> list[dict[str, Any]]:
    """Rows of step time alone and beside a load. RuntimeError: a load failed."""
    import torch

    say("a decode step by itself")
    step = Step()
    step.times(20)
    pool = torch.empty(2, LAYERS, PAGES * PAGE_TOKENS, KV_HEADS * HEAD_DIM * 2, dtype=torch.uint8, device="cuda")
    host = torch.empty(pool.numel(), dtype=torch.uint8, pin_memory=True)
    rows = []
    for layout, limit in BESIDE:
        alone = step.times(steps)
        loader = Loader(layout, limit, pool, host)
        say(f"decode beside a layer-wise load, {layout} by {loader.way}, {loader.multiprocessors} multiprocessors")
        with loader:
            while not loader.times and not loader.failed:
                step.times(5)
            beside = step.times(steps)
        if loader.failed:
            raise RuntimeError(loader.failed[0])
        again = step.times(steps)
        before = statistics.median(alone + again)
        rows.append(
            {
                "subject": "decode",
                "layout": layout,
                "way": str(loader.way),
                "chosen": limit is None,
                "multiprocessors": loader.multiprocessors,
                "step_ms": round(before, 4),
                "beside_ms": round(statistics.median(beside), 4),
                "slower": round(statistics.median(beside) / before - 1, 4),
                "worst_decile": round(sorted(beside)[int(0.9 * len(beside))] / before - 1, 4),
                "load_gb_per_s": round(loader.gb_per_s, 2),
            }
        )
    return rows
