"""Devices for tests: a file made for it, and a real block device where loop devices are to be had."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

KINDS = ("file", "loop")


@contextlib.contextmanager
def blank_device(kind: str, file: Path, size: int) -> Iterator[Path]:
    """A device of `size` zeroes over `file`. kind: one of KINDS; skips where the machine gives no loop devices."""
    with open(file, "xb") as made:
        made.truncate(size)
    if kind == "file":
        yield file
        return
    try:
        made_loop = subprocess.run(["losetup", "-f", "--show", file], capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        pytest.skip("no losetup")
    if made_loop.returncode:
        pytest.skip(f"no loop devices: {made_loop.stderr.strip()}")
    loop = made_loop.stdout.strip()
    try:
        yield Path(loop)
    finally:
        subprocess.run(["losetup", "-d", loop], check=True, timeout=20)
