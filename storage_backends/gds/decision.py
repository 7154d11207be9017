"""Whether device memory is reached by cuFile here, and how: decided once, when a tier is opened.

Belongs here: what stands against cuFile, asking a trial process (trial.py), the answer in words. Does not belong here:
doing it (route.py).

cuFile is asked nothing in this process before a process of its own has written and read through it, in the tier's own
directories: a cuFile that hangs, as it does without a driver, hangs there and is ended.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from hicache_ext.cuda import CudaUnavailable, open_device

LIBRARY = "libcufile.so.0"
#: For a trial: it opens a device, which takes a second or two on a busy machine.
SECONDS = 20.0
INSTALL = "pip install 'hicache-ext[gds]'"
#: Environment variable: where cuFile writes its log.
LOG = "CUFILE_LOGFILE_PATH"


class Mode(StrEnum):
    """GDS: the device reads and writes storage itself. COMPATIBILITY: cuFile copies through host memory of its own.
    STAGING: no cuFile; pages go through pinned host memory of whoever asks."""

    GDS = "gds"
    COMPATIBILITY = "compatibility"
    STAGING = "staging"


class Way(StrEnum):
    """How cuFile is asked: many pieces in one call, in the order of a CUDA stream, or piece by piece."""

    BATCH = "batch"
    STREAM = "stream"
    CALLS = "calls"


#: Best first. In compatibility mode every piece holds a buffer of cuFile's: from a call it comes back by itself; and
#: nothing goes in stream order (NO_STREAM).
PREFERENCE: Mapping[Mode, tuple[Way, ...]] = {
    Mode.GDS: (Way.BATCH, Way.STREAM, Way.CALLS),
    Mode.COMPATIBILITY: (Way.CALLS, Way.BATCH),
}
#: Seen on an H200 (examples/h100/gds.json): a trial that went well says nothing of the next thousand pieces.
NO_STREAM = (
    "way: stream is for true GPUDirect Storage alone: in compatibility mode cuFile 1.15 returned wrong bytes now and "
    "then and can abort the process; use way: calls, or auto"
)


@dataclass(frozen=True)
class Decision:
    """why: what stands in the way of a better mode, "" for nothing. passed_over: ways that do not work here."""

    mode: Mode
    why: str = ""
    library: str = ""
    version: str = ""
    device: int = 0
    device_name: str = ""
    way: Way = Way.CALLS
    passed_over: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.mode is Mode.STAGING:
            return f"no GPU-direct storage ({self.why}): pages reach a GPU through pinned host memory"
        name = "true GPUDirect Storage" if self.mode is Mode.GDS else "cuFile in compatibility mode"
        reason = f" ({self.why})" if self.why else ""
        left = "".join(f", no {way}: {why}" for way, why in self.passed_over.items())
        how = {Way.BATCH: "in batches", Way.STREAM: "in stream order", Way.CALLS: "call by call"}[self.way]
        return f"{name}{reason}, cuFile {self.version} {how}, device {self.device} {self.device_name}{left}"


def decide(mode: str, way: str, ordinal: int | None, directories: Sequence[Path]) -> Decision:
    """mode, way: as the tier's options. directories: where slots lie, or devices that hold them."""
    if mode == "staging":
        return Decision(Mode.STAGING, "mode: staging")
    try:
        device = open_device(current_device() if ordinal is None else ordinal)
    except CudaUnavailable as error:
        return Decision(Mode.STAGING, str(error))
    if device.no_kernels:
        return Decision(Mode.STAGING, f"nothing verifies pages on the device: {device.no_kernels}")
    keep_log_out_of_the_way()
    ways = PREFERENCE[Mode.GDS] if way == "auto" else (Way(way),)
    safe = [one for one in PREFERENCE[Mode.COMPATIBILITY] if one in ways]
    # Without a safe one: what does cuFile say of this machine?
    found = _try(device.ordinal, directories, False, safe or [Way.CALLS])
    if found.problem:
        return Decision(Mode.STAGING, found.problem)
    chosen, why = Mode.COMPATIBILITY, "mode: compatibility"
    if mode != "compatibility":
        why = "" if found.may_be_direct else "no nvidia-fs, and no PCIe peer to peer"
        if found.may_be_direct:
            strict = _try(device.ordinal, directories, True, ways)
            chosen, why = (Mode.COMPATIBILITY, strict.problem) if strict.problem else (Mode.GDS, "")
            found = found if strict.problem else strict
    if chosen is Mode.COMPATIBILITY and not safe:
        return Decision(Mode.STAGING, NO_STREAM if mode == "compatibility" else f"{why}; {NO_STREAM}")
    if mode == "auto" and chosen is Mode.COMPATIBILITY:  # measured on an H200: examples/h100/gds.json
        return Decision(Mode.STAGING, f"{why}; cuFile's compatibility mode is slower (mode: compatibility takes it)")
    order = PREFERENCE[chosen]
    best = next(one for one in order if one in found.works)
    passed_over = {name: reason for name, reason in found.fails.items() if order.index(Way(name)) < order.index(best)}
    return Decision(chosen, why, found.library, found.version, device.ordinal, device.name, best, passed_over)


