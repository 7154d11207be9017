"""The scenarios on each supported SGLang version: one process per version and route, one test per scenario."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
VERSIONS = ("0.5.17", "0.5.21", "0.5.23")
SCENARIOS = [
    name
    for path in sorted(HERE.glob("scenarios_*.py"))
    for name in re.findall(r"^def ((?:plugin|plain)_\w+)\(", path.read_text(), re.MULTILINE)
]
#: A folder with one unpacked SGLang wheel per version.
UNPACKED = Path(os.environ.get("HICACHE_EXT_SGLANG_DIR", HERE.parents[1] / "build" / "sglang"))
#: An interpreter with SGLang's dependencies (its CPU environment); this one, where it has them.
PYTHON = os.environ.get("HICACHE_EXT_SGLANG_PYTHON", sys.executable)

pytestmark = pytest.mark.sglang


def _installed() -> str:
    """The SGLang version of this interpreter's own environment, "" where there is none."""
    try:
        return importlib.metadata.version("sglang") if sys.executable == PYTHON else ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def _path(version: str) -> Path | None:
    """What goes before the environment's own packages; None where they are this version."""
    return None if _installed() == version else UNPACKED / version


def _missing(version: str) -> str:
    path = _path(version)
    if path is not None and not (path / "sglang").is_dir():
        return f"no unpacked SGLang {version} in {UNPACKED} (make sglang-wheels, or set HICACHE_EXT_SGLANG_DIR)"
    if sys.executable == PYTHON and importlib.util.find_spec("torch") is None:
        return "no torch here (make venv, or set HICACHE_EXT_SGLANG_PYTHON to the SGLang CPU environment's python)"
    return ""


@functools.cache
def _run(version: str, mode: str) -> dict[str, Any]:
    """Every outcome of one process, by scenario."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "out.json", Path(folder) / "log"
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HICACHE_EXT_")},
            "PYTHONPATH": str(_path(version) or ""),
            "SGLANG_USE_CPU_ENGINE": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with log.open("wb") as stream:
            done = subprocess.run(
                [PYTHON, str(HERE / "driver.py"), mode, str(out)], env=environment, stdout=stream, stderr=stream,
                timeout=240, check=False,
            )  # fmt: skip
        if not out.exists():
            return {"version": "", "crash": f"rc {done.returncode}:\n" + log.read_text(errors="replace")[-4000:]}
        results: dict[str, Any] = json.loads(out.read_text())
        return results


@pytest.mark.timeout(300)
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("version", VERSIONS)
def test_scenario(version: str, scenario: str) -> None:
    missing = _missing(version)
    if missing:
        # In CI a version that was not tested is a failure, not a skip.
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    results = _run(version, scenario.split("_")[0])
    assert results["version"] == version, results.get("crash", results["version"])
    outcome = results[scenario]
    assert outcome["ok"], outcome["error"]
