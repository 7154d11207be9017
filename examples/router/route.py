#!/usr/bin/env python3
"""Sends each prompt to the worker that has most of it, by the answers of Dynamo's own indexer. Needs Python alone.

    python -m dynamo.indexer --port 8090 &
    python route.py --block-size 64 \\
      --worker http://127.0.0.1:30000,tcp://127.0.0.1:5557,tcp://127.0.0.1:5558 \\
      --worker http://127.0.0.1:30001,tcp://127.0.0.1:5567,tcp://127.0.0.1:5568 < prompts.jsonl

A worker is its HTTP address, where it publishes KV events, and where it answers who missed some. Each line of the input
is a prompt's token ids, or SGLang's request with `input_ids`; each line of the output says who got it and why.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import urllib.error
import urllib.request
from typing import Any, NamedTuple

#: What a token found there counts, beside one that is computed anew (0): Dynamo's own weights.
WEIGHTS = {"gpu": 1.0, "cpu": 0.75, "disk": 0.25}
MODEL = "model"


class Worker(NamedTuple):
    url: str
    events: str
    replay: str


def ask(url: str, body: Any) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def worth(found: dict[str, Any]) -> float:
    """Tokens found, weighed. The indexer's numbers go down the tiers: each holds those of the tier above it."""
    above, sum_ = 0, 0.0
    for tier, weight in WEIGHTS.items():
        here = max(above, found.get(tier, 0))
        sum_ += weight * (here - above)
        above = here
    return sum_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--indexer", default="http://127.0.0.1:8090")
    parser.add_argument("--block-size", type=int, required=True, help="the engines' page size")
    parser.add_argument("--worker", action="append", required=True, metavar="URL,EVENTS,REPLAY")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--dry-run", action="store_true", help="choose, and send nothing")
    options = parser.parse_args()
    workers = [Worker(*text.split(",")) for text in options.worker]
    for number, worker in enumerate(workers, 1):
        # A worker that was restarted counts its messages from 0 again: the indexer must begin anew with it.
        with contextlib.suppress(urllib.error.HTTPError):
            ask(f"{options.indexer}/unregister", {"instance_id": number, "model_name": MODEL})
        ask(f"{options.indexer}/register", {
            "instance_id": number, "endpoint": worker.events, "replay_endpoint": worker.replay, "model_name": MODEL,
            "block_size": options.block_size,
        })  # fmt: skip
    sent = [0] * len(workers)
    for line in sys.stdin:
        given = json.loads(line)
        tokens = given["input_ids"] if isinstance(given, dict) else given
        found = ask(f"{options.indexer}/query", {"token_ids": tokens, "model_name": MODEL})["instances"]
        values = [worth(found.get(str(number), {})) for number in range(1, len(workers) + 1)]
        # Among equals the one that got least so far.
        best = max(range(len(workers)), key=lambda at: (values[at], -sent[at]))
        sent[best] += 1
        said = {
            "worker": workers[best].url,
            "tokens": len(tokens),
            "found": found.get(str(best + 1), {}),
            "worth": values,
        }
        if not options.dry_run:
            request = {"input_ids": tokens, "sampling_params": {"max_new_tokens": options.new_tokens, "temperature": 0}}
            said["answer"] = ask(f"{workers[best].url}/generate", request)
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    try:
        main()
    except urllib.error.HTTPError as error:
        sys.exit(f"{error.url}: {error.code} {error.read().decode(errors='replace')}")
    except OSError as error:
        sys.exit(f"no answer ({error}). Fix: look at whether the indexer and the workers run, and at their addresses")