def current_device() -> int:
    """Ordinal of the GPU that this thread uses; 0 where it uses none yet. CudaUnavailable: no driver."""
    try:
        from hicache_ext import _cuda
    except ImportError as error:
        raise CudaUnavailable(f"hicache_ext._cuda is not in this install: {error}") from error
    try:
        return max(0, _cuda.current_ordinal())
    except _cuda.Unavailable as error:
        raise CudaUnavailable(str(error)) from error


def libraries() -> list[str]:
    """Where libcufile may be: as the linker finds it, in Python packages of NVIDIA's, in a toolkit."""
    found = [LIBRARY]
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        found += sorted(str(path) for path in Path(place).glob(f"*/lib/{LIBRARY}"))
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (path := Path(home, "lib64", LIBRARY)).exists() and str(path) not in found:
            found.append(str(path))
    return found


def keep_log_out_of_the_way() -> None:
    """cuFile writes cufile.log into the current directory unless it is told where."""
    os.environ.setdefault(LOG, f"{tempfile.gettempdir()}/hicache-ext-cufile-{os.getuid()}.log")


@dataclass
class _Found:
    """What a trial process said until it ended. problem: "" where a way works, and the checksums too. fails: why, of
    the ways that were tried and do not."""

    problem: str = ""
    library: str = ""
    version: str = ""
    may_be_direct: bool = False
    works: tuple[str, ...] = ()
    fails: Mapping[str, str] = field(default_factory=dict)


def _try(ordinal: int, directories: Sequence[Path], strict: bool, wanted: Sequence[Way]) -> _Found:
    """Every way, until one hangs; the others then in a trial of their own."""
    ways = [str(way) for way in wanted]
    found = _try_ways(ordinal, directories, strict, ways)
    hung = [way for way in ways if way not in found.works and way not in found.fails]
    if not found.library or len(hung) < 2 or found.works:
        return found
    again = _try_ways(ordinal, directories, strict, hung[1:])
    again.fails = {**found.fails, hung[0]: found.problem, **again.fails}
    return again


def _try_ways(ordinal: int, directories: Sequence[Path], strict: bool, ways: Sequence[str]) -> _Found:
    order = {
        "device": ordinal, "libraries": libraries(), "directories": [str(path) for path in directories],
        "ways": ways, "strict": strict,
    }  # fmt: skip
    command = [sys.executable, "-m", "storage_backends.gds.trial", json.dumps(order)]
    # Whoever imports us by a path of its own must be found there by the trial too.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    ended = ""
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as wrong:
        try:
            trial = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=wrong, env=environment)
        except OSError as error:
            return _Found(f"a trial process cannot be started: {error}")
        try:
            code = trial.wait(SECONDS)
        except subprocess.TimeoutExpired:
            trial.kill()
            trial.wait()
            ended = f"cuFile did not answer within {SECONDS:.0f} s"
        else:
            if code:
                wrong.seek(0)
                last = (wrong.read().strip().splitlines() or [f"exit code {code}"])[-1]
                ended = f"the trial of cuFile ended early: {last}"
        said.seek(0)
        lines = [json.loads(line) for line in said.read().splitlines() if line.endswith("}")]
    return _judge(lines, ended)


def _judge(lines: Sequence[Mapping[str, Any]], ended: str) -> _Found:
    """ended: why the trial did not come to its end, "" where it did."""
    found = _Found()
    fails: dict[str, str] = {}
    works: list[str] = []
    for line in lines:
        if "problem" in line:
            return _Found(line["problem"])
        if "library" in line:
            found.library, found.version, found.may_be_direct = line["library"], line["version"], line["direct"]
        elif line["wrong"]:
            fails[line["way"]] = line["wrong"]
        else:
            works.append(line["way"])
    if not works:
        found.problem = ended or _together(fails) or "the trial said nothing"
    found.works, found.fails = tuple(works), fails
    return found


def _together(fails: Mapping[str, str]) -> str:
    """Each reason once."""
    reasons = list(dict.fromkeys(fails.values()))
    if len(reasons) == 1:
        return reasons[0]
    return "; ".join(f"{' and '.join(way for way in fails if fails[way] == why)}: {why}" for why in reasons)
