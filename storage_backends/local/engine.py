"""What an I/O engine is: vectored transfers between files and memory, and how one is chosen at open.

Belongs here: the interface and the choice. Does not belong here: slots, checksums, what a transfer means, or how an
engine works (engine_common, engine_threads, engine_liburing).
The native engine (csrc/io) takes the first place in `PREFERENCE` when it is built.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from storage_backends.base import OptionError

logger = logging.getLogger(__name__)

#: Fastest first.
PREFERENCE = ("native", "liburing", "threads")

#: Environment variable with the path of a fault plan (storage_backends.local.inject); unset costs nothing.
FAULTS_VARIABLE = "HICACHE_EXT_FAULTS"

_CLASSES = {
    "native": ("storage_backends.local.engine_native", "NativeEngine"),
    "liburing": ("storage_backends.local.engine_liburing", "LiburingEngine"),
    "threads": ("storage_backends.local.engine_threads", "ThreadsEngine"),
}

_FIXES = {
    "native": "install a wheel with the compiled module, build it with a C++ compiler and liburing headers",
    "liburing": "install hicache-ext[liburing] and allow io_uring (seccomp profile, sysctl kernel.io_uring_disabled)",
    "threads": "use a 64-bit Linux",
}


#: Options of an engine that somebody asked for; the others are hints.
_ASKED_FOR = ("sqpoll", "iopoll")


@dataclass(slots=True)
class Transfer:
    """One contiguous span of a file to or from a list of buffers.

    iov: uint64[k, 2], address and length of each buffer; with O_DIRECT all aligned as the file asks.
    done: called once, on a thread that may block for a checksum: bytes moved (the whole span, or less at the end of
    the file), or -errno. Nothing touches the buffers after that.
    cancelled: when set before the transfer begins, it ends as -ECANCELED instead.
    """

    fd: int
    offset: int
    iov: np.ndarray
    write: bool
    done: Callable[[int], None]
    cancelled: threading.Event | None = None

    @property
    def length(self) -> int:
        return int(self.iov[:, 1].sum())


class EngineUnavailable(RuntimeError):
    """This engine cannot work here; the message says why in one clause."""


class IoEngine(ABC):
    """Moves bytes. Short transfers are continued, EINTR and EAGAIN repeated, though not for ever; what is left is an
    error or the end.

    option_names: keyword arguments of the constructor. depth: transfers in flight at a time. passed_over: the engines
    that would have been preferred, and why each cannot work here.
    """

    name: ClassVar[str]
    option_names: ClassVar[frozenset[str]] = frozenset()
    depth: int
    passed_over: dict[str, str]

    @abstractmethod
    def submit(self, transfers: Sequence[Transfer]) -> None:
        """Begin these transfers, as one batch where the engine can. Never blocks for long; any thread may call.

        After `close`, and in a forked child, every transfer ends as -ECANCELED. Never calls `done` itself: the caller
        may hold a lock that `done` takes.
        """

    def register_memory(self, address: int, length: int) -> None:
        """Memory that many transfers will use."""

    @abstractmethod
    def close(self, timeout: float) -> bool:
        """Refuse new transfers, end waiting ones as -ECANCELED, wait for those in flight; whether all ended in time.

        `done` of those that waited may run on the calling thread.
        """


def open_engine(choice: str = "auto", **options: Any) -> IoEngine:
    """The engine named `choice`, or with "auto" the first of PREFERENCE that works here. Said in the log, once.

    options: constructor arguments by name; an engine takes those that it knows. Raises OptionError for a name that
    does not exist or an engine that cannot work here.
    """
    if choice != "auto" and choice not in _CLASSES:
        raise OptionError("engine", choice, "no such engine", f"use one of: auto, {', '.join(PREFERENCE)}")
    passed_over: dict[str, str] = {}
    for name in PREFERENCE if choice == "auto" else (choice,):
        try:
            engine = _open(name, options)
        except EngineUnavailable as error:
            passed_over[name] = str(error)
            continue
        engine.passed_over = passed_over
        why = "; ".join(f"{other}: {reason}" for other, reason in passed_over.items())
        logger.info("I/O engine: %s%s", name, f" ({why})" if why else "")
        if left_off := [key for key in _ASKED_FOR if options.get(key) and key not in engine.option_names]:
            logger.warning("I/O engine %s has no %s: left off", name, " and no ".join(left_off))
        return _with_faults(engine)
    reason = passed_over[choice] if choice in passed_over else str(passed_over)
    raise OptionError("engine", choice, reason, f"{_FIXES.get(choice, _FIXES['threads'])}; or use engine: auto")


def _open(name: str, options: dict[str, Any]) -> IoEngine:
    module, attribute = _CLASSES[name]
    try:
        found: type[IoEngine] = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        # Only the native engine's modules may be absent: they exist when somebody compiled them.
        if name != "native":
            raise
        raise EngineUnavailable("not built") from error
    return found(**{key: value for key, value in options.items() if key in found.option_names})


def _with_faults(engine: IoEngine) -> IoEngine:
    """Faults asked for from outside the process: tests of a running server."""
    path = os.environ.get(FAULTS_VARIABLE)
    if not path:
        return engine
    from storage_backends.local.inject import FaultEngine, FaultPlan

    logger.warning("I/O faults are injected as %s says (%s is set): for tests only", path, FAULTS_VARIABLE)
    return FaultEngine(engine, FaultPlan.from_file(path))
