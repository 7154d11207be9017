"""Scripts over a driver that stands in for CUDA's (stand_in_driver.c), each in a process of its own.

A process loads one driver, so each script is a forked child that loads it first: its path is sys.argv[1]. Torch is
imported once, before.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("cc") or shutil.which("gcc")

_RUNNER = """
import json, os, sys, traceback
import torch
scripts, folder = json.loads(open(sys.argv[2]).read()), os.path.dirname(sys.argv[2])
for number, script in enumerate(scripts):
    child = os.fork()
    if child == 0:
        out = os.open(f"{folder}/{number}.out", os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1), os.dup2(out, 2)
        try:
            exec(script, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(1)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


def build(folder: Path) -> Path:
    """The driver, as libcuda.so.1 in this folder. Skips where there is no compiler."""
    if COMPILER is None:
        pytest.skip("no C compiler")
    driver = folder / "libcuda.so.1"
    command = [COMPILER, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(driver)]
    subprocess.run([*command, str(ROOT / "tests" / "stand_in_driver.c")], check=True, timeout=60)
    return driver


def run(folder: Path, head: str, scripts: Mapping[str, str]) -> dict[str, str]:
    """What each script printed, by name, run after `head`; both as they are indented. folder: an empty one. Skips where
    there is no compiler."""
    driver = build(folder)
    written = folder / "scripts.json"
    written.write_text(json.dumps([textwrap.dedent(head) + textwrap.dedent(script) for script in scripts.values()]))
    done = subprocess.run(
        [sys.executable, "-c", _RUNNER, str(driver), str(written)], capture_output=True, text=True, timeout=240,
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {name: (folder / f"{number}.out").read_text() for number, name in enumerate(scripts)}
