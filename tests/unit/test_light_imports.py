"""The core imports without any engine or heavy library."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "sglang",
    "vllm",
    "obstore",
    "redis",
    "cryptography",
    "nixl",
    "nixl_cu12",
    "mooncake",
    "liburing",
    "matplotlib",
)
CORE = (
    "hicache_ext.config",
    "hicache_ext.page",
    "hicache_ext.store",
    "storage_backends.base",
    "storage_backends.memory",
    "storage_backends.object",
    "storage_backends.secrets",
    "storage_backends.object_backend",
    "storage_backends.local.backend",
    "storage_backends.nixl.backend",
    "hicache_ext.cli.main",
    "hicache_ext.cuda",
    "hicache_ext.sglang.plugin",
)


@pytest.mark.parametrize("module", CORE)
def test_without_heavy_libraries(module: str) -> None:
    block = ";".join(f"sys.modules[{name!r}] = None" for name in HEAVY)
    done = subprocess.run([sys.executable, "-c", f"import sys;{block};import {module}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
