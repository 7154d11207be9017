"""I/O engines: which work here, why the others do not, and what each would take.

Belongs here: trying an engine and judging the result. Does not belong here: how engines work (storage_backends.local).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hicache_ext.doctor.finding import Finding, error, ok, warning
from storage_backends.base import OptionError
from storage_backends.buffers import OwnedMemory
from storage_backends.local.engine import FAULTS_VARIABLE, PREFERENCE, IoEngine, Transfer, open_engine

_BYTES = 64 << 10
_SECONDS = 5.0


class Trial(NamedTuple):
    """What came of trying an engine. reason: why it does not work, "" where it does. detail: how it does."""

    reason: str = ""
    fix: str = ""
    detail: str = ""


def attempt(name: str) -> Trial:
    """Open the engine, write with it and read back."""
    os.environ.pop(FAULTS_VARIABLE, None)  # the engine itself is asked for, not the faults that a test wants
    try:
        engine = open_engine(name)
    except OptionError as problem:
        return Trial(problem.problem, problem.fix.removesuffix("; or use engine: auto"))
    try:
        reason = _round_trip(engine)
        return Trial(reason, "report this: the engine opened" if reason else "", _detail(engine))
    finally:
        engine.close(_SECONDS)


def _round_trip(engine: IoEngine) -> str:
    """What went wrong, "" for nothing. On memory that looks like a file: no disk has a part in it."""
    out, back = OwnedMemory(_BYTES), OwnedMemory(_BYTES)
    out.view[:] = os.urandom(_BYTES)
    for memory in (out, back):
        engine.register_memory(memory.address, _BYTES)
    fd = os.memfd_create("hicache-ext-doctor")
    try:
        for memory, write in ((out, True), (back, False)):
            ended, moved = threading.Event(), [0]

            def done(result: int, ended: threading.Event = ended, moved: list[int] = moved) -> None:
                moved[0] = result
                ended.set()

            iov = np.array([[memory.address, _BYTES]], np.uint64)
            engine.submit([Transfer(fd, 0, iov, write, done)])
            what = "write" if write else "read"
            if not ended.wait(_SECONDS):
                return f"opens, but a {what} did not end within {_SECONDS:g} s"
            if moved[0] != _BYTES:
                return f"opens, but a {what} gave {os.strerror(-moved[0]) if moved[0] < 0 else f'{moved[0]} bytes'}"
        return "" if bytes(back.view) == bytes(out.view) else "opens, but read back other bytes than it wrote"
    finally:
        os.close(fd)


def _detail(engine: IoEngine) -> str:
    """How the engine works here, as far as it says."""
    unregistered = getattr(engine, "unregistered", "")
    parts = [getattr(engine, "description", ""), f"memory cannot be registered: {unregistered}" if unregistered else ""]
    return ", ".join(part for part in parts if part)


def judge(tried: Mapping[str, Trial], wanted: Iterable[str]) -> list[Finding]:
    """One finding per engine. wanted: engines that a configuration asks for by name.

    An engine that does not work is a warning when a slower one takes its place, an error when it is asked for by name
    or nothing is left, and no matter when a faster one works.
    """
    working = [name for name in PREFERENCE if not tried[name].reason]
    first = working[0] if working else ""
    demanded = set(wanted) - {"auto"}
    findings = []
    for name in PREFERENCE:
        title, (reason, fix, detail) = f"I/O engine {name}", tried[name]
        if not reason:
            text = f"works ({detail})" if detail else "works"
            findings.append(ok(title, text + (", and is what `engine: auto` takes" if name == first else "")))
        elif name in demanded:
            findings.append(error(title, f"{reason}, and the configuration asks for it", fix + "; or engine: auto"))
        elif not working:
            findings.append(error(title, reason, fix))
        elif PREFERENCE.index(name) < PREFERENCE.index(first):
            findings.append(warning(title, f"{reason}; {first} takes its place", fix))
        else:
            findings.append(ok(title, f"{reason}; not needed, {first} is faster"))
    return findings


def io_uring_fix(fix: str, disabled: str, seccomp: str) -> str:
    """The fix for a forbidden io_uring by who forbids it. disabled: sysctl kernel.io_uring_disabled ("" = none).

    seccomp: the mode in /proc/self/status.
    """
    if disabled.strip() == "2":
        return "sudo sysctl -w kernel.io_uring_disabled=0"
    if disabled.strip() == "1":
        return "sudo sysctl -w kernel.io_uring_disabled=0 (or run as a member of kernel.io_uring_group)"
    if seccomp.strip() == "2":
        return (
            "start the container with a seccomp profile that allows io_uring_setup, io_uring_enter and "
            "io_uring_register (docker run --security-opt seccomp=profile.json)"
        )
    return fix


def explain(trial: Trial) -> Trial:
    """With the fix for this machine."""
    if "forbidden" in trial.reason:
        fix = io_uring_fix(trial.fix, _read("/proc/sys/kernel/io_uring_disabled"), seccomp_mode())
        return trial._replace(fix=fix)
    return trial


def seccomp_mode() -> str:
    """ "0" none, "1" strict, "2" filter; "" unknown."""
    lines = _read("/proc/self/status").splitlines()
    return next((line.split()[1] for line in lines if line.startswith("Seccomp:")), "")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
