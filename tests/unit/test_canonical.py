"""Canonical pages: golden vectors, every order that engines keep KV in, and what must not be shared."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache_ext import canonical
from hicache_ext.canonical import Packed, Shape, Strided, gather, heads_shard, mismatch, objection, scatter
from hicache_ext.config import Config
from hicache_ext.doctor import sharing as doctor
from hicache_ext.page import Shard
from hicache_ext.store.copies import CopyBudget
from storage_backends.base import Outcome

torch = pytest.importorskip("torch")

LAYERS, HEADS, DIM, TOKENS, BLOCKS = 3, 2, 4, 4, 8
SHAPE = Shape("mha", LAYERS, 0, HEADS, DIM, "float32", 8)
LLAMA = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 8, "num_key_value_heads": 2}
CONFIG = Config.model_validate({"tiers": [{"type": "memory"}], "share": "engines"})

SPACE = canonical.Namespace("m", "w", SHAPE.layout, tag=canonical.TAG)
HIT, MISS, CORRUPT = Outcome.HIT, Outcome.MISS, Outcome.CORRUPT


def model(folder: Path, **more: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**LLAMA, **more}))
    return folder


def numbered(slots: int = BLOCKS * TOKENS) -> Any:
    """float32[slot, layer, K and V, head, dim]: every element tells where it is."""
    shape = (slots, LAYERS, 2, HEADS, DIM)
    return torch.arange(int(np.prod(shape)), dtype=torch.float32).view(shape)


def blocks(values: Any) -> Any:
    """[layer, K and V, block, token, head, dim] of the same."""
    return values.unflatten(0, (-1, TOKENS)).permute(2, 3, 0, 1, 4, 5)


def laid_out(values: Any, order: tuple[int, ...]) -> Any:
    """A tensor of vLLM's logical axes [layer, block, head, token, K beside V] whose memory has them in this order."""
    logical = torch.cat([blocks(values)[:, 0], blocks(values)[:, 1]], -1).transpose(2, 3)
    memory = logical.permute(order).contiguous()
    return memory.permute([order.index(axis) for axis in range(5)])


def batch(pages: int, space: Any = None) -> Any:
    staged = CopyBudget(1 << 24).take(canonical.pages(space or SPACE, bytes(32 * pages), None))
    assert staged is not None
    return staged


def contents(of: Any) -> list[bytes]:
    return [bytes(of.buffers(page)[0]) for page in range(len(of))]


def test_golden_page() -> None:
    """[layer][K, V][token][head][dim], packed, little-endian: by the formula, and as it was first."""
    staged = batch(1)
    gather(SHAPE, Strided(list(blocks(numbered()))), np.arange(4, 12), staged)
    (page,) = contents(staged)
    expected = [
        float((((slot * LAYERS + layer) * 2 + side) * HEADS + head) * DIM + dim)
        for layer in range(LAYERS) for side in range(2) for slot in range(4, 12) for head in range(HEADS)
        for dim in range(DIM)
    ]  # fmt: skip
    assert np.frombuffer(page, "<f4").tolist() == expected
    assert hashlib.sha256(page).hexdigest() == GOLDEN_PAGE
    latent = Shape("mla", 2, 0, 1, 3, "bfloat16", 4)
    values = torch.arange(2 * 4 * 3).to(torch.bfloat16).view(2, 1, 1, 4, 1, 3)
    staged = batch(1, canonical.Namespace("m", "w", latent.layout, tag=canonical.TAG))
    gather(latent, Strided([list(layer) for layer in values]), np.arange(4), staged)
    assert contents(staged) == [values.view(torch.uint8).numpy().tobytes()], "MLA: [layer][token][dim]"


