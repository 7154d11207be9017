"""SIGKILL while the real controller writes a real host pool to the local tier, again and again."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import time

import rig
from support import ROOT, attached, version

PAGES = 8


def _tokens(turn: int, number: int) -> list[int]:
    first = 1 + (turn * 10_000 + number) * PAGES * rig.PAGE
    return list(range(first, first + PAGES * rig.PAGE))


def _write_until_killed(extra: dict[str, object], turn: int, pipe: int) -> None:
    """In a child: back up one prefix after the other; name each that the backup thread has acknowledged."""
    try:
        with attached(extra=extra) as found:
            for number in itertools.count():
                found.backup(found.key(_tokens(turn, number)), seed=number)
                os.write(pipe, f"{number}\n".encode())
    finally:
        os._exit(1)


def plugin_killed_while_writing() -> None:
    extra = {"tiers": [{"type": "local", "path": str(ROOT / "killed"), "capacity": "1GiB"}]}
    chance = random.Random(11)
    acknowledged: list[tuple[int, int]] = []
    turns = 20 if version() == (0, 5, 21) else 3
    for turn in itertools.count():
        if (turn >= turns and len(acknowledged) > 20) or turn >= 40:
            break
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _write_until_killed(extra, turn, writing)
        os.close(writing)
        with os.fdopen(reading) as acks:
            first = acks.readline()
            assert first, "the writer died by itself"
            time.sleep(chance.uniform(0, 0.15))
            os.kill(child, signal.SIGKILL)
            acknowledged += [(turn, int(line)) for line in itertools.chain([first], acks) if line.endswith("\n")]
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(acknowledged) > 20
    with attached(extra=extra) as found:
        usable = 0
        for turn, number in acknowledged:
            indices = found.host_pool.alloc(PAGES * rig.PAGE)
            found.fill(indices, seed=number)
            right = found.bytes_of(indices)
            found.host_pool.free(indices)
            got = found.prefetch(found.key(_tokens(turn, number)))
            assert right.startswith(got), (turn, number, "a wrong page was served")
            usable += len(got) * PAGES // len(right)
        assert usable >= 0.99 * PAGES * len(acknowledged), (usable, len(acknowledged))
        with contextlib.suppress(FileNotFoundError):
            assert not list((ROOT / "killed").rglob("*.tmp"))
        found.backup(found.key(_tokens(999, 0)), seed=1)
