"""What an I/O engine is: vectored transfers between files and memory, and how one is chosen at open.

Belongs here: the interface and the choice. Does not belong here: slots, checksums, or what a transfer means.
The native engine (csrc/io) takes the first place in `PREFERENCE` when it is built.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Transfer:
    """One contiguous span of a file to or from a list of buffers.

    iov: uint64[k, 2], address and length of each buffer; with O_DIRECT all aligned as the file asks.
    done: called once, on a thread of the engine that may block for a checksum: bytes moved (the whole span, or less
    at the end of the file), or -errno. Nothing touches the buffers after that.
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
    """Moves bytes. Short transfers are continued, EINTR and EAGAIN repeated; what is left is an error or the end."""

    name: ClassVar[str]

    @abstractmethod
    def submit(self, transfers: Sequence[Transfer]) -> None:
        """Begin these transfers, as one batch where the engine can. Never blocks for long; any thread may call.

        After `close` every transfer ends as -ECANCELED.
        """

    def register_memory(self, address: int, length: int) -> None:  # noqa: B027 - optional, not abstract
        """Memory that many transfers will use."""

    @abstractmethod
    def close(self, timeout: float) -> bool:
        """Refuse new transfers, end waiting ones as -ECANCELED, wait for those in flight; whether all ended in time."""
