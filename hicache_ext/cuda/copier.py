"""Copying blocks: checks, the choice of a way and the next one down, completion layer by layer.

Belongs here: what may be copied by which way here and now, and what is said when it may not. Does not belong here:
addresses (layouts), the order of ways (ways), the copying itself (csrc/cuda).

Copies are issued in the order of a stream and the calls return at once; memory belongs to the copy until the stream has
passed it. Page numbers outside a side are refused. After CopyError nothing of that call touches memory any more.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hicache_ext.cuda.layouts import BlockShape, Side, Spans, reduce, spans
from hicache_ext.cuda.ways import LARGE, Way, ways

if TYPE_CHECKING:
    from hicache_ext import _cuda

logger = logging.getLogger(__name__)

#: What a copy kernel may use unless the caller says otherwise: for whole copies, and for loads layer by layer, which
#: run beside a decode.
MULTIPROCESSORS = 3
LAYER_MULTIPROCESSORS = 2
#: For whole copies within the device: over in so short a time that a step does not feel it, and a bus never waits.
DEVICE_MULTIPROCESSORS = 12
STAGE_BYTES = 32 << 20

_NUMBERS = {Way.engine: 0, Way.kernel: 1, Way.stage: 2}
_devices: dict[tuple[int, int], _cuda.Device] = {}  # by process, since a forked one cannot use its parent's

Indices = Sequence[int] | NDArray[np.integer]


class CudaUnavailable(Exception):
    """No copying on this machine or in this process; the text says why."""


class CopyError(Exception):
    """This copy was not made."""


def open_device(ordinal: int = 0) -> _cuda.Device:
    """CudaUnavailable: the module is not in this install, no driver, no device, a forked process."""
    try:
        from hicache_ext import _cuda
    except ImportError as error:
        raise CudaUnavailable(f"hicache_ext._cuda is not in this install: {error}") from error
    key = os.getpid(), ordinal
    if key not in _devices:
        try:
            _devices[key] = _cuda.open(ordinal)
        except _cuda.Unavailable as error:
            raise CudaUnavailable(str(error)) from error
    return _devices[key]


class LayerEvents:
    """Ends of the layers of one load at a time: reused by the next load that is given them."""

    def __init__(self, device: _cuda.Device, layers: int) -> None:
        from hicache_ext import _cuda

        self.layers = layers
        self._failed = _cuda.Failed
        self.native = _cuda.events(device, layers)

    def wait(self, stream: int, layer: int) -> None:
        """`stream` goes on once `layer` has arrived; this call does not block. CopyError: it was not issued."""
        try:
            self.native.wait(stream, layer)
        except self._failed as error:
            raise CopyError(str(error)) from error

    def done(self, layer: int) -> bool:
        try:
            return bool(self.native.done(layer))
        except self._failed as error:
            raise CopyError(str(error)) from error

    def synchronize(self, layer: int) -> None:
        """Blocks until `layer` has arrived."""
        try:
            self.native.synchronize(layer)
        except self._failed as error:
            raise CopyError(str(error)) from error


class Copier:
    """Copies pages between `pools` (a device's paged pools) and `pages` (page buffers: pinned, pageable, on a device).

    Both sides must stay where they are for as long as this lives, and this must live for as long as a CUDA graph that
    holds one of its copies. multiprocessors, layer_multiprocessors: what a kernel may use for whole copies (0: what
    suits where the page buffers lie), and for loads layer by layer. stage_bytes: device memory that the stage takes
    when it is first used.
    """

    def __init__(
        self, shape: BlockShape, pools: Side, pages: Side, device: int = 0, multiprocessors: int = 0,
        layer_multiprocessors: int = LAYER_MULTIPROCESSORS, stage_bytes: int = STAGE_BYTES,
    ) -> None:  # fmt: skip
        self.device = open_device(device)
        from hicache_ext import _cuda

        self._cuda = _cuda
        self._no_kernels = self.device.no_kernels
        self.shape, self.pools, self.pages = shape, pools, pages
        self.layer_multiprocessors = layer_multiprocessors
        self.used: Counter[str] = Counter()
        self._said: set[str] = set()
        self._orders: dict[tuple[bool, bool], tuple[Way, ...]] = {}
        self._stage: Any = None
        self._stage_half = max(stage_bytes // 2, -(-shape.page_bytes // 4096) * 4096 + (64 << 10))
        self._blocks = blocks = reduce(shape, pools, pages)
        found = spans(blocks)
        self._span_bytes = found.bytes if found else 0
        none = Spans(0, (), (), ())
        lying = found or none
        try:
            self.memory = self._kind(pages)
            few = DEVICE_MULTIPROCESSORS if self.memory == "device" else MULTIPROCESSORS
            self.multiprocessors = multiprocessors or few
            if self._kind(pools) != "device":
                raise CopyError("the pools do not lie in device memory")
            self._route = _cuda.route(
                self.device, np.array(blocks.a_planes, np.uint64), np.array(blocks.b_planes, np.uint64),
                blocks.tokens, blocks.heads, blocks.run, blocks.a_token, blocks.a_head, blocks.b_token, blocks.b_head,
                pools.page, pools.pages, pages.page, pages.pages, lying.bytes, np.array(lying.starts, np.uint64),
                np.array(lying.at, np.uint64), np.array(lying.of, np.uint32),
            )  # fmt: skip
        except _cuda.Unavailable as error:
            raise CopyError(str(error)) from error
        except _cuda.Failed as error:
            raise CopyError(str(error)) from error
        if self.memory == "pageable":
            self._say("the page buffers are not pinned: copies go through the driver's own staging, and the host waits")
        if self._no_kernels:
            self._say(f"no copy kernels: {self._no_kernels}")

    def load(
        self, pages: Indices, pools: Indices, stream: int, way: Way | None = None, multiprocessors: int | None = None
    ) -> Way:
        """From page buffers to the pools, by number; which way it went. way: this one or CopyError."""
        return self._copy(False, pools, pages, stream, way, multiprocessors or self.multiprocessors, None)

    def store(
        self, pools: Indices, pages: Indices, stream: int, way: Way | None = None, multiprocessors: int | None = None
    ) -> Way:
        """From the pools to page buffers, by number; which way it went. way: this one or CopyError."""
        return self._copy(True, pools, pages, stream, way, multiprocessors or self.multiprocessors, None)

    def load_layers(
        self, pages: Indices, pools: Indices, stream: int, events: LayerEvents, way: Way | None = None,
        multiprocessors: int | None = None,
    ) -> Way:  # fmt: skip
        """Like load, layer after layer, an event at the end of each. After CopyError no event can be waited for."""
        return self._copy(False, pools, pages, stream, way, multiprocessors or self.layer_multiprocessors, events)

    def events(self) -> LayerEvents:
        return LayerEvents(self.device, self.shape.layers)

    def order(self, count: int, layer_wise: bool = False) -> tuple[Way, ...]:
        """The ways that a copy of `count` pages could take here, best first."""
        key = layer_wise, count * self.shape.page_bytes >= LARGE
        found = self._orders.get(key)
        if found is None:
            order = ways(self._blocks.run, self._span_bytes, *key)
            found = self._orders[key] = tuple(way for way in order if not self._refused(way, layer_wise))
        return found

    def _refused(self, way: Way, layer_wise: bool) -> str:
        """Why this way cannot be taken; empty when it can."""
        if way is not Way.engine:
            if self._no_kernels:
                return f"no copy kernels: {self._no_kernels}"
            if way is Way.kernel and self.memory == "pageable":
                return "a kernel cannot reach page buffers that are not pinned"
            if way is Way.stage and layer_wise:
                return "a stage takes all layers at once"
            if way is Way.stage and not self._span_bytes:
                return "a page's bytes lie scattered there: a stage would save nothing"
        return ""

    # A small copy takes as long as a hundred lines of Python: nothing here that could be done before.

    def _copy(
        self, store: bool, pools: Indices, pages: Indices, stream: int, forced: Way | None, multiprocessors: int,
        events: LayerEvents | None,
    ) -> Way:  # fmt: skip
        a, b = np.asarray(pools, np.int64), np.asarray(pages, np.int64)
        why = self._refused(forced, events is not None) if forced else ""
        if why:
            raise CopyError(why)
        for way in (forced,) if forced else self.order(len(a), events is not None):
            try:
                self._go(way, store, a, b, stream, multiprocessors, events)
            except self._cuda.Unavailable as error:
                why = str(error)
                self._say(f"not by {way}: {why}")
                continue
            except self._cuda.Failed as error:
                self.used["failed"] += 1
                raise CopyError(str(error)) from error
            self.used[way] += 1
            return way
        raise CopyError(why)

    def _go(
        self, way: Way, store: bool, a: NDArray[np.int64], b: NDArray[np.int64], stream: int, multiprocessors: int,
        events: LayerEvents | None,
    ) -> None:  # fmt: skip
        batch = self.memory != "pageable"
        if not batch and way is Way.engine and self.device.capturing(stream):
            raise self._cuda.Unavailable("page buffers that are not pinned cannot be part of a CUDA graph")
        number = _NUMBERS[way]
        if events is not None:
            layer = self.shape.kv
            self._route.copy_layers(number, store, a, b, layer, stream, multiprocessors, batch, events.native)
            return
        stage = self._open_stage(stream) if way is Way.stage else None
        self._route.copy(number, store, a, b, stream, multiprocessors, batch, stage)

    def _open_stage(self, stream: int) -> Any:
        if self._stage is None:
            if self.device.capturing(stream):
                raise self._cuda.Unavailable("a stage cannot be used while a CUDA graph is captured")
            self._stage = self._cuda.stage(self.device, self._stage_half)
        return self._stage

    def _kind(self, side: Side) -> str:
        kinds = {self.device.memory_kind(start, length) for start, length in side.extents(self.shape)}
        return kinds.pop() if len(kinds) == 1 else "pageable"

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            logger.warning("block copies: %s", line)
