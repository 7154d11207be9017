"""A router's view of one server's KV events, over ZMQ, and what the storage directory itself says should be in it."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from hicache_ext.events import model
from storage_backends.base import Dispatcher
from storage_backends.format import BLOCK, ExtentHeader, FormatError, SlotHeader
from storage_backends.local import LocalBackend

Block = tuple[Any, ...]
"""Parent, tokens and salt."""


class Router:
    """Listens to a server whose `config` names it. Counts no references, and takes offence at what a router loses."""

    def __init__(self) -> None:
        import zmq

        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.setsockopt(zmq.RCVHWM, 0)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        # SGLang's publisher connects to an endpoint that is no wildcard.
        self.config = json.dumps({"publisher": "zmq", "endpoint": f"tcp://127.0.0.1:{port}", "topic": "kv"})
        self.view: dict[str, dict[int, Block]] = {}
        self.seen: dict[int, Block] = {}  # every block ever stored on the device
        self.clears = 0
        self.problems: list[str] = []
        self._sequence = -1
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5)
        self._socket.close(0)

    def disk(self) -> dict[int, Block]:
        with self._lock:
            return dict(self.view.get("DISK", {}))

    def becomes_what_is_on(self, tier: Path, namespace: bytes, seconds: float = 40) -> dict[int, Block]:
        """Wait until the view of the disk is what is on it; that view. Blocks that the device had are the same."""
        until = time.monotonic() + seconds
        while True:
            wanted, view = on_disk(tier, namespace), self.disk()
            assert not self.problems, self.problems[:3]
            if view == wanted:
                break
            missing, wrong = len(wanted.keys() - view.keys()), len(view.keys() - wanted.keys())
            said = f"{missing} of {len(wanted)} are missing, {wrong} are too many, {len(view)} seen"
            assert time.monotonic() < until, said
            time.sleep(0.3)
        for block in view.keys() & self.seen.keys():
            assert view[block] == self.seen[block], "the tier's block is not the device's"
        return view

    def _run(self) -> None:
        while not self._stop.is_set():
            if not self._socket.poll(100):
                continue
            _, number, payload = self._socket.recv_multipart()
            with self._lock:
                self._hear(int.from_bytes(number, "big"), payload)

    def _hear(self, number: int, payload: bytes) -> None:
        # The very first message, of the empty cache, may go out before the connection stands.
        if number != self._sequence + 1 and not (self._sequence < 0 and number == 1):
            self.problems.append(f"message {number} after {self._sequence}")
        self._sequence = number
        decoded = model.decode(payload)
        self.problems += decoded.problems
        for event in decoded.batch.events:
            if isinstance(event, model.AllBlocksCleared):
                self.view.clear()
                self.clears += 1
                continue
            medium = event.medium or "GPU"
            blocks = self.view.setdefault(medium, {})
            for at, block in enumerate(event.block_hashes):
                if isinstance(event, model.BlockRemoved):
                    if blocks.pop(block, None) is None and medium == "DISK":
                        self.problems.append(f"{block} removed, though never stored")
                    continue
                if block in blocks and medium == "DISK":
                    self.problems.append(f"{block} stored twice")
                tokens = tuple(event.token_ids[at * event.block_size : (at + 1) * event.block_size])
                parent = event.block_hashes[at - 1] if at else event.parent_block_hash
                blocks[block] = (parent, tokens, event.cache_salt)
                if medium == "GPU":
                    self.seen[block] = blocks[block]


def namespaces(tier: Path) -> set[bytes]:
    """Of the extents in a tier's directory."""
    found = set()
    for path in tier.rglob("e*.ext"):
        try:
            found.add(ExtentHeader.decode(path.read_bytes()[:BLOCK]).namespace)
        except (FormatError, OSError):
            continue
    return found


def on_disk(tier: Path, namespace: bytes) -> dict[int, Block]:
    """What the slots of this namespace say that the index of a process which opens the directory finds there."""
    slots: dict[bytes, SlotHeader] = {}
    for path in tier.rglob("e*.ext"):
        with path.open("rb") as file:
            try:
                extent = ExtentHeader.decode(file.read(BLOCK))
            except FormatError:
                continue
            if extent.namespace != namespace:
                continue
            for slot in range(extent.slots):
                file.seek(extent.slot_offset(slot))
                try:
                    header = SlotHeader.decode(file.read(BLOCK))
                except FormatError:
                    continue
                newest = slots.get(header.key)
                if newest is None or newest.generation < header.generation:
                    slots[header.key] = header
    dispatcher = Dispatcher()
    backend = LocalBackend(LocalBackend.Options(path=tier, capacity=2 << 30, engine="threads"), dispatcher)
    try:
        there = [header for key, header in slots.items() if backend._index.has(namespace, key)]
    finally:
        backend.close()
        dispatcher.close()
    assert all(header.tokens is not None and header.event_hash for header in there), "a page without its tokens"
    return {
        header.event_hash: (header.parent_event_hash or None, tuple(header.tokens.tolist()), header.salt or None)
        for header in there
        if header.tokens is not None
    }
