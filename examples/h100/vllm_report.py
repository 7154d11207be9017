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
compare("own pages, memory tier", part("small-memory", "loaded"), right)
compare("own pages, memory tier, zeroed (must differ)", part("small-memory", "zeroed"), right)
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
    tokens = {
        role: [one for turns in ("decode_ms", "decode_again_ms") for one in (part(role, turns, batch) or [])]
        for role in ("large-plain", "large-ours", "large-offloading")
    }
    plain = tokens["large-plain"]
    for role, spent in tokens.items():
        if plain and spent:
            a, b = statistics.median(plain), statistics.median(spent)
            print(
                f"{batch:>3s} sequences, {role.removeprefix('large-'):12s} {b:.3f} ms, {100 * (b / a - 1):+.2f} %",
                spent,
            )

print("== GB/s, and which way pages went")
for role in ("small-first", "small-second", "small-memory", "large-ours", "large-local"):
    counted = part(role, "counted") or {"all": part(role, "counts") or {}}
    for kind, counts in counted.items():
        line = []
        for what in ("load", "save"):
            if pages := counts.get(f"{what}_hit", 0):
                past = counts.get(f"{what}_past_host", 0)
                line.append(f"{what}: {pages} pages, {past} past the host")
                if spent := counts.get(f"{what}_device_us", 0):
                    line.append(f"copies {counts.get(f'{what}_bytes', 0) / spent / 1e3:.1f} GB/s")
        if line:
            other = {name: number for name, number in counts.items() if number and not name.endswith(("_us", "_bytes"))}
            print(f"{role} {kind}: {', '.join(line)}", other)
    for what, found in (part(role, "spans") or {}).items():
        sizes = sorted({size for size, _ in found if size})
        for size in sizes:
            speeds = sorted(size / seconds / 1e9 for one, seconds in found if one == size)
            print(
                f"{role}: {what} of {size / 1e9:.2f} GB from start to end: {statistics.median(speeds):.1f} GB/s "
                f"({speeds[0]:.1f} to {speeds[-1]:.1f}, {len(speeds)} times)"
            )
    for name, speed in (part(role, "copies") or {}).items():
        print(f"    {name}: {speed}")
for role, found in every.items():
    if "error" in found:
        print(f"FAILED {role}: {found['error'].splitlines()[-1] if found['error'] else ''}")
Path(sys.argv[2]).write_text(json.dumps(every, indent=1))
