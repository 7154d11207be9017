"""Which weights this process computes with, and when pages may be stored or served under their name.

Belongs here: the state machine of a weight update, and the wrapping of SGLang's low-level WeightUpdater that drives it.
Does not belong here: fingerprints of files (fingerprint), or what an adapter does while frozen (backend).

    frozen = an update is running, or a session of updates is open, or KV of older weights may still lie in L1 or L2

    begin()  before anything changes     -> frozen
    end(...) after it, success or not    -> the namespace has other weights; still frozen
    flushed() the tree was reset         -> thawed, unless an update or a session is open

A page that was computed with old weights can reach the adapter only from L1 or L2, so until these were emptied nothing
may be written. The state is one per process, like the model.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import threading
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hicache_ext import fingerprint

logger = logging.getLogger(__name__)

#: The same in every process of one server, and of no other: the launcher sets it at each launch, its children inherit
#: it. Ranks must agree on a name for weights that came over the wire, or ranks that share pages (MLA) would never find
#: each other's. Where nobody set it a process has a name of its own, which costs only that.
RUN_VARIABLE = "HICACHE_EXT_RUN"

UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
#: What changes weights, by version: those that exist are wrapped.
UPDATES = (
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "receive_weights_from_distributed",
    "load_weights_from_distributed",
    "update_weights_from_tensor",
    "update_weights_from_ipc",
)
#: A session (0.5.21 and later): weights may change between the two without any call in this process.
SESSION_BEGIN, SESSION_END = "begin_weight_update", "end_weight_update"


_own_run = uuid.uuid4().hex


def new_run(*_: Any, **__: Any) -> None:
    """BEFORE hook of a server's launch: its processes share a name that no earlier launch of this process had."""
    os.environ[RUN_VARIABLE] = uuid.uuid4().hex


class WeightState:
    """See the module's docstring. Thread-safe; `frozen` and `override` are read on every call of the adapter."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._session = False
        self._stale = False
        self._updates = 0
        self._listeners: weakref.WeakSet[Any] = weakref.WeakSet()
        #: The weights' fingerprint since the last update; None: as at start.
        self.override: str | None = None
        self.flushes = 0

    @property
    def frozen(self) -> bool:
        return bool(self._running or self._session or self._stale)

    @property
    def updates(self) -> int:
        return self._updates

    def listen(self, adapter: Any) -> None:
        """`adapter.weights_changing(kind)` is called at the begin of each update. Held weakly."""
        self._listeners.add(adapter)

    def begin(self, kind: str) -> None:
        """Before the weights change."""
        with self._lock:
            first = not self.frozen
            self._running += 1
            self._stale = True
            self._updates += 1
            # Until the end says better: weights of this run and this update only. A failed update leaves it so.
            self.override = self._unique()
        if first:
            logger.info("weight update (%s): the storage tiers are frozen until the cache is flushed", kind)
        for adapter in list(self._listeners):
            adapter.weights_changing(kind)

    def end(self, weights: str | None = None) -> None:
        """After it. weights: the fingerprint of what was loaded, None where only this run knows these weights."""
        with self._lock:
            self._running = max(0, self._running - 1)
            if weights is not None:
                self.override = weights

    def open_session(self) -> None:
        self.begin("session")
        with self._lock:
            self._session = True
        self.end()

    def close_session(self) -> None:
        # Remote writers may have changed weights since the session began, and closing it can repack them.
        self.begin("end of session")
        with self._lock:
            self._session = False
        self.end()

    def invalidate(self, kind: str) -> None:
        """The weights are not what they were, for a reason outside an update."""
        self.begin(kind)
        self.end()

    def separate(self) -> None:
        """Nothing was seen to change, but nothing vouches for the weights either: name them after this run."""
        with self._lock:
            self._updates += 1
            self.override = self._unique()

    def flushed(self) -> None:
        """L1 and L2 are empty."""
        with self._lock:
            self.flushes += 1
            if self._running or self._session or not self._stale:
                return
            self._stale = False
        logger.info("weight update: the cache was flushed, the storage tiers serve the new weights' pages")

    def _unique(self) -> str:
        run = os.environ.get(RUN_VARIABLE) or _own_run
        return "update:" + hashlib.sha256(f"{run}:{self._updates}".encode()).hexdigest()


STATE = WeightState()


def loaded_from_disk(before: Path | None, after: Path, load_format: str) -> str | None:
    """The fingerprint after an update from `after`, None where part of the old weights may have stayed.

    A folder that holds every tensor of the old one replaces it whole, and then a server started on it has the same
    weights. Anything less is a mixture that only this run knows.
    """
    if load_format == "dummy":
        return None
    had = None if before is None else fingerprint.tensor_names(before)
    has = fingerprint.tensor_names(after)
    if had is None or has is None or not had <= has:
        return None
    return fingerprint.weights_of(after)


#: The folder that each model was started from, by the identity of its config object: noted at its first update. A
#: failed update leaves its own path in the config, so what the config says later is not what the model has.
_started_from: dict[int, Path | None] = {}


def around_update(original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook of each method in UPDATES."""
    kind = getattr(original, "__name__", "update")
    model = id(getattr(updater, "model_config", None))
    if model not in _started_from:
        _started_from[model] = _current_folder(updater)
    before = _started_from[model]
    STATE.begin(kind)
    weights = None
    try:
        result = original(updater, *args, **kwargs)
        if kind == "update_weights_from_disk" and isinstance(result, tuple) and result and result[0] is True:
            weights = _disk_fingerprint(before, args, kwargs)
        return result
    finally:
        STATE.end(weights)


