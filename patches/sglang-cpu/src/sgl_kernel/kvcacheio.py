"""Pure-torch versions of the copies between device and host KV pools.

Only those that HiCache calls for MHA and MLA pools, with the io backends `direct` (layouts layer_first and
page_first_direct) and `kernel` (layer_first, page_first, page_head). Names and arguments are SGLang's.

Indices are token slots; pages are contiguous, so a page's first slot gives the page.
"""

import ctypes

import torch

__all__ = [
    "transfer_kv_all_layer",
    "transfer_kv_all_layer_direct_lf_pf",
    "transfer_kv_all_layer_lf_pf",
    "transfer_kv_all_layer_lf_ph",
    "transfer_kv_all_layer_mla",
    "transfer_kv_all_layer_mla_lf_pf",
    "transfer_kv_direct",
    "transfer_kv_per_layer",
    "transfer_kv_per_layer_direct_pf_lf",
    "transfer_kv_per_layer_mla",
    "transfer_kv_per_layer_mla_pf_lf",
    "transfer_kv_per_layer_pf_lf",
    "transfer_kv_per_layer_ph_lf",
]

# ------------------------------------------------------------------ io backend "direct"


def transfer_kv_direct(src_layers, dst_layers, src_indices, dst_indices, page_size):
    for src, dst in zip(src_layers, dst_layers):
        dst[dst_indices] = src[src_indices]


def _pages(indices, page_size):
    return indices[::page_size] // page_size


def transfer_kv_per_layer_direct_pf_lf(src_ptrs, dst_ptrs, src_indices, dst_indices, layer_id, page_size):
    """Host [page, layer, slot, head, dim] -> device layer [slot, head, dim]."""
    pages = _pages(src_indices, page_size)
    for src, dst in zip(src_ptrs, dst_ptrs):
        dst[dst_indices] = src[pages, layer_id].reshape(-1, *dst.shape[1:])


def transfer_kv_all_layer_direct_lf_pf(src_ptrs, dst_ptrs, src_indices, dst_indices, page_size):
    """Device layers, K then V -> host [page, layer, slot, head, dim]."""
    pages = _pages(dst_indices, page_size)
    layers = len(src_ptrs) // len(dst_ptrs)
    for group, dst in enumerate(dst_ptrs):
        for layer in range(layers):
            src = src_ptrs[group * layers + layer]
            dst[pages, layer] = src[src_indices].reshape(pages.numel(), page_size, *dst.shape[3:])


# ------------------------------------------------------------------ io backend "kernel"
# The kernels take tables of layer addresses and sizes in bytes, so these work on bytes too.


def _rows(address, indices, item_size):
    """The memory behind a layer's address, [slots, item_size] bytes, up to the highest slot in use."""
    count = (int(indices.max()) + 1) * item_size
    memory = (ctypes.c_uint8 * count).from_address(int(address))
    return torch.frombuffer(memory, dtype=torch.uint8).view(-1, item_size)


def _bytes(tensor, item_size):
    """A contiguous tensor as [rows, item_size] bytes."""
    return tensor.view(-1).view(torch.uint8).view(-1, item_size)


def transfer_kv_per_layer_mla(src, dst, src_indices, dst_indices, item_size, **_):
    _bytes(dst, item_size)[dst_indices] = _bytes(src, item_size)[src_indices]


def transfer_kv_per_layer(src_k, dst_k, src_v, dst_v, src_indices, dst_indices, item_size, **_):
    transfer_kv_per_layer_mla(src_k, dst_k, src_indices, dst_indices, item_size)
    transfer_kv_per_layer_mla(src_v, dst_v, src_indices, dst_indices, item_size)


def transfer_kv_all_layer_mla(src_layers, dst_layers, src_indices, dst_indices, item_size, num_layers, **_):
    for layer in range(num_layers):
        src = _rows(src_layers[layer], src_indices, item_size)
        _rows(dst_layers[layer], dst_indices, item_size)[dst_indices] = src[src_indices]


def transfer_kv_all_layer(
    src_k_layers, dst_k_layers, src_v_layers, dst_v_layers, src_indices, dst_indices, item_size, num_layers, **_
):
    transfer_kv_all_layer_mla(src_k_layers, dst_k_layers, src_indices, dst_indices, item_size, num_layers)
    transfer_kv_all_layer_mla(src_v_layers, dst_v_layers, src_indices, dst_indices, item_size, num_layers)


def transfer_kv_per_layer_mla_pf_lf(src, dst, src_indices, dst_indices, layer_id, item_size, src_layout_dim, **_):
    """Host [slot, layer, ...] -> device layer; `src_layout_dim` is the bytes of one slot's layers."""
    layers = src_layout_dim // item_size
    host = _bytes(src, item_size).view(-1, layers, item_size)
    _bytes(dst, item_size)[dst_indices] = host[src_indices, layer_id]


def transfer_kv_per_layer_pf_lf(
    src_k, dst_k, src_v, dst_v, src_indices, dst_indices, layer_id, item_size, src_layout_dim, **_
):
    for src, dst in ((src_k, dst_k), (src_v, dst_v)):
        transfer_kv_per_layer_mla_pf_lf(src, dst, src_indices, dst_indices, layer_id, item_size, src_layout_dim)


def transfer_kv_all_layer_mla_lf_pf(
    src_layers, dst, src_indices, dst_indices, item_size, dst_layout_dim, num_layers, **_
):
    host = _bytes(dst, item_size).view(-1, dst_layout_dim // item_size, item_size)
    for layer in range(num_layers):
        host[dst_indices, layer] = _rows(src_layers[layer], src_indices, item_size)[src_indices]


def transfer_kv_all_layer_lf_pf(
    src_k_layers, dst_k, src_v_layers, dst_v, src_indices, dst_indices, item_size, dst_layout_dim, num_layers, **_
):
    for src, dst in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        transfer_kv_all_layer_mla_lf_pf(src, dst, src_indices, dst_indices, item_size, dst_layout_dim, num_layers)


def _by_head(host, item_size, head_num, page_size):
    """Host [page, head, slot, layer, dim] as bytes of one head's dim."""
    return _bytes(host, item_size // head_num).view(-1, head_num, page_size, host.shape[3], item_size // head_num)


def transfer_kv_per_layer_ph_lf(
    src_k, dst_k, src_v, dst_v, src_indices, dst_indices, layer_id, item_size, src_layout_dim, page_size, head_num, **_
):
    page, slot = src_indices // page_size, src_indices % page_size
    for src, dst in ((src_k, dst_k), (src_v, dst_v)):
        host = _by_head(src, item_size, head_num, page_size)
        _bytes(dst, item_size)[dst_indices] = host[page, :, slot, layer_id].reshape(-1, item_size)


def transfer_kv_all_layer_lf_ph(
    src_k_layers, dst_k, src_v_layers, dst_v, src_indices, dst_indices, item_size, dst_layout_dim, num_layers,
    page_size, head_num, **_
):  # fmt: skip
    page, slot = dst_indices // page_size, dst_indices % page_size
    for src_layers, dst in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        host = _by_head(dst, item_size, head_num, page_size)
        for layer in range(num_layers):
            rows = _rows(src_layers[layer], src_indices, item_size)[src_indices]
            host[page, :, slot, layer] = rows.view(-1, head_num, item_size // head_num)
