"""One gds tier of a configuration: whether its pages reach a GPU past the CPU, and if not, how.

Belongs here: the tier's own decision, in a sentence with a fix. Does not belong here: the decision
(storage_backends.gds.decision), or what its disks are like (tier.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hicache_ext.config import TierConfig
from hicache_ext.doctor.finding import Finding, error, ok, warning
from storage_backends.gds import volume
from storage_backends.gds.decision import INSTALL, LOG, NO_STREAM, Decision, Mode, decide
from storage_backends.local.options import nearest

_DIRECT = (
    "load nvidia-fs (sudo modprobe nvidia-fs), and use a disk and a file system that GPUDirect Storage supports "
    "(/usr/local/cuda/gds/tools/gdscheck -p)"
)


@dataclass(frozen=True)
class Place:
    """A gds tier as configured. label: its name."""

    label: str
    mode: str
    way: str
    device: int | None
    paths: tuple[Path, ...]


def places(chosen: TierConfig) -> list[Place]:
    """The tier, where it is one of this kind."""
    from storage_backends.gds import GdsBackend
    from storage_backends.registry import backend_class

    backend = backend_class(chosen.type)
    if not issubclass(backend, GdsBackend):
        return []
    options = backend.Options.model_validate(chosen.options)
    paths = tuple(path for path, _ in options.places)
    return [Place(chosen.label, options.mode, options.way, options.device, paths)]


def probe(place: Place) -> list[Finding]:
    paths = [nearest(path) for path in place.paths]
    return [judge(place, decide(place.mode, place.way, place.device, paths))]


def judge(place: Place, decision: Decision) -> Finding:
    name, text = f"{place.label}: GPU", str(decision)
    missing = "cuFile cannot be loaded" in decision.why
    fix = INSTALL if missing else _DIRECT
    if place.mode == "gds" and decision.mode is not Mode.GDS:
        return error(name, f"{text}; the tier does not open with mode: gds", f"{fix}; or mode: auto")
    if decision.mode is Mode.GDS or decision.why.startswith("mode: "):  # as asked for
        return ok(name, text)
    if NO_STREAM in decision.why:
        fix = "way: calls, or way: auto"
    elif decision.mode is Mode.STAGING and str(volume.CODE) in decision.why:  # the reason goes on to say what to do
        problems = [found for path in place.paths if (found := volume.problem(nearest(path)))]
        fix = problems[0].fix if problems else f"cuFile's own log says why: {os.environ.get(LOG, '')}"
    elif decision.mode is Mode.STAGING and not missing:
        fix = "look at the GPU: nvidia-smi; without one, type: local is the same tier"
    return warning(name, text, fix)