def _current_folder(updater: Any) -> Path | None:
    from hicache_ext.sglang.identity import locate

    try:
        return locate(str(updater.model_config.model_path), getattr(updater.model_config, "revision", None))
    except Exception:
        return None


def _disk_fingerprint(before: Path | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    from hicache_ext.sglang.identity import locate

    try:
        path = kwargs.get("model_path", args[0] if args else "")
        load_format = kwargs.get("load_format", args[1] if len(args) > 1 else "auto")
        partial = kwargs.get("weight_name_filter", args[2] if len(args) > 2 else None)
        after = None if partial is not None else locate(str(path), None)
        return None if after is None else loaded_from_disk(before, after, str(load_format))
    except Exception as error:
        logger.warning("weight update: the new weights cannot be identified (%s): pages are of this run only", error)
        return None


def around_begin(original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook of SESSION_BEGIN."""
    STATE.open_session()
    return original(updater, *args, **kwargs)


def around_end(original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook of SESSION_END."""
    try:
        return original(updater, *args, **kwargs)
    finally:
        STATE.close_session()


def hooks(updater: type) -> dict[str, Callable[..., Any]]:
    """Method name to AROUND hook, for the methods that this version's WeightUpdater has."""
    wanted: dict[str, Callable[..., Any]] = dict.fromkeys(UPDATES, around_update)
    wanted[SESSION_BEGIN] = around_begin
    wanted[SESSION_END] = around_end
    return {name: hook for name, hook in wanted.items() if hasattr(updater, name)}


def watch_without_plugin() -> None:
    """Wrap WeightUpdater's methods on the class, once. They are looked up at each call, so it is never too late.

    For the route without the plugin: schedulers hold bound methods of the classes above, but all of them end here.
    Raises RuntimeError where there is nothing to wrap: then an update would go unnoticed.
    """
    import pkgutil

    updater = pkgutil.resolve_name(UPDATER)
    found = hooks(updater)
    if not found:
        raise RuntimeError(f"hicache_ext: {UPDATER} has no method that updates weights: an update would go unnoticed")
    for name, hook in found.items():
        original = getattr(updater, name)
        if getattr(original, "__hicache_ext__", False):
            continue

        def wrapper(
            *args: Any, __hook: Callable[..., Any] = hook, __original: Callable[..., Any] = original, **kwargs: Any
        ) -> Any:
            return __hook(__original, *args, **kwargs)

        functools.update_wrapper(wrapper, original)
        wrapper.__hicache_ext__ = True  # type: ignore[attr-defined]
        setattr(updater, name, wrapper)
