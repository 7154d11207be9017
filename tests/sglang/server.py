"""A scheduler's weight updater: SGLang's real manager and WeightUpdater, with stubs for model, loader and worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import rig
import torch
from support import ROOT, version

from hicache_ext.sglang import weights


class Loader:
    """Stands in for SGLang's DefaultModelLoader."""

    class Source:
        @staticmethod
        def init_new(config: Any, model: Any) -> None:
            return None

    fails = False

    def _get_weights_iterator(self, _source: Any) -> Iterator[Any]:
        return iter(())

    def load_weights_and_postprocess(self, model: Any, _weights: Any, _device: Any) -> None:
        model.load_weights(())
        if Loader.fails:
            Loader.fails = False
            raise RuntimeError("bad file")

    @staticmethod
    def restore_weights_before_loading(_model: Any, _device: Any) -> None:
        pass

    @staticmethod
    def postprocess_weights(_model: Any, _device: Any) -> None:
        pass


class Server:
    """A scheduler's weight updater: the real manager and the real WeightUpdater, a model that notes what is loaded."""

    def __init__(self, found: rig.Rig) -> None:
        from sglang.srt.managers.scheduler_components import weight_updater as managers
        from sglang.srt.model_executor.model_runner_components import weight_updater as updaters

        self.seen: list[bool] = []
        for name, stub in (
            ("DefaultModelLoader", Loader),
            ("get_model_loader", lambda *_: Loader()),
            ("post_load_weights", lambda *_: None),
            ("_unsupported_derived_weight_cache_error", lambda *_: None),
        ):
            if hasattr(updaters, name):
                setattr(updaters, name, stub)
        model = SimpleNamespace(load_weights=self.loaded, named_parameters=list, modules=list)
        config = SimpleNamespace(model_path=str(ROOT / "model"), dtype=torch.bfloat16, revision=None)
        runner = SimpleNamespace(server_args=SimpleNamespace(weight_cache_mode="off"), model=model)
        self.updater = updaters.WeightUpdater(
            tp_rank=0,
            device="cpu",
            gpu_id=0,
            model_config=config,
            custom_weight_loaders={},
            get_model=lambda: model,
            update_model_fields=lambda *_, **__: None,
            recapture_cuda_graph=lambda: None,
            get_model_runner=lambda: runner,
        )
        runner.weight_updater = self.updater
        self.tree = SimpleNamespace(root_node=SimpleNamespace(children={}))
        scheduler = SimpleNamespace(tree_cache=self.tree, record_weight_version_change=lambda **_: None)
        worker = SimpleNamespace(
            model_runner=runner,
            weight_update_runners=lambda: [("target", runner)],
            deserialize_own_rank=lambda tensors: tensors,
        )
        for name in ("disk", "tensor", "distributed", "ipc"):
            setattr(worker, f"update_weights_from_{name}", getattr(self, f"_{name}"))
        self.flushes = 0

        def flush(**_: Any) -> bool:
            self.flushes += 1
            found.controller.reset()
            self.tree.root_node.children.clear()
            return True

        options = {
            "tp_worker": worker,
            "draft_worker": None,
            "tp_cpu_group": torch.distributed.group.WORLD,
            "memory_saver_adapter": SimpleNamespace(pause=lambda _: None),
            "flush_cache": flush,
            "is_fully_idle": lambda **_: True,
            "scheduler": scheduler,
        }
        kind = managers.SchedulerWeightUpdaterManager
        if version() >= (0, 5, 23):
            self.manager = kind.__new__(kind)
            for name, value in {**options, "metrics_collector": None, "offload_tags": set(), "_session": None}.items():
                setattr(self.manager, name, value)
        else:
            self.manager = kind(**options)
        # As a scheduler's dispatcher does, before anything of ours may be there.
        self.bound = self.manager.update_weights_from_disk

    # 0.5.17 goes through the worker.
    def _disk(self, request: Any) -> Any:
        return self.updater.update_weights_from_disk(request.model_path, request.load_format)

    def _tensor(self, request: Any) -> Any:
        return self.updater.update_weights_from_tensor(request.serialized_named_tensors, request.load_format)

    def _distributed(self, request: Any) -> Any:
        return self.updater.update_weights_from_distributed(
            request.names, request.dtypes, request.shapes, request.group_name, request.load_format
        )

    def _ipc(self, request: Any) -> Any:
        return self.updater.update_weights_from_ipc(request)

    def loaded(self, _weights: Any) -> None:
        self.seen.append(weights.STATE.frozen)

    def request(self, **values: Any) -> Any:
        base = {
            "flush_cache": True, "torch_empty_cache": False, "weight_version": None, "selector": "all",
            "load_format": None, "recapture_cuda_graph": False, "disable_draft_model": True,
        }  # fmt: skip
        return SimpleNamespace(**{**base, **values})

    def from_disk(self, folder: Path, **values: Any) -> Any:
        return self.bound(self.request(model_path=str(folder), load_format="auto", **values))

    def from_tensor(self, **values: Any) -> Any:
        return self.manager.update_weights_from_tensor(self.request(serialized_named_tensors=[], **values))

    @property
    def has_sessions(self) -> bool:
        return hasattr(self.manager, "begin_weight_update")
