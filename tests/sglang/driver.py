"""Runs scenarios on a real controller, in one process per SGLang version and route.

    python driver.py plugin|plain OUT.json [SCENARIO...]

Scenarios called `plugin_*` run with the plugin's hooks in place, `plain_*` without. OUT.json gets each one's outcome;
test_versions.py reads it. Runs inside the SGLang environment, without pytest.
"""

# ruff: noqa: E402 - the path comes first

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import rig
from support import ROOT, logged

from hicache_ext.sglang import versions


def main() -> None:
    mode, out = sys.argv[1], Path(sys.argv[2])
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("hicache_ext").setLevel(logging.INFO)
    rig.prepare(model_path=str(rig.model_folder(ROOT)))
    if mode == "plugin":
        rig.load_plugin()
    results: dict[str, Any] = {"version": versions.installed()}
    chosen = sys.argv[3:]
    modules = [importlib.import_module(path.stem) for path in sorted(HERE.glob("scenarios_*.py"))]
    scenarios = {name: value for module in modules for name, value in vars(module).items()}
    for name, scenario in scenarios.items():
        if not name.startswith(mode + "_") or (chosen and name not in chosen):
            continue
        began = time.monotonic()
        rig.out(f"--- {name}")
        with logged() as lines:
            try:
                scenario()
                results[name] = {"ok": True, "seconds": round(time.monotonic() - began, 2)}
            except Exception:
                results[name] = {"ok": False, "error": "\n".join([traceback.format_exc(), *lines.lines[-30:]])}
                rig.out(results[name]["error"])
    out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # Storage threads of rigs that failed would keep the process alive.
    os._exit(0)