def test_golden_namespace(tmp_path: Path) -> None:
    """Nothing of an engine is in it: another engine must come to the same sixteen bytes."""
    space = canonical.namespace(CONFIG, model(tmp_path), "commit:1", SHAPE, Shard())
    assert space.digest.hex() == GOLDEN_NAMESPACE
    others = [
        canonical.namespace(CONFIG, model(tmp_path), "commit:2", SHAPE, Shard()),
        canonical.namespace(CONFIG, model(tmp_path), "commit:1", replace(SHAPE, page_size=16), Shard()),
        canonical.namespace(CONFIG, model(tmp_path), "commit:1", replace(SHAPE, dtype="bfloat16"), Shard()),
        canonical.namespace(CONFIG, model(tmp_path), "commit:1", replace(SHAPE, first_layer=3), Shard()),
        canonical.namespace(CONFIG, model(tmp_path), "commit:1", SHAPE, heads_shard(1, 2, 2)),
        canonical.namespace(CONFIG.model_copy(update={"salt": "s"}), model(tmp_path), "commit:1", SHAPE, Shard()),
        canonical.namespace(CONFIG, model(tmp_path, rope_theta=1.0), "commit:1", SHAPE, Shard()),
    ]
    assert len({space.digest, *(other.digest for other in others)}) == 8


#: As vLLM's KVCacheLayout has them: which logical axis is where in memory.
VLLM = {
    "LBHNC": (0, 1, 2, 3, 4), "LBNHC": (0, 1, 3, 2, 4), "LHBNC": (0, 2, 1, 3, 4), "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4), "BHLNC": (1, 2, 0, 3, 4),
}  # fmt: skip


@pytest.mark.parametrize("layout", VLLM)
@pytest.mark.parametrize("kernel", ["FLASH_ATTN", "TRITON_ATTN"])
def test_vllm_blocks_of_every_layout(layout: str, kernel: str) -> None:
    pytest.importorskip("hicache_ext.vllm.sharing")
    from hicache_ext.vllm.sharing import Unshared, planes_of

    def layers(name: str) -> list[Any]:
        backend = SimpleNamespace(get_name=lambda: name)
        return [SimpleNamespace(get_attn_backend=lambda: backend)] * LAYERS

    values = numbered()
    planes = planes_of(list(laid_out(values, VLLM[layout])), layers(kernel), SHAPE)
    staged, wanted = batch(2), np.random.default_rng(1).permutation(BLOCKS * TOKENS)[:16]
    gather(SHAPE, planes, wanted, staged)
    by_definition = batch(2)
    gather(SHAPE, Strided(list(blocks(values))), wanted, by_definition)
    assert contents(staged) == contents(by_definition)
    empty = laid_out(torch.zeros_like(values), VLLM[layout])
    scatter(SHAPE, planes_of(list(empty), layers(kernel), SHAPE), wanted, staged, [0, 1])
    there = laid_out(values, VLLM[layout])
    for slot in range(BLOCKS * TOKENS):
        block, token = divmod(slot, TOKENS)
        expected = there[:, block, :, token] if slot in wanted else torch.zeros_like(there[:, block, :, token])
        assert torch.equal(empty[:, block, :, token], expected)
    with pytest.raises(Unshared, match="the blocks of FLEX are not known"):
        planes_of(list(empty), layers("FLEX"), SHAPE)
    with pytest.raises(Unshared, match="blocks of shape"):
        planes_of([layer[..., 1:] for layer in empty], layers(kernel), SHAPE)


