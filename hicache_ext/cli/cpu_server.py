"""SGLang's flags and environment for a machine without a GPU: the tiny model, small pools.

Belongs here: what the demo and `bench serve` have in common. Does not belong here: storage flags, which each chooses.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PAGE_SIZE = 16
DEVICE_TOKENS = 8192
HOST_RATIO = 2


def flags(model: Path) -> list[str]:
    """Without storage, host and port."""
    return [
        *("--model-path", str(model), "--random-seed", "0"),
        *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
        *("--grammar-backend", "none", "--disable-overlap-schedule", "--dtype", "float32"),
        *("--page-size", str(PAGE_SIZE), "--max-total-tokens", str(DEVICE_TOKENS), "--max-running-requests", "8"),
        *("--context-length", "4096", "--mem-fraction-static", "0.3"),
        *("--hicache-ratio", str(HOST_RATIO), "--hicache-io-backend", "direct"),
        *("--hicache-mem-layout", "page_first_direct", "--hicache-write-policy", "write_through"),
    ]


def path_with_ninja() -> str:
    """SGLang compiles its page hash with ninja, which lies beside this interpreter."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def environment() -> dict[str, str]:
    # Half of the cores compute; the rest is for the server's other processes and the storage threads.
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    return {
        "PATH": path_with_ninja(),
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
