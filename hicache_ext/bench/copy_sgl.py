"""sgl-kernel's own transfer kernels, and SGLang's JIT kernels, called as SGLang 0.5.17's host pools call them.

Belongs here: those calls, for each layout that SGLang has. Does not belong here: other subjects (copy_subjects).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from hicache_ext.bench.copy_subjects import Cell, Subject

#: Thread blocks of these kernels, unless told otherwise.
_BLOCKS = 2


def by_sgl_kernel(cell: Cell) -> Iterator[Subject]:
    """What SGLang's host pool calls for this layout, and what it could call (io backends kernel and direct)."""
    if cell.layout == "canonical" or not _has_sgl_kernel():
        return
    import torch

    shape, layers = cell.shape, range(cell.shape.layers)
    tokens = np.arange(shape.tokens, dtype=np.int64)
    host_cpu = torch.from_numpy((cell.in_pages[:, None] * shape.tokens + tokens).ravel())
    pool_cpu = torch.from_numpy((cell.in_pools[:, None] * shape.tokens + tokens).ravel())
    host_index, pool_index = host_cpu.cuda(), pool_cpu.cuda()
    heads = (-1, shape.heads, shape.run // 2)
    k_pool, v_pool = ([cell.pool[kv, layer].view(torch.bfloat16).view(heads) for layer in layers] for kv in range(2))
    k_host, v_host = cell.host_array()[0].view(torch.bfloat16), cell.host_array()[1].view(torch.bfloat16)
    pointers = [torch.tensor([t.data_ptr() for t in p], dtype=torch.uint64).cuda() for p in (k_pool, v_pool)]
    run = {
        "page_first": _page_first,
        "page_first_direct": _page_first_direct,
        "layer_first": _layer_first,
        "page_head": _page_head,
    }[cell.layout](cell, k_pool, v_pool, k_host, v_host, host_index, pool_index, host_cpu, pool_cpu, pointers)
    for way, go in run.items():
        subject = Subject("sgl-kernel", way, go, 0 if way == "direct" else _BLOCKS)
        try:
            go()
            torch.cuda.synchronize()
        except Exception as error:  # a JIT module that does not build here, an op that this build lacks
            _left_out(f"{cell.layout} {cell.op} {way}", str(error))
            continue
        yield subject


left_out: dict[str, str] = {}


def _left_out(what: str, why: str) -> None:
    left_out.setdefault(f"sgl-kernel {what}", why.strip().splitlines()[-1][:160] if why.strip() else "failed")


@lru_cache
def _has_sgl_kernel() -> bool:
    try:
        import sgl_kernel.kvcacheio  # noqa: F401
    except Exception as error:
        _left_out("", str(error))
        return False
    return True


def _page_first(
    cell: Cell, kp: Any, vp: Any, kh: Any, vh: Any, hi: Any, pi: Any, hc: Any, pc: Any, pointers: Any
) -> dict[str, Callable[[], Any]]:
    import torch
    from sgl_kernel import kvcacheio as sgl

    shape = cell.shape
    element, dim = shape.row // 2, shape.row * shape.layers
    kh = kh.reshape(-1, shape.layers, element)
    vh = vh.reshape(-1, shape.layers, element)
    ways: dict[str, Callable[[], Any]] = {}
    if cell.load:

        def aot() -> None:
            for layer in range(shape.layers):
                sgl.transfer_kv_per_layer_pf_lf(
                    src_k=kh, dst_k=kp[layer], src_v=vh, dst_v=vp[layer], src_indices=hi, dst_indices=pi,
                    layer_id=layer, item_size=shape.row, src_layout_dim=dim,
                )  # fmt: skip

        ways["aot"] = aot
        if jit := _jit():
            k_of, v_of = kh.transpose(0, 1), vh.transpose(0, 1)

            def by_jit() -> None:
                for layer in range(shape.layers):
                    jit.transfer_hicache_one_layer(
                        k_cache_dst=kp[layer], v_cache_dst=vp[layer], k_cache_src=k_of[layer],
                        v_cache_src=v_of[layer], indices_dst=pi, indices_src=hi, element_dim=element,
                    )  # fmt: skip

            ways["jit"] = by_jit
        return ways
    ways["aot"] = lambda: sgl.transfer_kv_all_layer_lf_pf(
        src_k_layers=pointers[0], dst_k=kh, src_v_layers=pointers[1], dst_v=vh, src_indices=pi, dst_indices=hi,
        item_size=shape.row, dst_layout_dim=dim, num_layers=shape.layers,
    )  # fmt: skip
    if jit := _jit():
        capacity = min(cell.pages, 64) * shape.tokens
        stage = [torch.empty(capacity, shape.layers, 1, element, dtype=torch.bfloat16, device="cuda") for _ in "kv"]
        heads = (-1, shape.layers, 1, element)
        ways["jit staged"] = lambda: jit.transfer_hicache_all_layer_staged_lf_pf(
            k_ptr_src=pointers[0], v_ptr_src=pointers[1], src_indices=pi, dst_indices=hc, staging_k=stage[0],
            staging_v=stage[1], dst_k=kh.view(heads), dst_v=vh.view(heads), page_size=shape.tokens,
        )  # fmt: skip
    return ways


def _layer_first(
    cell: Cell, kp: Any, vp: Any, kh: Any, vh: Any, hi: Any, pi: Any, hc: Any, pc: Any, pointers: Any
) -> dict[str, Callable[[], Any]]:
    import torch
    from sgl_kernel import kvcacheio as sgl

    shape = cell.shape
    element = shape.row // 2
    k_of = [k.reshape(-1, shape.heads, shape.run // 2) for k in kh]
    v_of = [v.reshape(-1, shape.heads, shape.run // 2) for v in vh]
    there = [torch.tensor([t.data_ptr() for t in of], dtype=torch.uint64).cuda() for of in (k_of, v_of)]
    jit = _jit()

    def each(call: Callable[[int], Any]) -> Callable[[], None]:
        def go() -> None:
            for layer in range(shape.layers):
                call(layer)

        return go

    if cell.load:
        ways = {
            "aot": each(
                lambda i: sgl.transfer_kv_per_layer(
                    src_k=k_of[i], dst_k=kp[i], src_v=v_of[i], dst_v=vp[i], src_indices=hi, dst_indices=pi,
                    item_size=shape.row,
                )
            ),
            "direct": each(
                lambda i: sgl.transfer_kv_direct(
                    src_layers=[k_of[i], v_of[i]], dst_layers=[kp[i], vp[i]], src_indices=hc, dst_indices=pc,
                    page_size=shape.tokens,
                )
            ),
        }  # fmt: skip
        if jit:
            ways["jit"] = each(
                lambda i: jit.transfer_hicache_one_layer(
                    k_cache_dst=kp[i], v_cache_dst=vp[i], k_cache_src=k_of[i], v_cache_src=v_of[i], indices_dst=pi,
                    indices_src=hi, element_dim=element,
                )
            )  # fmt: skip
        return ways
    stores: dict[str, Callable[[], Any]] = {
        "aot": lambda: sgl.transfer_kv_all_layer(
            src_k_layers=pointers[0], dst_k_layers=there[0], src_v_layers=pointers[1], dst_v_layers=there[1],
            src_indices=pi, dst_indices=hi, item_size=shape.row, num_layers=shape.layers,
        ),
        "direct": lambda: sgl.transfer_kv_direct(
            src_layers=[*kp, *vp], dst_layers=[*k_of, *v_of], src_indices=pc, dst_indices=hc, page_size=shape.tokens
        ),
    }  # fmt: skip
    if jit:
        stores["jit"] = lambda: jit.transfer_hicache_all_layer(
            k_ptr_dst=there[0], v_ptr_dst=there[1], indices_dst=hi, k_ptr_src=pointers[0], v_ptr_src=pointers[1],
            indices_src=pi, kv_cache_src_stride_bytes=shape.row, kv_cache_dst_stride_bytes=shape.row,
            element_size=shape.row,
        )  # fmt: skip
    return stores


def _page_first_direct(
    cell: Cell, kp: Any, vp: Any, kh: Any, vh: Any, hi: Any, pi: Any, hc: Any, pc: Any, pointers: Any
) -> dict[str, Callable[[], Any]]:
    from sgl_kernel import kvcacheio as sgl

    shape = cell.shape

    def load() -> None:
        for layer in range(shape.layers):
            sgl.transfer_kv_per_layer_direct_pf_lf(
                src_ptrs=[kh, vh], dst_ptrs=[kp[layer], vp[layer]], src_indices=hc, dst_indices=pc, layer_id=layer,
                page_size=shape.tokens,
            )  # fmt: skip

    def store() -> None:
        sgl.transfer_kv_all_layer_direct_lf_pf(
            src_ptrs=[*kp, *vp], dst_ptrs=[kh, vh], src_indices=pc, dst_indices=hc, page_size=shape.tokens
        )

    return {"direct": load if cell.load else store}


def _page_head(
    cell: Cell, kp: Any, vp: Any, kh: Any, vh: Any, hi: Any, pi: Any, hc: Any, pc: Any, pointers: Any
) -> dict[str, Callable[[], Any]]:
    from sgl_kernel import kvcacheio as sgl

    shape = cell.shape
    common = {"item_size": shape.row, "page_size": shape.tokens, "head_num": shape.heads}
    dim = shape.row * shape.layers

    def load() -> None:
        for layer in range(shape.layers):
            sgl.transfer_kv_per_layer_ph_lf(
                src_k=kh, dst_k=kp[layer], src_v=vh, dst_v=vp[layer], src_indices=hi, dst_indices=pi, layer_id=layer,
                src_layout_dim=dim, **common,
            )  # fmt: skip

    def store() -> None:
        sgl.transfer_kv_all_layer_lf_ph(
            src_k_layers=pointers[0], dst_k=kh, src_v_layers=pointers[1], dst_v=vh, src_indices=pi, dst_indices=hi,
            dst_layout_dim=dim, num_layers=shape.layers, **common,
        )  # fmt: skip

    return {"aot": load if cell.load else store}


@lru_cache
def _jit() -> Any:
    """SGLang's own JIT kernels, for rows of one kibibyte; None where they are not."""
    try:
        from sglang.kernels.ops.kvcache import hicache

        return hicache
    except Exception as error:
        _left_out("jit", str(error))
        return None
