"""The choice of an I/O engine: preference, reasons, forced choices, and a container without io_uring.

What engines do with transfers is test_engines' business.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from storage_backends.base import OptionError
from storage_backends.local import engine as engine_module
from storage_backends.local.engine import EngineUnavailable, open_engine
from storage_backends.local.engine_liburing import LiburingEngine

PATIENCE = 30.0


def test_auto_takes_the_first_that_works_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(engine_module._CLASSES, "native", ("storage_backends.local.not_there", "NativeEngine"))

    def unavailable(self: LiburingEngine, **_: object) -> None:
        raise EngineUnavailable("forbidden here")

    monkeypatch.setattr(LiburingEngine, "__init__", unavailable)
    with caplog.at_level(logging.INFO, engine_module.__name__):
        engine = open_engine(workers=2, depth=8)
    assert engine.name == "threads"
    assert engine.passed_over == {"native": "not built", "liburing": "forbidden here"}
    assert [record.getMessage() for record in caplog.records] == [
        "I/O engine: threads (native: not built; liburing: forbidden here)"
    ]
    assert engine.close(PATIENCE)
    with pytest.raises(OptionError, match=r"engine = 'liburing': forbidden here.*Fix: install hicache-ext"):
        open_engine("liburing")


def test_unknown_engine_names_the_choices() -> None:
    with pytest.raises(OptionError, match=r"engine = 'posix'.*native, liburing, threads"):
        open_engine("posix")


_FORBID_IO_URING = """
    import ctypes, errno, logging, struct, sys
    logging.basicConfig(level=logging.INFO)
    # A seccomp filter as containers have it: io_uring_setup (425 on every architecture) gives this error.
    refused = 0x00050000 | getattr(errno, sys.argv[1])
    code = struct.pack("HBBI", 0x20, 0, 0, 0) + struct.pack("HBBI", 0x15, 0, 1, 425)
    code += struct.pack("HBBI", 0x06, 0, 0, refused) + struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)
    text = ctypes.create_string_buffer(code)
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 4, ctypes.addressof(text)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
        sys.exit(77)
    from storage_backends.local.engine import open_engine
    engine = open_engine()
    print(engine.name, engine.passed_over)
    engine.close(5)
"""


@pytest.mark.parametrize(
    ("number", "native", "liburing"),
    [
        ("EPERM", "io_uring is forbidden here", "io_uring is forbidden here"),
        ("ENOSYS", "this kernel has no io_uring", "this kernel has no io_uring"),
        ("ENOMEM", "the limit of locked memory (ulimit -l) is too low for a ring", "io_uring got no memory"),
    ],
)
def test_a_kernel_that_gives_no_ring_gets_threads(number: str, native: str, liburing: str) -> None:
    """EPERM: a container's profile. ENOSYS: an old kernel. ENOMEM: one that counts rings as locked memory (before
    5.12), under a low limit.
    """
    try:
        LiburingEngine().close(PATIENCE)
    except EngineUnavailable as error:
        pytest.skip(f"not allowed in the first place: {error}")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_FORBID_IO_URING), number],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip("seccomp filters cannot be set here")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("threads {"), done.stdout
    assert f"'liburing': '{liburing}" in done.stdout
    assert f"'native': '{native}" in done.stdout or "'native': 'not built'" in done.stdout
    assert done.stderr.count("I/O engine: threads (native: ") == 1
    assert len(done.stderr.splitlines()) == 1, "and nothing else is said"


_NO_LOCKED_MEMORY = """
    import logging, os, resource, sys, threading
    logging.basicConfig(level=logging.INFO)
    import numpy as np
    from storage_backends.buffers import OwnedMemory
    from storage_backends.local import engine_liburing, engine_threads  # while this user may still read the files
    from storage_backends.local.engine import Transfer, open_engine
    try:
        import storage_backends.local.engine_native
    except ImportError:
        pass
    fd = os.memfd_create("file")
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    if os.getuid() == 0:
        os.setuid(65534)  # root has no limit
    engine = open_engine(sys.argv[1])
    print(engine.name, *engine.passed_over.values(), sep=": ")
    memory = OwnedMemory(8192)
    engine.register_memory(memory.address, memory.size)
    for write in (True, False):
        ended = threading.Event()
        iov = np.array([[memory.address, 8192]], np.uint64)
        engine.submit([Transfer(fd, 0, iov, write, lambda n: (print(n), ended.set()))])
        assert ended.wait(30)
    print(engine.close(30))
"""


@pytest.mark.parametrize("choice", ["auto", "native", "liburing"])
def test_without_any_locked_memory(choice: str) -> None:
    """Some kernels count a ring as locked memory: then there is none, and auto takes the engine that needs none."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_NO_LOCKED_MEMORY), choice],
        capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    if choice != "auto" and done.returncode:
        assert "OptionError" in done.stderr
        assert "ulimit -l" in done.stderr or "not built" in done.stderr, done.stderr
        return
    assert done.returncode == 0, done.stderr
    engine, *moved = done.stdout.splitlines()
    assert moved == ["8192", "8192", "True"]
    if engine.startswith("threads"):
        assert engine.count("ulimit -l") + engine.count("not built") == 2
    assert done.stderr.count("I/O engine: ") == 1
