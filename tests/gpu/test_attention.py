"""Paged attention over pages that went to page buffers and came back to other places: equal, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hicache_ext.cuda import BlockShape, Copier, Way
from tests.blocks import PAGES, filled

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

LAYERS, TOKENS, KV_HEADS, HEADS, DIM = 2, 64, 8, 32, 128
POOL, USED = 48, 40


class Pool:
    """K and V pools of two layers with random pages, and the pages that a sequence uses."""

    def __init__(self, pages: str) -> None:
        shape = BlockShape(LAYERS, 2, TOKENS, KV_HEADS, DIM * 2)

        def empty(dims: tuple[int, ...]) -> Any:
            return torch.empty(dims, dtype=torch.uint8, device="cuda")

        self.buffer, _, a = filled("paged", shape, POOL, empty)
        _, _, b = filled(pages, shape, USED, lambda dims: torch.empty(dims, dtype=torch.uint8).pin_memory())
        self.kv = self.buffer.view(torch.bfloat16)  # [L, K, P, T, H, D]
        self.kv.normal_()
        self.copier = Copier(shape, a, b)
        self._draw = np.random.default_rng(2)
        self.table = self._draw.permutation(POOL)[:USED]

    def away_and_back(self, store: Way, load: Way) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        self.copier.store(self.table, np.arange(USED), stream, store)
        self.kv.fill_(float("nan"))
        elsewhere = self._draw.permutation(POOL)[:USED]
        assert (elsewhere != self.table).any()
        self.copier.load(np.arange(USED), elsewhere, stream, load)
        self.table = elsewhere


def flash_attention_3(pool: Pool, q: Any, layer: int) -> Any:
    attention = pytest.importorskip("sgl_kernel.flash_attn").flash_attn_with_kvcache
    table = torch.from_numpy(pool.table).to("cuda", torch.int32)[None]
    lengths = torch.tensor([USED * TOKENS - 5], device="cuda", dtype=torch.int32)
    begins = torch.tensor([0, len(q)], device="cuda", dtype=torch.int32)
    k, v = pool.kv[layer]
    return attention(
        q, k, v, page_table=table, cache_seqlens=lengths, cu_seqlens_q=begins, max_seqlen_q=len(q), causal=True
    )


def flashinfer(pool: Pool, q: Any, layer: int) -> Any:
    wrapper_of = pytest.importorskip("flashinfer").BatchPrefillWithPagedKVCacheWrapper
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    wrapper = wrapper_of(workspace, "NHD", backend="fa2")
    to_int = {"device": "cuda", "dtype": torch.int32}
    wrapper.plan(
        torch.tensor([0, len(q)], **to_int), torch.tensor([0, USED], **to_int),
        torch.from_numpy(pool.table).to("cuda", torch.int32), torch.tensor([TOKENS - 5], **to_int), HEADS, KV_HEADS,
        DIM, TOKENS, causal=True, q_data_type=torch.bfloat16,
    )  # fmt: skip
    return wrapper.run(q, (pool.kv[layer][0], pool.kv[layer][1]))


@pytest.mark.parametrize("attention", [flash_attention_3, flashinfer])
def test_attention_over_pages_that_came_back(attention: Any) -> None:
    q = torch.randn(7, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    for pages in PAGES:
        pool = Pool(pages)
        before = [attention(pool, q, layer) for layer in range(LAYERS)]
        assert not before[0].isnan().any()
        for store, load in ((Way.kernel, Way.engine), (Way.engine, Way.kernel), (Way.kernel, Way.kernel)):
            pool.away_and_back(store, load)
            for layer in range(LAYERS):
                assert torch.equal(attention(pool, q, layer), before[layer])
    pool.kv[0, 0, int(pool.table[3]), 5, 2, 9] += 1
    assert not torch.equal(attention(pool, q, 0), before[0]), "the negative control: one value changed"
