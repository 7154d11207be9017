"""What several tests on a GPU share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(scope="session")
def linker_on_cuda() -> Iterator[Any]:
    """tests/sglang's rig of the linker with its pools on the device; skips without an SGLang that has linkers."""
    pytest.importorskip(
        "sglang.srt.mem_cache.unified_cache.linker_factory",
        reason="no SGLang 0.5.23 or later",
        exc_type=ImportError,
    )
    here = str(Path(__file__).parents[1] / "sglang")
    sys.path.insert(0, here)
    import linker_rig
    import rig
    from support import ROOT

    rig.prepare(model_path=str(rig.model_folder(ROOT)))
    linker_rig.DEVICE = "cuda"
    yield SimpleNamespace(linker_rig=linker_rig, rig=rig)
    linker_rig.DEVICE = "cpu"
    sys.path.remove(here)
