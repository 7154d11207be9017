"""Types of the compiled I/O engine (csrc/io/module.cpp); it may be absent at run time."""

import numpy as np
from numpy.typing import NDArray

class Unavailable(Exception): ...

class Engine:
    registered_bytes: int
    description: str

    def __init__(self, threads: int, depth: int, sqpoll: bool = False, iopoll: bool = False) -> None: ...
    def submit(
        self,
        token: int,
        fds: NDArray[np.int32],
        writes: NDArray[np.uint8],
        offsets: NDArray[np.uint64],
        starts: NDArray[np.uint64],
        iov: NDArray[np.uint64],
        cancelled: NDArray[np.uint64],
    ) -> bool: ...
    def submit_slots(
        self,
        token: int,
        write: bool,
        name_space: bytes,
        keys: bytes,
        header_bytes: int,
        lengths: NDArray[np.uint64],
        fds: NDArray[np.int32],
        files: NDArray[np.uint64],
        offsets: NDArray[np.uint64],
        iov: NDArray[np.uint64],
        copies: NDArray[np.uint64],
        cancelled: int,
    ) -> bool: ...
    def reap(self) -> list[tuple[int, bytes, bytes, bytes]] | None: ...
    def stop_reaping(self) -> None: ...
    def close(self, seconds: float) -> bool: ...
    def register_memory(self, address: int, length: int) -> str: ...
    def retain(self, files: list[int]) -> None: ...

def verify(
    name_space: bytes,
    key: bytes,
    header: int,
    header_bytes: int,
    addresses: NDArray[np.uint64],
    lengths: NDArray[np.uint64],
    moved: int,
) -> int: ...