@given(st.data())
def test_pages_come_back_wherever_their_slots_are(data: st.DataObject) -> None:
    """Any slots, some of them nowhere, some pages not chosen: what was gathered is there, nothing else has changed."""
    pages = data.draw(st.integers(1, 3))
    numbers = st.lists(
        st.integers(0, BLOCKS * TOKENS - 1), min_size=pages * 8, max_size=pages * 8, unique=True
    ).map(np.array)  # fmt: skip
    slots = data.draw(numbers)
    slots[data.draw(st.lists(st.integers(0, len(slots) - 1), max_size=10))] = -1
    chosen = sorted(data.draw(st.sets(st.integers(0, pages - 1))))
    packed = data.draw(st.booleans())
    order = torch.randperm(2 * TOKENS * HEADS * DIM, generator=torch.Generator().manual_seed(3))

    def planes(values: Any) -> tuple[Any, Any]:
        """The planes, and what makes numbers by slot of them again."""
        if not packed:
            memory = blocks(values).contiguous()
            return Strided([list(layer) for layer in memory]), lambda: memory.permute(2, 3, 0, 1, 4, 5).flatten(0, 1)
        flat = blocks(values).transpose(1, 2).flatten(2)
        memory = torch.empty_like(flat)
        memory[..., order] = flat
        places = order.view(2, TOKENS, HEADS, DIM)
        return (
            Packed(list(memory), places),
            lambda: (
                memory[..., order].view(LAYERS, BLOCKS, 2, TOKENS, HEADS, DIM).permute(1, 3, 0, 2, 4, 5).flatten(0, 1)
            ),
        )

    staged, source = batch(pages), numbered()
    gather(SHAPE, planes(source)[0], slots, staged)
    target, by_slot = planes(torch.full_like(source, -1.0))
    scatter(SHAPE, target, slots, staged, chosen)
    expected = torch.full_like(source, -1.0)
    moved = [slot for page in chosen for slot in slots.reshape(pages, 8)[page].tolist() if slot >= 0]
    expected[moved] = source[moved]
    assert torch.equal(by_slot(), expected)


@pytest.mark.parametrize(
    ("block", "numbers", "skip", "lead", "outcomes", "lost", "changed"),
    [
        (4, (5, 2, 7, 0), 0, 0, (HIT, MISS), [0, 7], {5, 2}),
        (4, (5, 2, 7, 0), 0, 4, (HIT, HIT), [], {2, 7, 0}),
        (4, (5, 2, 7, 0), 0, 4, (CORRUPT, HIT), [2], {7, 0}),
        (8, (3, 1), 0, 0, (MISS, HIT), [3], {1}),
        (16, (1, 0), 0, 0, (HIT, HIT, MISS, HIT), [0], {1}),
    ],
    ids=["grouped", "its first block is there", "a bad page spares it", "alike", "split"],
)
def test_which_blocks_a_bad_page_costs(
    block: int, numbers: tuple[int, ...], skip: int, lead: int, outcomes: tuple[int, ...], lost: list[int],
    changed: set[int],
) -> None:  # fmt: skip
    """Pages of 8 tokens. What is not reported has arrived; blocks before `lead` are not touched."""
    from hicache_ext.vllm.pages import Pages
    from hicache_ext.vllm.sharing import SharedBlocks

    values = numbered().unflatten(0, (-1, block)).permute(2, 3, 0, 1, 4, 5).contiguous()
    target = torch.full_like(values, -1.0)
    pages = Pages("r", bytes(32 * len(outcomes)), b"", numbers, skip, lead)
    source = SharedBlocks(SHAPE, Strided([list(layer) for layer in values]), block, CopyBudget(1 << 24))
    copy = source.outgoing(SPACE, replace(pages, lead=0), CopyBudget(1 << 24))
    assert copy is not None
    blocks = SharedBlocks(SHAPE, Strided([list(layer) for layer in target]), block, CopyBudget(1 << 24))
    assert blocks.arrived(pages, copy, outcomes) == lost
    for number in range(values.shape[2]):
        now = target[:, :, number]
        if number in changed:
            assert torch.equal(now, values[:, :, number]), number
        elif number not in numbers or numbers.index(number) * block < lead:
            assert (now == -1.0).all(), number
    assert source.staging.bytes == blocks.staging.bytes == 0


def test_pages_in_the_middle_of_a_block() -> None:
    """A block of 16 tokens of which the second page is to be saved."""
    from hicache_ext.vllm.pages import Pages
    from hicache_ext.vllm.sharing import SharedBlocks

    values = numbered().unflatten(0, (-1, 16)).permute(2, 3, 0, 1, 4, 5).contiguous()
    source = SharedBlocks(SHAPE, Strided([list(layer) for layer in values]), 16, CopyBudget(1 << 24))
    copy = source.outgoing(SPACE, Pages("r", bytes(32), b"", (1,), 8), CopyBudget(1 << 24))
    by_definition = batch(1)
    gather(SHAPE, Strided(list(blocks(numbered()))), np.arange(24, 32), by_definition)
    assert copy is not None
    assert contents(copy) == contents(by_definition)
    assert source.outgoing(SPACE, Pages("r", bytes(32), b"", (1,), 8), CopyBudget(1)) is None, "no room"


