"""GdsBackend: the local tier, of which pages in device memory are read and written through cuFile.

Belongs here: what is open, for whom, and what it says of itself. Does not belong here: whether cuFile is used
(decision.py), how pages move (slots.py), and all that a local tier is (storage_backends.local).

Directory, slots, index and log are the local tier's: a page that came from host memory can be read into device memory
and the other way round, by this tier and, in host memory, by any local tier over the same directory.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from hicache_ext.cuda import CudaUnavailable
from storage_backends.base import Dispatcher, OptionError, PageBatch
from storage_backends.gds.decision import INSTALL, Decision, Mode, decide
from storage_backends.gds.options import GdsOptions
from storage_backends.gds.route import Route
from storage_backends.gds.slots import DeviceSlots
from storage_backends.local import LocalBackend
from storage_backends.local.engine import IoEngine
from storage_backends.local.slots import SlotEngine

logger = logging.getLogger(__name__)


class GdsBackend(LocalBackend):
    """decision: how device memory is reached, for as long as this is open. Where it is not reached by cuFile this is a
    local tier, and its capabilities say that it takes host memory alone."""

    Options = GdsOptions
    options: GdsOptions

    def __init__(self, options: GdsOptions, dispatcher: Dispatcher) -> None:
        for path, _ in options.places:
            with suppress(OSError, ValueError):  # what cannot be made is said when the disk is opened
                if not path.exists():
                    path.mkdir(parents=True)
        places = [path for path, _ in options.places if path.exists()]
        self.decision = decide(options.mode, options.way, options.device, places)
        self._route: Route | None = None
        if self.decision.mode is not Mode.STAGING:
            try:
                self._route = Route(self.decision, self._out)
            except CudaUnavailable as error:
                self.decision = Decision(Mode.STAGING, str(error))
        if options.mode == "gds" and self.decision.mode is not Mode.GDS:
            raise OptionError(
                "mode", "gds", self.decision.why, f"use mode: auto; or {INSTALL}, load nvidia-fs, and use "
                "a file system that GPUDirect Storage supports"
            )  # fmt: skip
        super().__init__(options, dispatcher)
        if self._route is not None:
            self.capabilities = replace(self.capabilities, memory=("host", "device"))
        logger.info("gds tier %s: %s", options.names, self.decision)

    def _slots(self, engine: IoEngine) -> SlotEngine:
        inner = super()._slots(engine)
        return inner if self._route is None else DeviceSlots(inner, engine, self._route)

    def _check(self, batch: PageBatch) -> None:
        if self._route is None:
            super()._check(batch)

    def _out(self, why: str) -> None:
        self.capabilities = replace(self.capabilities, memory=("host",))
        self.decision = replace(self.decision, mode=Mode.STAGING, why=why)

    def register_memory(self, address: int, length: int) -> None:
        if self._elsewhere:
            return
        if self._route is not None and self._route.is_on_device(address, length):
            self._route.register(address, length)
        else:
            super().register_memory(address, length)

    def versions(self) -> dict[str, str]:
        return {**super().versions(), "cufile": f"{self.decision.version or 'not used'}", "gds": str(self.decision)}

    def stats(self) -> Mapping[str, int | float | str]:
        if self._elsewhere:
            return super().stats()
        decision, route = self.decision, self._route
        return {
            **super().stats(),
            "gds_mode": str(decision.mode),
            "gds_reason": decision.why,
            "gds_way": "" if decision.mode is Mode.STAGING else str(decision.way),
            "gds_cufile": decision.version,
            "gds_unregistered": "" if route is None else route.unregistered,
        }

    def close(self) -> None:
        super().close()
        if self._route is not None and not self._elsewhere:
            self._route.close()
