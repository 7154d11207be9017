"""The CPU shim's copies between device and host pools, each layout against a plain loop over tokens.

What belongs here: where bytes land. That the real server runs on them is the end-to-end tests' business.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

SOURCE = Path(__file__).parents[2] / "patches" / "sglang-cpu" / "src" / "sgl_kernel" / "kvcacheio.py"
spec = importlib.util.spec_from_file_location("kvcacheio_of_the_shim", SOURCE)
assert spec is not None
assert spec.loader is not None
kvcacheio = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kvcacheio)

LAYERS, HEADS, DIM, PAGE, PAGES = 3, 2, 4, 4, 6
SLOTS = PAGE * PAGES
ITEM = HEADS * DIM * 4  # bytes of one slot in one layer, float32
HOST_PAGES, DEVICE_PAGES = [4, 0, 3], [1, 5, 2]


def slots(pages: list[int]) -> torch.Tensor:
    return torch.tensor([page * PAGE + slot for page in pages for slot in range(PAGE)])


HOST, DEVICE = slots(HOST_PAGES), slots(DEVICE_PAGES)
SHAPES = {
    "layer_first": (LAYERS, SLOTS, HEADS, DIM),
    "page_first": (SLOTS, LAYERS, HEADS, DIM),
    "page_first_direct": (PAGES, LAYERS, PAGE, HEADS, DIM),
    "page_head": (PAGES, HEADS, PAGE, LAYERS, DIM),
}


def host_item(host: torch.Tensor, layout: str, slot: int, layer: int) -> torch.Tensor:
    """What a layout holds for one slot and layer, [head, dim]."""
    page, within = divmod(slot, PAGE)
    match layout:
        case "layer_first":
            return host[layer, slot]
        case "page_first":
            return host[slot, layer]
        case "page_first_direct":
            return host[page, layer, within]
        case _:
            return host[page, :, within, layer]


def pointers(layers: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([layer.data_ptr() for layer in layers], dtype=torch.uint64)


def backup(layout: str, backend: str, device_k: list, device_v: list, k: torch.Tensor, v: torch.Tensor) -> None:
    if backend == "direct" and layout == "layer_first":
        kvcacheio.transfer_kv_direct(device_k + device_v, [*k, *v], DEVICE, HOST, PAGE)
    elif backend == "direct":
        kvcacheio.transfer_kv_all_layer_direct_lf_pf(device_k + device_v, [k, v], DEVICE, HOST, PAGE)
    else:
        given = {"src_k_layers": pointers(device_k), "src_v_layers": pointers(device_v), "item_size": ITEM}
        given |= {"src_indices": DEVICE, "dst_indices": HOST, "num_layers": LAYERS}
        if layout == "layer_first":
            kvcacheio.transfer_kv_all_layer(**given, dst_k_layers=pointers([*k]), dst_v_layers=pointers([*v]))
        elif layout == "page_first":
            kvcacheio.transfer_kv_all_layer_lf_pf(**given, dst_k=k, dst_v=v, dst_layout_dim=ITEM * LAYERS)
        else:
            kvcacheio.transfer_kv_all_layer_lf_ph(
                **given, dst_k=k, dst_v=v, dst_layout_dim=ITEM * LAYERS, page_size=PAGE, head_num=HEADS
            )


def load(layout: str, backend: str, k: torch.Tensor, v: torch.Tensor, device_k: list, device_v: list) -> None:
    for layer in range(LAYERS):
        to = [device_k[layer], device_v[layer]]
        if backend == "direct" and layout == "layer_first":
            kvcacheio.transfer_kv_direct([k[layer], v[layer]], to, HOST, DEVICE, PAGE)
        elif backend == "direct":
            kvcacheio.transfer_kv_per_layer_direct_pf_lf([k, v], to, HOST, DEVICE, layer, PAGE)
        else:
            given = {"dst_k": to[0], "dst_v": to[1], "src_indices": HOST, "dst_indices": DEVICE, "item_size": ITEM}
            if layout == "layer_first":
                kvcacheio.transfer_kv_per_layer(**given, src_k=k[layer], src_v=v[layer])
            elif layout == "page_first":
                kvcacheio.transfer_kv_per_layer_pf_lf(
                    **given, src_k=k, src_v=v, layer_id=layer, src_layout_dim=ITEM * LAYERS
                )
            else:
                kvcacheio.transfer_kv_per_layer_ph_lf(
                    **given, src_k=k, src_v=v, layer_id=layer, src_layout_dim=ITEM * LAYERS, page_size=PAGE,
                    head_num=HEADS,
                )  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "backend"),
    [
        ("layer_first", "direct"),
        ("page_first_direct", "direct"),
        ("layer_first", "kernel"),
        ("page_first", "kernel"),
        ("page_head", "kernel"),
    ],
)
def test_pages_go_there_and_back(layout: str, backend: str) -> None:
    device_k = [torch.randn(SLOTS, HEADS, DIM) for _ in range(LAYERS)]
    device_v = [torch.randn(SLOTS, HEADS, DIM) for _ in range(LAYERS)]
    k, v = torch.zeros(SHAPES[layout]), torch.zeros(SHAPES[layout])
    backup(layout, backend, device_k, device_v, k, v)
    moved = dict(zip(HOST.tolist(), DEVICE.tolist(), strict=True))
    for host, device in ((k, device_k), (v, device_v)):
        for slot in range(SLOTS):
            for layer in range(LAYERS):
                expected = device[layer][moved[slot]] if slot in moved else torch.zeros(HEADS, DIM)
                assert torch.equal(host_item(host, layout, slot, layer), expected), (slot, layer)
    back_k = [torch.zeros(SLOTS, HEADS, DIM) for _ in range(LAYERS)]
    back_v = [torch.zeros(SLOTS, HEADS, DIM) for _ in range(LAYERS)]
    load(layout, backend, k, v, back_k, back_v)
    for back, device in ((back_k, device_k), (back_v, device_v)):
        for layer in range(LAYERS):
            assert torch.equal(back[layer][DEVICE], device[layer][DEVICE])
            untouched = [slot for slot in range(SLOTS) if slot not in set(DEVICE.tolist())]
            assert not back[layer][untouched].any()


def test_mla_pages_go_there_and_back() -> None:
    item = DIM * 4
    device = [torch.randn(SLOTS, 1, DIM) for _ in range(LAYERS)]
    for layout in ("layer_first", "page_first"):
        host = torch.zeros((LAYERS, SLOTS, 1, DIM) if layout == "layer_first" else (SLOTS, LAYERS, 1, DIM))
        back = [torch.zeros(SLOTS, 1, DIM) for _ in range(LAYERS)]
        given = {"src_layers": pointers(device), "src_indices": DEVICE, "dst_indices": HOST, "item_size": item}
        if layout == "layer_first":
            kvcacheio.transfer_kv_all_layer_mla(**given, dst_layers=pointers([*host]), num_layers=LAYERS)
        else:
            kvcacheio.transfer_kv_all_layer_mla_lf_pf(
                **given, dst=host, dst_layout_dim=item * LAYERS, num_layers=LAYERS
            )
        for layer in range(LAYERS):
            if layout == "layer_first":
                kvcacheio.transfer_kv_per_layer_mla(host[layer], back[layer], HOST, DEVICE, item)
            else:
                kvcacheio.transfer_kv_per_layer_mla_pf_lf(host, back[layer], HOST, DEVICE, layer, item, item * LAYERS)
            assert torch.equal(back[layer][DEVICE], device[layer][DEVICE])