def test_a_kernel_is_asked_how_it_packs() -> None:
    from hicache_ext.vllm.packing import learn

    order = torch.randperm(2 * TOKENS * HEADS * DIM, generator=torch.Generator().manual_seed(5))

    def store(
        key: Any, value: Any, cache: Any, slots: Any, change: Any = lambda values: values, extra: int = 0
    ) -> None:
        assert slots.tolist() == list(range(TOKENS, 2 * TOKENS))
        cache[1].view(-1)[order] = change(torch.cat([key.flatten(), value.flatten()]))
        cache[0].view(-1)[:extra] = 1

    for dtype in (torch.bfloat16, torch.float32):
        found = learn(store, dtype, HEADS, DIM, TOKENS)
        assert found is not None
        assert torch.equal(found.flatten(), order)
        for bad in (
            {"change": lambda values: values * 2}, {"change": lambda values: values.clamp(0, 200)},
            {"change": lambda values: values * (values != 7)}, {"extra": 1},
            {"change": lambda values: values.round() if values.max() < 10 else values},
        ):  # fmt: skip
            assert learn(lambda *given, bad=bad: store(*given, **bad), dtype, HEADS, DIM, TOKENS) is None, bad


@pytest.mark.parametrize(
    ("config", "dtype", "reason"),
    [
        (LLAMA, "bfloat16", ""),
        (LLAMA, "float8_e4m3fn", "KV of float8_e4m3fn comes with scales"),
        ({"architectures": ["DeepseekV3ForCausalLM"]}, None, "DeepseekV3ForCausalLM is not among the models"),
        ({}, None, "unknown is not among"),
        ({**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 4096}, None, "a sliding window"),
        ({**LLAMA, "sliding_window": 4096, "use_sliding_window": False}, None, ""),
    ],
)
def test_models_that_are_not_known_are_not_shared(config: Any, dtype: str | None, reason: str) -> None:
    found = objection(config, dtype)
    assert bool(found) == bool(reason)
    assert reason in found


def test_page_sizes() -> None:
    assert [bool(mismatch(page, 64)) for page in (1, 16, 64, 128, 48, 96)] == [False] * 4 + [True] * 2


@pytest.mark.parametrize(
    ("rank", "size", "heads", "part"),
    [(0, 1, 8, (0, 1)), (3, 4, 8, (3, 4)), (3, 8, 2, (0, 2)), (5, 8, 2, (1, 2))],
)
def test_which_heads_a_rank_has(rank: int, size: int, heads: int, part: tuple[int, int]) -> None:
    found = heads_shard(rank, size, heads)
    assert (found.tp_rank, found.tp_size) == part


def test_doctor_says_what_can_be_told(tmp_path: Path) -> None:
    def found(**values: Any) -> str:
        config = Config.model_validate({"tiers": [{"type": "memory"}], **values})
        return " | ".join(f"{finding.level}: {finding.text}" for finding in doctor.probe(config))

    assert found() == ""
    assert "`model.path` is not set" in found(share="engines")
    path = {"path": str(model(tmp_path))}
    assert found(share="engines", share_page=32, model=path).startswith("ok: canonical pages of 32 tokens; KV of this")
    model(tmp_path, architectures=["GptOssForCausalLM"])
    assert "warning: does not hold: GptOssForCausalLM is not among" in found(share="engines", model=path)
    assert "cannot be read" in found(share="engines", model={"path": str(tmp_path / "none")})


GOLDEN_PAGE = "c27544761b58292135e04db240d1e9be4b68033fd5caa4ed9847925fa1a80530"
GOLDEN_NAMESPACE = "a7f444f72e920db7e827a46b966f4d36"
