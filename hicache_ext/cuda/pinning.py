"""Host memory that a GPU copies from and to by itself: pinning it, and the end of that.

Belongs here: the driver's two calls and what must be so around them. Does not belong here: whose memory it is (slots:
hicache_ext.device; regions: storage_backends.memory).
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import weakref
from typing import Any

logger = logging.getLogger(__name__)

_PORTABLE = 1
_SUCCESS, _NOT_REGISTERED = 0, 713
_RELAXED = 2

_kept: list[mmap.mmap] = []


def pin(address: int, size: int) -> str:
    """Pin this memory for the GPU whose context is current; why it could not be, "" when it is.

    By the driver alone: an error of the runtime's would stay behind, for torch to meet at its next call.
    """
    try:
        register = ctypes.CDLL("libcuda.so.1").cuMemHostRegister_v2
    except (OSError, AttributeError) as error:
        return f"no CUDA driver: {error}"
    result = register(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_uint(_PORTABLE))
    return f"cuMemHostRegister: error {result}" if result else ""


def unpinning(owner: Any, memory: mmap.mmap, address: int) -> weakref.finalize[Any, Any]:
    """What unpins memory that was pinned on this thread: call it, or it happens when `owner` goes, whoever lets go of
    it last. However that is, the memory is unpinned first and unmapped then.
    """
    made = weakref.finalize(owner, _unpin, memory, address, _context(), os.getpid())
    made.atexit = False
    return made


def _context() -> int | None:
    """The context that is current in this thread, for `_unpin` to come back to."""
    context = ctypes.c_void_p()
    ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(context))
    return context.value


def _unpin(memory: mmap.mmap, address: int, context: int | None, process: int) -> None:
    """Unpin, from whatever thread lets go of the memory; kept for good where the driver does not let go of it.

    The driver would go on taking the addresses for the pages that it pinned, whoever is given them next.
    """
    if os.getpid() != process:
        return  # a forked child has neither the driver nor these pages
    driver = ctypes.CDLL("libcuda.so.1")
    mode, popped = ctypes.c_int(_RELAXED), ctypes.c_void_p()
    pushed = driver.cuCtxPushCurrent_v2(ctypes.c_void_p(context)) == 0
    driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))  # another thread may be capturing a graph
    result = driver.cuMemHostUnregister(ctypes.c_void_p(address))
    driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    if pushed:
        driver.cuCtxPopCurrent_v2(ctypes.byref(popped))
    if result not in (_SUCCESS, _NOT_REGISTERED):
        _kept.append(memory)
        logger.warning("hicache_ext: cuMemHostUnregister: error %s: %s bytes are never given back", result, len(memory))
