"""HiCacheConnector: vLLM's KVConnectorBase_V1 over a TieredStore.

Belongs here: vLLM's calls, and which half they are for. Does not belong here: what the halves do (scheduler, worker),
or who we are (identity).

    --kv-transfer-config '{"kv_connector": "HiCacheConnector", "kv_connector_module_path": "hicache_ext.vllm",
                           "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
                           "kv_connector_extra_config": {"config": "hicache.yaml"}}'
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA

from hicache_ext import fingerprint
from hicache_ext.page import Namespace, PageLayout
from hicache_ext.vllm import events, identity, sharing, stores, versions
from hicache_ext.vllm.blocks import Blocks, UnsupportedLayout, blocks_of
from hicache_ext.vllm.device_blocks import DeviceBlocks, own_blocks
from hicache_ext.vllm.device_moves import DeviceMoves, objection
from hicache_ext.vllm.metadata import StepMetadata, WorkerMetadata, WorkerReport
from hicache_ext.vllm.moves import HostMoves, Moves
from hicache_ext.vllm.scheduler import SchedulerHalf
from hicache_ext.vllm.settings import Settings
from hicache_ext.vllm.sharing import SharedBlocks
from hicache_ext.vllm.stats import PromStats, Stats
from hicache_ext.vllm.worker import WorkerHalf

logger = logging.getLogger(__name__)

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    _SOURCES = {"CPU": CacheHitSource.HOST, "DISK": CacheHitSource.DISK}
except ImportError:  # before vLLM counted hits by source
    CacheHitSource = None
    _SOURCES = {}

#: How a worker says what became of its loads; before it there was `get_finished`, which cannot say of a request that it
#: failed.
_RESULTS = getattr(base, "KVConnectorTransferResults", None)


class HiCacheConnector(KVConnectorBase_V1, SupportsHMA):
    """One half: the scheduler's, or a worker's. Raises when it is built, and only then, what is wrong."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        _speak()
        self._version = versions.check(vllm.__version__)
        self._settings = Settings.of(vllm_config.kv_transfer_config)
        groups = kv_cache_config.kv_cache_groups
        self._page_size, windows = _groups(groups)
        self._layers = [list(group.layer_names) for group in groups]
        if len(groups) > 1 and _RESULTS is None:
            raise UnsupportedLayout(
                f"hicache_ext: {len(groups)} groups of KV blocks need a newer vLLM than {vllm.__version__}. "
                "Fix: start vLLM with --disable-hybrid-kv-cache-manager"
            )
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        self._store = stores.acquire(self._settings.config)
        self._closed = False
        self._invalid: set[int] = set()
        self._pool: Any = None
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerHalf(self._settings, self._store, self._page_size, windows)

    @property
    def _publishes(self) -> bool:
        """Whether vLLM publishes KV events."""
        wanted = self._vllm_config.kv_events_config
        return wanted is not None and bool(wanted.enable_kv_cache_events)

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a page that was not stored is a miss later, nothing more

    # ---- worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        config = self._vllm_config
        device = str(next(iter(kv_caches.values())).device.type)
        if device not in ("cpu", "cuda"):
            raise UnsupportedLayout(f"hicache_ext: KV blocks on {device} are not supported, only a CPU's and a GPU's")
        if device != "cpu" and (reason := objection(config)):
            raise UnsupportedLayout(f"hicache_ext: {reason}")
        from vllm.distributed import get_pp_group, get_tp_group

        rank = identity.rank_of(config, get_tp_group().rank_in_group, get_pp_group().rank_in_group)
        shared = self._shared(kv_caches, rank)
        groups = (
            [shared] if shared else [self._own(kv_caches, group, device, rank) for group in range(len(self._layers))]
        )
        blocks, spaces = zip(*groups, strict=True)
        options, copies = self._settings.options, ""

        def moves(count: Callable[[str, int], None]) -> Moves:
            nonlocal copies
            if device == "cpu":
                return HostMoves(self._store, blocks, int(options.save_bytes), count)
            made = DeviceMoves(
                self._store, blocks, spaces, int(options.load_bytes), int(options.save_bytes),
                int(options.device_staging_bytes), count,
            )  # fmt: skip
            copies = f", {made.copies}"
            return made

        self._worker = WorkerHalf(self._settings, self._store, moves, spaces, rank.writes, self._publishes)
        for space in spaces:
            layout = space.layout
            logger.info(
                "hicache_ext: tiers %s, pages of %s tokens and %s bytes in %s pieces, namespace %s%s",
                [tier.label for tier in self._settings.config.tiers], layout.page_size, layout.payload_bytes,
                len(layout.buffer_lengths), space.digest.hex(), copies,
            )  # fmt: skip

    def _shared(
        self, kv_caches: dict[str, Any], rank: identity.Rank
    ) -> tuple[SharedBlocks | DeviceBlocks, Namespace] | None:
        """Canonical pages where they are wanted and can be; else None, and why not is said once."""
        settings, config = self._settings.config, self._vllm_config
        if settings.share != "engines":
            return None
        layers = config.compilation_config.static_forward_context
        spec = self._kv_cache_config.kv_cache_groups[0].kv_cache_spec
        tensors = {name: kv_caches[name] for name in self._layers[0]}
        try:
            if len(self._layers) > 1:
                raise sharing.Unshared(f"the model has {len(self._layers)} groups of KV blocks")
            found = sharing.shared(settings, config, spec, tensors, layers, rank.tp_rank)
        except sharing.Unshared as reason:
            logger.warning("hicache_ext: `share: engines` does not hold here: %s. Pages are this engine's own", reason)
            return None
        logger.info(
            "hicache_ext: pages are shared with other engines, %s tokens each; those with images, other multimodal "
            "inputs or LoRA adapters with vLLM only", settings.share_page,
        )  # fmt: skip
        return found

    def _own(
        self, kv_caches: dict[str, Any], group: int, device: str, rank: identity.Rank
    ) -> tuple[Blocks | DeviceBlocks, Namespace]:
        """Blocks of one group as vLLM has them."""
        config, cache, names = self._vllm_config, self._kv_cache_config, self._layers[group]
        tensors = {name: kv_caches[name] for name in names}
        first = kv_caches[names[0]]
        order: tuple[tuple[str, int | str], ...] = ()
        blocks: Blocks | DeviceBlocks
        if device == "cpu":
            blocks = blocks_of(tensors, names, cache.num_blocks)
            lengths = tuple(int(length) for length in blocks.lengths)
        else:
            blocks = own_blocks(tensors, names, cache.num_blocks, self._page_size)
            lengths = (blocks.page_bytes,)
            # Before 0.32 the shape is the same for every order in memory.
            order = (("strides", str(tuple(first.stride()[1:]))),)
        layers = config.compilation_config.static_forward_context
        backends = [layers[name].get_attn_backend().get_name() for name in names if name in layers]
        layout = PageLayout(
            kind="mla" if getattr(config.model_config, "use_mla", False) else "mha",
            order=identity.block_format(backends, device, getattr(cache, "kv_cache_layout", None), self._version),
            dtype=str(first.dtype).removeprefix("torch."),
            page_size=self._page_size,
            buffer_lengths=lengths,
            geometry=(
                ("layers", len(names)),
                ("names", fingerprint.digest(names)[:16]),
                ("shape", str(tuple(first.shape[1:]))),
                *order,
            ),
        )
        return blocks, identity.namespace(self._settings.config, config, layout, rank)

    def get_handshake_metadata(self) -> WorkerMetadata | None:
        return None if self._worker is None else WorkerMetadata(self._worker.spaces)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        # In most steps there is nothing to do, and each call here is one of every step.
        if self._worker is not None and ((meta := self._step()).loads or meta.idle):
            self._worker.load(meta)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads end between steps, before the request is scheduled: others compute meanwhile, and CUDA graphs stay
        whole, which vLLM would have to cut at every layer otherwise."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are saved whole, at the end of the step."""

    def wait_for_save(self) -> None:
        if self._worker is None or self._connector_metadata is None:
            return
        if (meta := self._step()).saves or meta.leaving:
            self._worker.save(meta)

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Before each step's forward, whether anybody was preempted or not."""
        if self._worker is not None and isinstance(kv_connector_metadata, StepMetadata) and kv_connector_metadata.fresh:
            self._worker.make_way(kv_connector_metadata)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Of vLLM without get_transfer_results."""
        if self._worker is None:
            return None, None
        arrived, self._invalid, _ = self._worker.finished_loads()
        return None, arrived

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        assert _RESULTS is not None
        if self._worker is None:
            return _RESULTS()
        arrived, invalid, failed = self._worker.finished_loads()
        if len(self._layers) > 1:  # of several groups vLLM recomputes the request, not its blocks
            return _RESULTS(finished_recving=arrived, failed_recving=failed)
        self._invalid = invalid
        return _RESULTS(finished_recving=arrived)

    def get_block_ids_with_load_errors(self) -> set[int]:
        invalid, self._invalid = self._invalid, set()
        return invalid

    def build_connector_worker_meta(self) -> WorkerReport | None:
        return None if self._worker is None else self._worker.report()

    def _step(self) -> StepMetadata:
        meta = self._connector_metadata
        assert isinstance(meta, StepMetadata)
        return meta

    # ---- scheduler

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        self._workers(list(metadata.values()))

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        self._workers(list(metadata.values()))

    def _workers(self, told: list[WorkerMetadata]) -> None:
        if self._scheduler is None:
            return
        self._scheduler.workers([worker.spaces for worker in told])
        if not self._publishes or self._scheduler.events is not None:
            return
        hashed = getattr(self._vllm_config.cache_config, "hash_block_size", None)
        reason = "the model has several groups of KV blocks" if len(self._layers) > 1 else ""
        reason = reason or events.objection(hashed, self._page_size, self._scheduler.page_size)
        if reason:
            logger.warning("hicache_ext: no KV events of the storage tiers: %s", reason)
            return
        self._scheduler.events = events.TierEvents(self._store, self._scheduler.served)
        if self._pool is not None:
            self._scheduler.events.follow(self._pool)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._pool = gpu_block_pool
        if self._scheduler is not None and self._scheduler.events is not None:
            self._scheduler.events.follow(gpu_block_pool)

    def take_events(self) -> list[Any]:
        found = self._scheduler.events if self._scheduler is not None else None
        return [] if found is None else found.take()

    def on_new_request(self, request: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.begin(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self._scheduler is not None
        tokens = self._scheduler.matched(request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self._scheduler is not None
        self._scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[Any, int]:
        assert self._scheduler is not None
        sources: dict[Any, int] = {}
        for tier, tokens in self._scheduler.tiers_of(request).items():
            medium = self._store.tiers[tier].backend.capabilities.medium
            source = _SOURCES.get(medium, CacheHitSource.EXTERNAL_UNSPECIFIED)
            sources[source] = sources.get(source, 0) + tokens
        return sources

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        assert self._scheduler is not None
        return self._scheduler.step(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        report = connector_output.kv_connector_worker_meta
        if self._scheduler is not None and self._scheduler.events is not None and isinstance(report, WorkerReport):
            self._scheduler.events.hear(report.changes)
        if self._scheduler is not None and connector_output.finished_recving:
            self._scheduler.loaded(
                connector_output.finished_recving, connector_output.invalid_block_ids,
                getattr(connector_output, "failed_recving", None) or (),
            )  # fmt: skip

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        self._scheduler.finished(request)
        return False, None  # saves were copied out of the blocks already

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    def reset_cache(self) -> bool | None:
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    # ---- both

    def get_kv_connector_stats(self) -> Stats | None:
        counts: dict[str, int] = {}
        if self._worker is not None:
            counts = self._worker.take_counts()
        elif self._scheduler is not None:
            counts = self._scheduler.take_counts()
        return Stats(data=counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats | None:
        return Stats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> PromStats:
        return PromStats(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()
        stores.release(self._settings.config)


def _groups(groups: Sequence[Any]) -> tuple[int, list[int]]:
    """Tokens of a block, and for each of vLLM's groups of blocks how many of a prefix's last blocks its layers look at;
    0: all of them. Raises UnsupportedLayout."""
    specs = [group.kv_cache_spec for group in groups]
    kinds = [{base.__name__ for base in type(spec).__mro__} for spec in specs]
    sizes = {int(spec.block_size) for spec in specs}
    known = all(kind & {"FullAttentionSpec", "SlidingWindowSpec"} for kind in kinds)
    if len(specs) > 1 and (len(sizes) > 1 or not known):
        raise UnsupportedLayout(
            f"hicache_ext: groups of KV blocks of {', '.join(type(spec).__name__ for spec in specs)} with "
            f"{', '.join(map(str, sorted(sizes)))} tokens are not supported together. "
            "Fix: start vLLM with --disable-hybrid-kv-cache-manager"
        )
    size = sizes.pop()
    windows = [
        max(1, -(-(int(spec.sliding_window) - 1) // size)) if "SlidingWindowSpec" in kind else 0
        for spec, kind in zip(specs, kinds, strict=True)
    ]
    return size, windows


def _speak() -> None:
    """Our lines where vLLM's are, at vLLM's level: it sets up its own logger only. Not where somebody set up ours."""
    theirs = logging.getLogger("vllm")
    for name in ("hicache_ext", "storage_backends"):
        ours = logging.getLogger(name)
        if theirs.handlers and not ours.hasHandlers() and ours.level == logging.NOTSET:
            ours.handlers, ours.propagate = list(theirs.handlers), False
            ours.setLevel(theirs.level)
