"""Calls that may hang or die, each in a process of its own with a time limit, all at once.

Belongs here: processes and deadlines. Does not belong here: what is called.

Threads would not do: one that waits for a disk that never answers keeps the whole process from ending, and a system
call that a seccomp filter punishes takes the process with it. A child that does not answer is killed and left behind:
the kernel ends it when the disk lets go. Answers come back as JSON.
"""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

#: What a child says begins with this when it is a value; else it is what went wrong.
_VALUE = b"\0"


@dataclass(frozen=True)
class Call:
    """function: takes nothing. seconds: its limit. gives: the type of what it gives, which must be data: JSON's own
    types (as which `Any` comes back), dataclasses, enums, paths, and lists, tuples and dictionaries of them."""

    function: Callable[[], Any]
    seconds: float = 10.0
    gives: Any = Any


@dataclass(frozen=True)
class Answer:
    """value: what the call returned, or None where `problem` says why there is none."""

    value: Any = None
    problem: str = ""


@dataclass
class _Child:
    pid: int
    read_fd: int
    until: float
    data: bytearray


def ask(calls: Sequence[Call]) -> list[Answer]:
    """Make all calls at once; their answers in the same order, the last one after the longest limit at the latest."""
    children = [_start(call) for call in calls]
    waiting = {child.read_fd: child for child in children}
    late: set[int] = set()
    with selectors.DefaultSelector() as selector:
        for child in children:
            selector.register(child.read_fd, selectors.EVENT_READ)
        while waiting:
            until = min(child.until for child in waiting.values())
            for key, _ in selector.select(max(0.0, until - time.monotonic())):
                data = os.read(key.fd, 1 << 16)
                waiting[key.fd].data += data
                if not data:
                    selector.unregister(key.fd)
                    del waiting[key.fd]
            now = time.monotonic()
            for child in [child for child in waiting.values() if child.until <= now]:
                os.kill(child.pid, signal.SIGKILL)
                selector.unregister(child.read_fd)
                del waiting[child.read_fd]
                late.add(child.pid)
    return [_answer(child, call, child.pid in late) for child, call in zip(children, calls, strict=True)]


def _start(call: Call) -> _Child:
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        _serve(call, write_fd)
    os.close(write_fd)
    return _Child(pid, read_fd, time.monotonic() + call.seconds, bytearray())


def _serve(call: Call, write_fd: int) -> NoReturn:
    """The child's whole life."""
    try:
        # Whoever reads our parent's output must see its end even while a child of ours still hangs.
        quiet = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(quiet, fd)
        try:
            told = _VALUE + TypeAdapter(call.gives).dump_json(call.function())
        except Exception as problem:
            told = f"the probe itself failed: {type(problem).__name__}: {problem}".encode(errors="replace")
        data = memoryview(told)
        while data:
            data = data[os.write(write_fd, data) :]
    finally:
        os._exit(0)


def _answer(child: _Child, call: Call, late: bool) -> Answer:
    os.close(child.read_fd)
    if late:
        os.waitpid(child.pid, os.WNOHANG)  # and not longer: a process that waits for a disk cannot be killed
        return Answer(problem=f"no answer within {call.seconds:g} s")
    _, status = os.waitpid(child.pid, 0)
    if os.WIFSIGNALED(status):
        return Answer(problem=f"ended by {signal.Signals(os.WTERMSIG(status)).name}")
    told = bytes(child.data)
    if not told.startswith(_VALUE):
        return Answer(problem=told.decode(errors="replace") or "ended without an answer")
    try:
        return Answer(TypeAdapter(call.gives).validate_json(told[len(_VALUE) :]))
    except ValidationError:
        return Answer(problem="its answer cannot be read")
