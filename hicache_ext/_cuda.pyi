"""Types of the compiled block copies (csrc/cuda/module.cpp); the module may be absent at run time."""

import numpy as np
from numpy.typing import NDArray

kernels_built: bool

class Unavailable(Exception): ...
class Failed(Exception): ...

class Device:
    ordinal: int
    name: str
    driver: int
    multiprocessors: int
    capability: tuple[int, int]
    no_kernels: str
    batches: bool
    def copy(self, to: int, from_: int, bytes: int) -> None: ...
    def make_current(self) -> None: ...
    def memory_kind(self, address: int, length: int) -> str: ...
    def capturing(self, stream: int) -> bool: ...
    def crc32c(
        self,
        addresses: NDArray[np.uint64],
        lengths: NDArray[np.uint32],
        out: NDArray[np.uint32],
        stream: int,
        blocks: int,
    ) -> None: ...

class Memory:
    address: int

class Stream:
    handle: int
    def synchronize(self) -> None: ...

class CopyLane:
    mover: object
    def move(
        self,
        to: NDArray[np.uint64],
        from_: NDArray[np.uint64],
        bytes: NDArray[np.uint64],
        addresses: NDArray[np.uint64],
        lengths: NDArray[np.uint32],
        crcs: NDArray[np.uint32],
    ) -> None: ...

class CuFile:
    version: int
    peer_to_peer: bool
    nvidia_fs: tuple[int, int]

class CuFileFile: ...

class CuFileBuffer:
    address: int
    length: int

class CuFileLane:
    def issue(
        self,
        way: int,
        write: bool,
        files: list[CuFileFile],
        which: NDArray[np.uint32],
        bases: NDArray[np.uint64],
        addresses: NDArray[np.uint64],
        lengths: NDArray[np.uint64],
        offsets: NDArray[np.uint64],
    ) -> None: ...
    def results(self, out: NDArray[np.int64]) -> None: ...
    def crc32c(
        self, addresses: NDArray[np.uint64], lengths: NDArray[np.uint32], out: NDArray[np.uint32], blocks: int
    ) -> None: ...

class Stage:
    half_bytes: int

class Events:
    def __len__(self) -> int: ...
    def reset(self) -> None: ...
    def wait(self, stream: int, layer: int) -> None: ...
    def done(self, layer: int) -> bool: ...
    def synchronize(self, layer: int) -> None: ...

class Route:
    def copy(
        self,
        way: int,
        to_b: bool,
        a_pages: NDArray[np.int64],
        b_pages: NDArray[np.int64],
        stream: int,
        blocks: int,
        batch: bool,
        stage: Stage | None,
    ) -> None: ...
    def copy_layers(
        self,
        way: int,
        to_b: bool,
        a_pages: NDArray[np.int64],
        b_pages: NDArray[np.int64],
        planes_of_layer: int,
        stream: int,
        blocks: int,
        batch: bool,
        events: Events,
    ) -> None: ...

def open(ordinal: int) -> Device: ...
def current_ordinal() -> int: ...
def memory(device: Device, bytes: int) -> Memory: ...
def stream(device: Device) -> Stream: ...
def copy_lane(device: Device, blocks: int) -> CopyLane: ...
def cufile(device: Device, path: str, strict: bool) -> CuFile: ...
def cufile_file(library: CuFile, fd: int) -> CuFileFile: ...
def cufile_buffer(library: CuFile, address: int, length: int) -> CuFileBuffer: ...
def cufile_lane(library: CuFile) -> CuFileLane: ...
def stage(device: Device, half_bytes: int) -> Stage: ...
def events(device: Device, count: int) -> Events: ...
def route(
    device: Device,
    a_planes: NDArray[np.uint64],
    b_planes: NDArray[np.uint64],
    tokens: int,
    heads: int,
    run: int,
    a_token: int,
    a_head: int,
    b_token: int,
    b_head: int,
    a_page: int,
    a_count: int,
    b_page: int,
    b_count: int,
    span_bytes: int,
    span_starts: NDArray[np.uint64],
    span_at: NDArray[np.uint64],
    span_of: NDArray[np.uint32],
) -> Route: ...
def runs(
    a_planes: NDArray[np.uint64],
    b_planes: NDArray[np.uint64],
    tokens: int,
    heads: int,
    run: int,
    a_token: int,
    a_head: int,
    b_token: int,
    b_head: int,
    to_b: bool,
    a_pages: NDArray[np.uint64],
    b_pages: NDArray[np.uint64],
    first: int,
    planes: int,
) -> list[tuple[int, int, int]]: ...
