"""The ways a copy can take, and which one is tried first: a pure function of sizes.

Belongs here: the ways and the measured crossovers between them. Does not belong here: what a way does (csrc/cuda).

Measured on an H100 80GB (PCIe 5 x16, driver 580) by `hicache-ext bench copy`: GB/s to the device and from it, 64 pages
in random order, kernels on 3 or 4 multiprocessors.

    page        total      runs      memcpy     stage      kernel     engine
    256 KiB     16 MiB     1 KiB                38, 42     46, 49     2, 2
    256 KiB     16 MiB     4 KiB     49, 50     39, 42     47, 49     4, 5
    4 MiB       256 MiB    1 KiB     54, 55     52, 53     51, 52     16, 16
    4 MiB       256 MiB    64 KiB    53, 54     51, 53     49, 51     51, 52
    4 MiB (8)   32 MiB     64 KiB    48, 52     46, 48     48, 49     43, 45
"""

from __future__ import annotations

from enum import StrEnum

#: Runs at least so long keep a copy engine busy.
ENGINE_RUN = 64 << 10
#: A copy of so many bytes is worth what stage and engines take to get going...
LARGE = 128 << 20
#: ...if a page's stretches are at least so long.
STAGE_SPAN = 128 << 10


class Way(StrEnum):
    """engine: the copy engines, which take no multiprocessor. kernel: gathers or scatters host memory directly.
    stage: a kernel between the pools and a stage on the device, and large copies between that and the host."""

    engine = "engine"
    kernel = "kernel"
    stage = "stage"


def ways(run: int, span: int, layer_wise: bool, large: bool) -> tuple[Way, ...]:
    """All ways, best first, for a copy in runs of `run` bytes, where pages come in stretches of `span` (0: no longer).

    layer_wise: layers arrive one after another, beside kernels that have better use for multiprocessors. large: LARGE
    bytes or more in all.
    """
    if layer_wise:
        return (Way.engine, Way.kernel, Way.stage) if run >= ENGINE_RUN else (Way.kernel, Way.engine, Way.stage)
    if large and span >= STAGE_SPAN and span > run:
        return Way.stage, Way.kernel, Way.engine
    if large and run >= ENGINE_RUN:
        return Way.engine, Way.kernel, Way.stage
    return Way.kernel, Way.stage, Way.engine
