"""SGLang's device pools as the linker links them: which of them, in which order a page holds their bytes.

Belongs here: from SGLang's pools to planes and page layouts. Does not belong here: what a plane is (linker_planes),
copying and slots (hicache_ext.device), or what the pages mean (identity).

Where a host pool of SGLang's could hold the same bytes (KV of plain attention and of MLA), a page has that host pool's
layout, and with it its namespace: one directory serves the hierarchical cache and the linker. Any other pool's page
is its buffers one after the other, in an order of its own ("linker").
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.hybrid_cache.linker_pool_assembler import (
    DevicePoolEntry,
    DevicePoolGroup,
    resolve_hybrid_device_pool_group,
)
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from hicache_ext.config import ConfigError
from hicache_ext.device.planes import Plane
from hicache_ext.page import PageLayout
from hicache_ext.sglang.linker_planes import DevicePool, row_stride
from hicache_ext.sglang.pools import HostPool

logger = logging.getLogger(__name__)

#: Host layouts whose bytes the linker can make.
LAYOUTS = ("page_first", "page_first_direct", "layer_first", "page_head")
_INSTEAD = "Fix: serve this model with --enable-hierarchical-cache --hicache-storage-backend hicache_ext"


@dataclass(frozen=True)
class DevicePools:
    """All pools of a model. layers: of the forward, each of which waits for its own."""

    group: DevicePoolGroup
    pools: dict[str, DevicePool]

    @property
    def layers(self) -> int:
        return int(self.group.num_layers)


def open_pools(kvcache: Any, params: Any, components: Any, order: str) -> DevicePools:
    """order: the host layout in whose order KV pages are stored. Raises ConfigError for what cannot be linked."""
    if order not in LAYOUTS:
        raise ConfigError(f"--hicache-mem-layout {order}: the linker does not know it. Fix: use one of {LAYOUTS}")
    try:
        group = _group(kvcache, params, components)
    except ValueError as error:
        raise ConfigError(f"hicache_ext linker: {error} {_INSTEAD}") from error
    return DevicePools(group, {str(entry.name): _pool(entry, order) for entry in group.entries})


def _group(kvcache: Any, params: Any, components: Any) -> DevicePoolGroup:
    """SGLang's own assembly, and ours for the plain pools that it leaves to the hierarchical cache."""
    names = {component.name for component in components}
    page = params.page_size
    if type(kvcache) in (MHATokenToKVPool, MLATokenToKVPool) and names == {"FULL"}:
        _check_plain(kvcache, params)
        mapping = {layer: layer for layer in range(kvcache.layer_num)}
        entry = _plain_entry(PoolName.KV, kvcache, mapping, page)
        return DevicePoolGroup([entry], kvcache.layer_num, page, rank_replicated=isinstance(kvcache, MLATokenToKVPool))
    if type(kvcache) is SWAKVPool and names == {"FULL", "SWA"}:
        entries, last = [], 0
        for name, pool, swa in ((PoolName.KV, kvcache.full_kv_pool, False), (PoolName.SWA, kvcache.swa_kv_pool, True)):
            if type(pool) is not MHATokenToKVPool:
                raise ValueError(f"{type(pool).__name__} as the {name} pool of a sliding window is not supported.")
            _check_plain(pool, params)
            mapping = {
                layer - kvcache.start_layer: local
                for layer, (local, is_swa) in kvcache.layers_mapping.items()
                if is_swa is swa
            }
            entries.append(_plain_entry(name, pool, mapping, page))
            last = max(last, *mapping)
        return DevicePoolGroup(entries, last + 1, page)
    return resolve_hybrid_device_pool_group(kvcache=kvcache, page_size=page, params=params, components=components)


def _check_plain(pool: Any, params: Any) -> None:
    what = ""
    if params.mtp_draft_device_pools or params.sidecar_draft_device_pools:
        what = "Draft KV"
    elif getattr(pool, "layer_shard_enabled", False):
        what = "A KV cache whose layers are split over ranks"
    elif getattr(pool, "kv_cache_layout", "nhd") != "nhd":
        what = f"KV cache layout {pool.kv_cache_layout}"
    elif any(getattr(pool, name, None) is not None for name in ("k_scale_buffer", "kv_scale_buffer")):
        what = "A scaled KV cache"
    elif getattr(pool, "native_k_scale_buffer", None) is not None or getattr(pool, "is_quantized_kv_cache", False):
        what = "A quantized KV cache"
    if what:
        raise ValueError(f"{what} is not supported with plain attention.")


def _plain_entry(name: PoolName, pool: Any, mapping: dict[int, int], page: int) -> DevicePoolEntry:
    if isinstance(pool, MLATokenToKVPool):
        buffers, layers = list(pool.kv_buffer), dict(mapping)
    else:
        count = len(pool.k_buffer)
        buffers = [*pool.k_buffer, *pool.v_buffer]
        layers = {layer: (local, count + local) for layer, local in mapping.items()}  # type: ignore[misc]
    return DevicePoolEntry(
        name=name, indices_from_pool=name, device_pool=pool, components=[buffers], layer_mapping=layers,
        page_size=page, rows_are_pages=False,
    )  # fmt: skip


