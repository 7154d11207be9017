"""`share: engines` under SGLang: canonical pages of the KV host pool, or the one line that says why not.

Belongs here: what must hold of SGLang's arguments, model and host pool for their bytes to be shared, and the pool's
pages as canonical ones. Does not belong here: the canonical page (canonical), from SGLang's keys to its keys (chains),
or who calls (backend).

SGLang's page and the canonical one need not be of one size. Of a canonical page that a batch begins in the middle of,
the first part was in the batch before it: that part is kept for a while. Where it is not there any more the page is
left out, and stored when its tokens are computed again.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hicache_ext import canonical
from hicache_ext.canonical import Planes, Shape
from hicache_ext.config import Config
from hicache_ext.page import KEY_BYTES, Namespace, chain_parents, split_keys
from hicache_ext.sglang.chains import Chains, Covered, Run
from hicache_ext.sglang.identity import ModelIdentity
from hicache_ext.sglang.naming import Naming
from hicache_ext.sglang.pools import HostPool
from hicache_ext.sglang.tokens import Noted
from hicache_ext.store import NO_TIER, TieredStore
from hicache_ext.store.copies import CopyBudget
from hicache_ext.store.inject import FaultyStore
from hicache_ext.store.policies import Flags
from storage_backends.base import KeyBatch, Outcome, PageBatch

_STAGING_BYTES = 1 << 30
#: First parts of pages that are kept until the rest comes: one for each backup that ended inside a page.
_KEPT_PARTS = 64

#: Arguments that change what is computed, with no counterpart that could be compared; and what they are when unset.
_FOREIGN = (
    "json_model_override_args", "torchao_config", "speculative_algorithm", "quantization_param_path", "modelopt_quant",
)  # fmt: skip
_UNSET: tuple[Any, ...] = (None, False, "", "auto", "{}", {}, [])


Name = Callable[[PageBatch, Noted, int], PageBatch]


class Unshared(Exception):
    """Bytes cannot be shared; `str()` says why."""


class SharedPool:
    """The KV host pool's pages as canonical ones. Thread-safe as far as the pool's own pages are."""

    def __init__(self, pool: HostPool, shape: Shape, planes: Planes, space: Namespace) -> None:
        self.shape, self.space = shape, space
        self.chains = Chains(pool.page_size, shape.page_size)
        self._page_size, self._planes = pool.page_size, planes
        self._staging = CopyBudget(_STAGING_BYTES)
        self._parts: OrderedDict[bytes, Any] = OrderedDict()
        self._lock = threading.Lock()

    def present(self, store: TieredStore | FaultyStore, space: Namespace, keys: bytes) -> Flags:
        """bool[n]: of SGLang's pages (n x 32 bytes), those that canonical pages in the tiers cover."""
        covered, wanted, at = self._covering(keys)
        if not wanted:
            return np.zeros(len(covered), bool)
        found = store.lookup(_keys_of(space, wanted, covered)) != NO_TIER
        return _all_of(found, covered, at)

    def read(self, store: TieredStore | FaultyStore, space: Namespace, keys: bytes, host_indices: Any) -> bytearray:
        """Fill SGLang's pages; an outcome each. Waits until nothing touches them any more."""
        covered, wanted, at = self._covering(keys)
        outcomes = bytearray([Outcome.MISS]) * len(covered)
        asked = _keys_of(space, wanted, covered) if wanted else None
        staged = None if asked is None else self._staging.take(canonical.pages(space, asked.keys, asked.parents))
        if staged is None:
            return outcomes if asked is None else bytearray([Outcome.REJECTED]) * len(covered)
        try:
            completion = store.read(staged)
            completion.wait()
            told = np.frombuffer(bytes(completion.outcomes), np.uint8)
            slots = np.full(len(staged) * self.shape.page_size, -1, np.int64)
            indices = np.asarray(host_indices, np.int64).reshape(len(covered), self._page_size)
            for page, cover in enumerate(covered):
                if cover is None:
                    continue
                mine = told[at[page] : at[page] + len(cover.keys) // KEY_BYTES]
                outcomes[page] = Outcome.HIT if (mine == Outcome.HIT).all() else int(mine[mine != Outcome.HIT][0])
                if outcomes[page] == Outcome.HIT:
                    begin = at[page] * self.shape.page_size + cover.offset
                    slots[begin : begin + self._page_size] = indices[page]
            canonical.scatter(self.shape, self._planes, slots, staged, np.flatnonzero(told == Outcome.HIT).tolist())
        finally:
            self._staging.give(staged)
        return outcomes

    def write(
        self, store: TieredStore | FaultyStore, space: Namespace, keys: bytes, host_indices: Any, noted: Noted | None,
        naming: Naming, lora: str, named: Name,
    ) -> tuple[PageBatch, bytearray]:  # fmt: skip
        """Store the canonical pages that these pages of SGLang's complete; what was stored, and an outcome for each of
        SGLang's. Pages of which no tokens are known are REJECTED. named: adds what events call pages of SGLang's size.
        """
        count = len(keys) // KEY_BYTES
        nothing = canonical.pages(space, b"", None)
        run = None
        if noted is not None:
            before = noted.before[-1] if noted.before else noted.prefix[-1] if noted.prefix else None
            run = self.chains.learn(split_keys(keys), noted, before, naming, lora)
        if run is None or noted is None:
            return nothing, bytearray([Outcome.REJECTED]) * count
        batch = self._whole(space, run, keys, host_indices)
        if not len(batch):
            return nothing, bytearray([Outcome.REJECTED]) * count
        try:
            if len(batch) == count and not run.lead:
                batch = replace(named(replace(batch, keys=keys), noted, self._page_size), keys=batch.keys)
            completion = store.write(batch)
            completion.wait()
        finally:
            self._staging.give(batch)
        outcomes = bytes(completion.outcomes)
        worst = next((outcome for outcome in outcomes if outcome != Outcome.HIT), Outcome.HIT)
        return batch, bytearray([Outcome.FAILED if Outcome.FAILED in outcomes else worst]) * count

    def _whole(self, space: Namespace, run: Run, keys: bytes, host_indices: Any) -> PageBatch:
        """The canonical pages that are whole with these of SGLang's, copied; an empty batch for none, or no room."""
        size, nothing = self.shape.page_size, canonical.pages(space, b"", None)
        slots = np.concatenate([np.full(run.lead, -1, np.int64), np.asarray(host_indices, np.int64)])
        count = len(slots) // size
        first = self._part(space, run.parent_page) if run.lead else None
        if len(slots) % size:
            self._keep(space.digest + keys[-KEY_BYTES:], slots[count * size :], first if not count else None)
        left_out = int(bool(run.lead and first is None))  # its first part is not there any more
        chosen = run.keys[left_out * KEY_BYTES : count * KEY_BYTES]
        if not chosen:
            return nothing
        parent = run.keys[:KEY_BYTES] if left_out else run.parent
        staged = self._staging.take(canonical.pages(space, chosen, chain_parents(chosen, parent)))
        if staged is None:
            return nothing
        try:
            if first is not None:
                canonical.page_of(self.shape, staged, 0)[:, :, : run.lead] = first
            canonical.gather(self.shape, self._planes, slots[left_out * size : count * size], staged)
        except BaseException:
            self._staging.give(staged)
            raise
        return staged

    def _part(self, space: Namespace, page: bytes | None) -> Any | None:
        """The tokens after the last canonical boundary up to the end of this page of SGLang's."""
        with self._lock:
            return None if page is None else self._parts.get(space.digest + page)

    def _keep(self, name: bytes, slots: NDArray[np.int64], first: Any | None) -> None:
        """Keep the bytes of these slots, which the canonical page that a page of SGLang's ends in begins with.

        name: its namespace and key. first: the bytes of the negative slots.
        """
        import torch

        lead = int((slots < 0).sum())
        if lead and first is None:
            return
        layers, parts, _, heads, dim = self.shape.dimensions
        where = torch.from_numpy(slots[lead:].copy())
        rows = [
            torch.stack([self._planes.read(layer, part, where) for part in range(parts)]) for layer in range(layers)
        ]
        kept = torch.stack(rows).view(layers, parts, len(slots) - lead, heads, dim)
        with self._lock:
            self._parts[name] = kept if first is None else torch.cat([first, kept], 2)
            while len(self._parts) > _KEPT_PARTS:
                self._parts.popitem(last=False)

    def _covering(self, keys: bytes) -> tuple[list[Covered | None], list[bytes], list[int]]:
        """What covers each of SGLang's pages; all those canonical keys, once each; where a page's first one is."""
        covered = self.chains.covering(split_keys(keys))
        wanted: list[bytes] = []
        at: list[int] = []
        for cover in covered:
            own = [] if cover is None else split_keys(cover.keys)
            again = bool(own and wanted and wanted[-1] == own[0])
            at.append(len(wanted) - again)
            wanted += own[again:]
        return covered, wanted, at


def _all_of(found: Flags, covered: Sequence[Covered | None], at: Sequence[int]) -> Flags:
    return np.array(
        [
            cover is not None and bool(found[first : first + len(cover.keys) // KEY_BYTES].all())
            for cover, first in zip(covered, at, strict=True)
        ],
        bool,
    )


def _keys_of(space: Namespace, wanted: Sequence[bytes], covered: Sequence[Covered | None]) -> KeyBatch:
    """SGLang's keys of a call are one chain, so the canonical ones are."""
    parent = next(cover.parent for cover in covered if cover is not None)
    keys = b"".join(wanted)
    return KeyBatch(space, keys, chain_parents(keys, parent))


def shared(
    config: Config, args: Any, model: ModelIdentity, storage_config: Any, pool: HostPool, with_plugin: bool
) -> SharedPool:
    """The KV pool as canonical pages. args: SGLang's. Raises Unshared."""
    host = pool.pool
    if not with_plugin:
        raise Unshared("without the plugin no token ids reach the store (check SGLANG_PLUGINS)")
    for name in _FOREIGN:
        if getattr(args, name, None) not in _UNSET:
            raise Unshared(f"{name} changes what is computed")
    if getattr(args, "load_format", "auto") == "dummy":
        raise Unshared("dummy weights are each engine's own")
    if getattr(args, "kv_cache_dtype", "auto") not in _UNSET:
        raise Unshared(f"KV of {args.kv_cache_dtype} comes with scales that are each engine's own")
    if max(int(getattr(storage_config, f"{kind}_size", 1) or 1) for kind in ("attn_cp", "dcp")) > 1:
        raise Unshared("context parallelism spreads a page's tokens over ranks")
    if not model.path or not (Path(model.path) / "config.json").is_file():
        raise Unshared("the model's folder is not known (set `model.path`)")
    described = json.loads((Path(model.path) / "config.json").read_text(encoding="utf-8"))
    if getattr(args, "quantization", None) and "quantization_config" not in described:
        raise Unshared(f"the weights are quantised at load time ({args.quantization})")
    dtype = str(host.dtype).removeprefix("torch.")
    for reason in (canonical.objection(described, dtype), canonical.mismatch(pool.page_size, config.share_page)):
        if reason:
            raise Unshared(reason)
    views = views_of(host, pool.page_size)
    heads, dim = int(views[0][0].shape[2]), int(views[0][0].shape[3])
    shard = canonical.heads_shard(
        int(storage_config.tp_rank), int(storage_config.tp_size), canonical.kv_heads(described)
    )
    if heads * shard.tp_size != canonical.kv_heads(described):
        raise Unshared(f"the host pool has {heads} heads a token")
    begin = getattr(host, "start_layer", None)  # of the pool itself, from some version on
    first = int(getattr(getattr(host, "device_pool", None), "start_layer", 0) or 0) if begin is None else int(begin)
    shape = Shape("mha", len(views), first, heads, dim, dtype, config.share_page)
    space = canonical.namespace(config, Path(model.path), model.weights, shape, shard)
    return SharedPool(pool, shape, canonical.Strided(views), space)


def views_of(host: Any, page_size: int) -> list[list[Any]]:
    """By layer: K and V of an MHA host pool, [pages, tokens, heads, dim]. Raises Unshared for other pools."""
    if type(host).__name__ != "MHATokenToKVPoolHost" or getattr(host, "mtp_draft_device_pools", None):
        raise Unshared(f"host pools of {type(host).__name__} hold other things than one K and one V for each layer")
    layout, layers = str(host.layout), int(host.layer_num)
    sides = [host.k_buffer, host.v_buffer]

    def pages(tensor: Any) -> Any:
        return tensor.unflatten(0, (-1, page_size))

    match layout:
        case "layer_first":
            return [[pages(side[layer]) for side in sides] for layer in range(layers)]
        case "page_first":
            return [[pages(side[:, layer]) for side in sides] for layer in range(layers)]
        case "page_first_direct":
            return [[side[:, layer] for side in sides] for layer in range(layers)]
        case "page_head":
            return [[side[:, :, :, layer].permute(0, 2, 1, 3) for side in sides] for layer in range(layers)]
    raise Unshared(f"host layout {layout} is not known")
