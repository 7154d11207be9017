"""The tables of examples/h100/vllm.sh, from the files that its engines left.

python vllm_report.py WORK RESULT.json      one file of all, and what it means on standard output
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

work = Path(sys.argv[1])
every: dict[str, Any] = {path.stem: json.loads(path.read_text()) for path in sorted(work.glob("*.json"))}


def part(role: str, *names: str) -> Any:
    found = every.get(role, {})
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found


def compare(label: str, mine: Any, right: Any, hits: bool = True) -> None:
    """How many prompts have the same output ids, and how many tokens came from the tiers."""
    if not mine or not right:
        print(f"{label:58s} NOT RUN")
        return
    same = [name for name in mine if mine[name]["ids"] == right.get(name, {}).get("ids")]
    loaded = sum(one.get("storage", one["cached"]) or 0 for one in mine.values())
    expected = sum(one["cached"] or 0 for name, one in right.items() if name in mine)
    cached = f", {loaded} tokens loaded of {expected}" if hits else ""
    print(f"{label:58s} {len(same)} of {len(mine)} prompts the same{cached}")


print("== outputs, small model with random weights (12 greedy tokens)")
right = part("small-plain", "cached")
compare("vLLM computed twice (noise of other shapes)", part("small-plain", "computed"), right, hits=False)
compare("own pages, same process", part("small-first", "loaded"), right)
compare("own pages, fresh process", part("small-second", "loaded"), right)
compare("own pages, zeroed (must differ)", part("small-first", "zeroed"), right)
compare("SGLang's pages in vLLM, against vLLM alone", part("small-share", "loaded"), right)
compare("the same, zeroed (must differ)", part("small-share", "zeroed"), right)
compare("vLLM's pages in SGLang, against SGLang alone", part("sglang-second", "loaded"), part("sglang-alone", "cached"))
compare("SGLang's pages in SGLang", part("sglang-first", "loaded"), part("sglang-first", "cached"))
for role, found in every.items():
    if "leaked" in found:
        print(f"{role}: blocks leaked {found['leaked']}")

print("== milliseconds to the first token, large model (medians)")
columns: dict[str, dict[tuple[str, int], list[float]]] = {}
ids: dict[tuple[int, int], dict[str, Any]] = {}
for role, found in every.items():
    for row in found.get("rows", []):
        name = f"{role.removeprefix('large-')} {row['kind']}"
        columns.setdefault(name, {}).setdefault(("ttft", row["tokens"]), []).append(row["ttft_ms"])
        columns[name].setdefault(("cached", row["tokens"]), []).append(row["cached"])
        ids.setdefault((row["tokens"], row["turn"]), {})[name] = row["ids"]
for name, cells in columns.items():
    line = [f"{name:24s}"]
    for length in sorted({length for _, length in cells}):
        ttft, cached = (statistics.median(cells[what, length]) for what in ("ttft", "cached"))
        line.append(f"{length}: {ttft:8.1f} ms ({int(cached)} cached)")
    print("  ".join(line))
for (length, turn), found in ids.items():
    if len({json.dumps(one) for one in found.values()}) > 1:
        print(f"outputs differ at {length}, prompt {turn}:", found)

print("== milliseconds a token, nothing cached (medians), and what the connector adds")
for batch in ("1", "16"):
    plain, mine = (
        [one for turns in ("decode_ms", "decode_again_ms") for one in (part(role, turns, batch) or [])]
        for role in ("large-plain", "large-ours")
    )
    if plain and mine:
        a, b = statistics.median(plain), statistics.median(mine)
        print(
            f"{batch:>3s} sequences: {a:.3f} ms, {b:.3f} ms with the connector: {100 * (b / a - 1):+.2f} %", plain, mine
        )

print("== GB/s")
for kind, counts in (part("large-ours", "counted") or {}).items():
    for what in ("load", "save"):
        size, whole, on_device = (counts.get(f"{what}_{name}", 0) for name in ("bytes", "us", "device_us"))
        if size and whole and on_device:
            # Parts of a save wait side by side, so their sum is no time.
            through = f"{size / whole / 1e3:.2f} GB/s from start to end, " if what == "load" else ""
            between = f"{size / on_device / 1e3:.2f} GB/s between slots and blocks"
            print(f"{kind} {what}: {size / 1e9:.2f} GB, {through}{between}")
    print(kind, {name: number for name, number in counts.items() if number and not name.endswith("_us")})
print(part("large-ours", "copies"))
for role, found in every.items():
    if "error" in found:
        print(f"FAILED {role}: {found['error'].splitlines()[-1] if found['error'] else ''}")
Path(sys.argv[2]).write_text(json.dumps(every, indent=1))