def _pool(entry: DevicePoolEntry, order: str) -> DevicePool:
    mirror = _mirror(entry, order)
    if mirror is not None:
        layout = mirror.layout
        planes = _host_planes(entry, order, mirror.pool)
        if sum(plane.tokens * plane.heads * plane.run for plane in planes) == layout.payload_bytes:
            return DevicePool(str(entry.name), entry, layout, planes, mirror.pool)
        logger.warning("hicache_ext linker: pool %s: its pages are not those of SGLang's host pool", entry.name)
    planes = _packed_planes(entry)
    size = sum(plane.tokens * plane.run for plane in planes)
    kind = entry.device_pool
    if isinstance(kind, (list, tuple)):
        kind = next((one for one in kind if one is not None), None)
    dtypes = sorted({str(plane.buffer.dtype).removeprefix("torch.") for plane in planes})
    geometry: dict[str, int | str] = {
        "class": type(kind).__name__,
        "components": len(entry.components),
        "buffers": len(planes),
        "pieces": ",".join(f"{plane.tokens}x{plane.run}" for plane in sorted(planes, key=lambda plane: plane.at)),
        "device_dtype": str(getattr(kind, "dtype", "") or ""),
    }
    layout = PageLayout(
        str(entry.name), "linker", "+".join(dtypes), entry.page_size, (size,), tuple(sorted(geometry.items()))
    )
    return DevicePool(str(entry.name), entry, layout, planes, kind)


def _mirror(entry: DevicePoolEntry, order: str) -> HostPool | None:
    """A host pool of one page, of the class and facts that the hierarchical cache would have; None: there is none."""
    from sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler import _mha_host_inputs
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

    pool, page = entry.device_pool, entry.page_size
    common = {
        "host_to_device_ratio": 1.0, "host_size": 0, "page_size": page, "layout": order, "pin_memory": False,
        "device": "cpu", "host_token_capacity": page, "pool_label": "linker's one-page",
    }  # fmt: skip
    if type(pool) is MHATokenToKVPool and len(entry.kv_buffer) == 2 * len(pool.k_buffer):
        kind, facts, options = _mha_host_inputs(pool)
        if kind is not MHATokenToKVPoolHost or pool.head_dim != pool.v_head_dim:
            return None
        return HostPool(
            str(entry.name),
            _bare(kind)(facts, **{**options, **common, "write_back_staging": None, "device_capacity_tokens": 0}),
        )
    if type(pool) is MLATokenToKVPool and len(entry.kv_buffer) == len(pool.kv_buffer) and order != "page_head":
        facts = pool.get_device_pool_infos()[0].buffer_info
        return HostPool(
            str(entry.name),
            _bare(MLATokenToKVPoolHost)(
                facts, device_capacity_tokens=0, start_layer=pool.start_layer, end_layer=pool.end_layer,
                target_layer_num=pool.layer_num, override_kv_cache_dim=pool.kv_cache_dim, **common,
            ),
        )  # fmt: skip
    return None


def _bare(kind: type) -> type:
    """The class by the same name, without its preparations for copying, which compile kernels."""
    return type(kind.__name__, (kind,), {"_initialize_transfer_views": lambda self, *_: None})


def _host_planes(entry: DevicePoolEntry, order: str, host_pool: Any) -> tuple[Plane, ...]:
    """As SGLang's host pools order a page: for each of K and V (or the latent) what `order` says."""
    tokens = entry.page_size
    buffers = entry.components[0]
    heads = int(getattr(host_pool, "head_num", 1)) if order == "page_head" else 1
    kv = 1 if isinstance(entry.device_pool, MLATokenToKVPool) else 2
    layers = len(buffers) // kv
    row = _row_bytes(buffers[0])
    run, whole = row // heads, layers * tokens * row
    match order:
        case "page_first":
            step, token, head = row, layers * row, run
        case "page_head":
            step, token, head = run, layers * run, tokens * layers * run
        case "page_first_direct":
            step, token, head = tokens * row, row, run
        case _:  # layer_first: K and V of a layer stand together
            step, token, head, whole = kv * tokens * row, row, run, tokens * row
    readers = _readers(entry)
    planes = []
    for number, buffer in enumerate(buffers):
        part, layer = divmod(number, layers)
        stride = row_stride(buffer)
        at = part * whole + layer * step
        planes.append(Plane(buffer, readers[number], tokens, heads, run, tokens * stride, stride, run, at, token, head))
    return tuple(sorted(planes, key=lambda plane: plane.layer))


def _packed_planes(entry: DevicePoolEntry) -> tuple[Plane, ...]:
    readers, planes, at = _readers(entry), [], 0
    number = 0
    tokens = entry._row_span  # rows of a buffer that are one page
    for component in entry.components:
        for index, buffer in enumerate(component):
            row, stride = _row_bytes(buffer), row_stride(buffer)
            planes.append(Plane(buffer, readers[index], tokens, 1, row, tokens * stride, stride, row, at, row, row))
            at += tokens * row
            number += 1
    return tuple(sorted(planes, key=lambda plane: plane.layer))


def _readers(entry: DevicePoolEntry) -> dict[int, int]:
    """Number of a buffer in its component -> the first layer that waits for it. ConfigError where nobody does."""
    readers: dict[int, int] = {}
    for layer in sorted(entry.layer_mapping):
        mapped = entry.layer_mapping[layer]
        for number in [mapped] if isinstance(mapped, int) else mapped:
            readers.setdefault(int(number), int(layer))
    missing = [number for part in entry.components for number in range(len(part)) if number not in readers]
    if missing:
        raise ConfigError(f"hicache_ext linker: no layer reads buffer {missing[0]} of pool {entry.name}. {_INSTEAD}")
    return readers


def _row_bytes(buffer: Any) -> int:
    if not buffer[0].is_contiguous():
        raise ConfigError(f"hicache_ext linker: a pool's rows of shape {tuple(buffer.shape)} are scattered. {_INSTEAD}")
    return int(buffer[0].numel() * buffer.element_size())
