"""One NIXL agent with one plugin: registrations, and transfers that are watched until their end.

Belongs here: everything that calls NIXL's agent. Does not belong here: pages, files, objects.

Three things that the agent's own interface leaves to its user:

- Without a synchronisation mode its calls must not meet, and they give up the GIL: so it is asked for one.
- A transfer that is released while it is on its way is forgotten, not stopped: its bytes land in memory that
  somebody else may own by then. So none is ever released before it has ended, and `close` leaves an agent that has
  some to the kernel, with all its memory.
- Nothing tells when a transfer has ended but asking. How long one takes is learnt from those before, and most of
  that time is slept in one piece.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from typing import Any, NamedTuple

import numpy as np

from storage_backends.base import OptionError
from storage_backends.buffers import HUGE_PAGE, OwnedMemory
from storage_backends.format import round_up

_SHORTEST, _LONGEST = 50e-6, 2e-3
#: A new duration counts this much; of what is expected this much is slept before the first question.
_WEIGHT, _SLEPT = 0.2, 0.7
#: Agents that had transfers on their way when they were closed, and what those may touch. Never freed.
_left: list[object] = []


class Side(NamedTuple):
    """One end of a transfer: rows of (address or offset, bytes, device), uint64[n, 3], and their kind of memory."""

    kind: str  # "DRAM", "FILE", "OBJ"
    rows: np.ndarray


class Transfer:
    """On its way until `ended`; `good` then says how. Everything that it touches must stay until then."""

    def __init__(self, agent: Agent, handle: Any, size: int) -> None:
        self._agent, self._handle, self._size = agent, handle, size
        self._since = time.monotonic()
        self._lock = threading.Lock()
        self.ended = self.good = False

    def poll(self) -> bool:
        """Ask once; whether it has ended."""
        with self._lock:
            if not self.ended:
                self._agent._ask(self)
            return self.ended


class Agent:
    """api: the module of library.load. Raises OptionError where the plugin cannot be opened. Thread-safe."""

    def __init__(self, api: Any, plugin: str, params: dict[str, str]) -> None:
        config = api.nixl_agent_config(
            backends=[], enable_prog_thread=False, sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        )
        self._agent: Any = api.nixl_agent(f"hicache-ext-{os.urandom(8).hex()}", config)
        if plugin not in self._agent.get_plugin_list():
            raise OptionError("plugin", plugin, "this build of NIXL has no such plugin", "reinstall it, or use another")
        try:
            self._agent.create_backend(plugin, params)
        except Exception as error:
            fix = "look at params, at the libraries that it needs, and with NIXL_LOG_LEVEL=INFO at what it says"
            raise OptionError("plugin", plugin, f"cannot be opened here: {error}", fix) from None
        self.polls = 0
        self._pace = 0.0  # seconds a byte
        self._flying: set[Transfer] = set()
        self._lock = threading.Lock()
        self._registered: list[Any] = []

    def register(self, kind: str, places: list[tuple[int, int, int, str]]) -> Any:
        """Make (address or offset, bytes, device, name) known; what `forget` takes. Raises what NIXL raises."""
        return self._agent.register_memory(places, kind)

    def forget(self, registered: Any) -> None:
        with contextlib.suppress(Exception):  # nothing follows from it
            self._agent.deregister_memory(registered)

    def start(self, write: bool, memory: Side, store: Side) -> Transfer:
        """Begin to move all rows of `memory` to or from those of `store`. What NIXL raises: nothing has begun."""
        agent = self._agent
        handle = agent.initialize_xfer(
            "WRITE" if write else "READ",
            agent.get_xfer_descs(memory.rows, memory.kind),
            agent.get_xfer_descs(store.rows, store.kind),
            agent.name,
        )
        transfer = Transfer(self, handle, int(memory.rows[:, 1].sum()))
        with self._lock:
            self._flying.add(transfer)
        self._take(transfer, lambda: agent.transfer(handle))
        return transfer

    def wait(self, transfers: list[Transfer], seconds: float) -> bool:
        """Until all have ended, or so many seconds have passed; whether they have."""
        since = time.monotonic()
        expected = self._pace * max((transfer._size for transfer in transfers), default=0)
        pause = max(_SHORTEST, _SLEPT * expected)
        while not all(transfer.poll() for transfer in transfers):
            left = since + seconds - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(_LONGEST, max(_SHORTEST, (time.monotonic() - since) / 8))
        return True

    def close(self, *kept: object) -> bool:
        """Whether nothing was on its way. Else the agent stays, with what is `kept`, for as long as the process."""
        with self._lock:
            flying = list(self._flying)
        if all(transfer.poll() for transfer in flying):
            self._agent = None
            return True
        _left.append((self, kept))
        return False

    def _ask(self, transfer: Transfer) -> None:
        self.polls += 1
        self._take(transfer, lambda: self._agent.check_xfer_state(transfer._handle))

    def _take(self, transfer: Transfer, ask: Any) -> None:
        """The transfer's state. NIXL raises for one that has failed, and only when all of it has ended."""
        try:
            state = ask()
        except Exception:
            state = "ERR"
        if state == "PROC":
            return
        transfer.ended, transfer.good = True, state == "DONE"
        with self._lock:
            self._flying.discard(transfer)
            if transfer.good and transfer._size:
                took = (time.monotonic() - transfer._since) / transfer._size
                self._pace += (took - self._pace) * (_WEIGHT if self._pace else 1.0)
        with contextlib.suppress(Exception):
            transfer._handle.release()


class Lane:
    """Memory of our own that the agent knows, for one group of pages at a time."""

    def __init__(self, agent: Agent, size: int) -> None:
        self._agent = agent
        self.memory = OwnedMemory(size)
        self._registered = agent.register("DRAM", [(self.memory.address, size, 0, "")])

    def close(self) -> None:
        self._agent.forget(self._registered)
        self.memory.close()


class Lanes:
    """Lends lanes; makes them as they are needed. Thread-safe."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._free: list[Lane] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> Lane:
        """One of at least `size` bytes. A free one that is too small makes way for a new one."""
        with self._lock:
            self._free.sort(key=lambda lane: lane.memory.size)
            for i, lane in enumerate(self._free):
                if lane.memory.size >= size:
                    return self._free.pop(i)
            small = self._free.pop() if self._free else None
        if small is not None:
            small.close()
        return Lane(self._agent, round_up(size, HUGE_PAGE if size > HUGE_PAGE // 2 else mmap.PAGESIZE))

    def give(self, lane: Lane) -> None:
        with self._lock:
            self._free.append(lane)

    def close(self) -> None:
        with self._lock:
            free, self._free = self._free, []
        for lane in free:
            lane.close()
