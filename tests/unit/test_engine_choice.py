"""The choice of an I/O engine: preference, reasons, forced choices, and a container without io_uring.

What engines do with transfers is test_engines' business.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap

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
    import ctypes, logging, struct, sys
    logging.basicConfig(level=logging.INFO)
    # A seccomp filter as containers have it: io_uring_setup (425 on every architecture) gives EPERM.
    code = struct.pack("HBBI", 0x20, 0, 0, 0) + struct.pack("HBBI", 0x15, 0, 1, 425)
    code += struct.pack("HBBI", 0x06, 0, 0, 0x00050001) + struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)
    text = ctypes.create_string_buffer(code)
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 4, ctypes.addressof(text)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
        sys.exit(77)
    from storage_backends.local.engine import open_engine
    engine = open_engine()
    print(engine.name, engine.passed_over.get("liburing"))
    engine.close(5)
"""


def test_a_container_that_forbids_io_uring_gets_threads() -> None:
    try:
        LiburingEngine().close(PATIENCE)
    except EngineUnavailable as error:
        pytest.skip(f"not allowed in the first place: {error}")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_FORBID_IO_URING)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip("seccomp filters cannot be set here")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("threads io_uring is forbidden here"), done.stdout
    assert "I/O engine: threads" in done.stderr
