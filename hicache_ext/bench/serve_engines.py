"""How each engine is asked, and what it offers to move a prompt from one tier to another.

Belongs here: routes, bodies and answers of engines. Does not belong here: connections (hicache_ext.bench.serve_client),
and which prompts go where (hicache_ext.bench.serve).

SGLang, 0.5.17 to 0.5.23: `POST /generate` with `input_ids` streams events whose `output_ids` are, by version, all
tokens so far or the new ones; `meta_info.cached_tokens_details` counts prompt tokens by tier. `/flush_cache` drops
device and host memory and is refused while storage work is pending. `/server_info` knows page size and pool sizes.
`/metrics` (with --enable-metrics) counts the tokens that reached the storage tier.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hicache_ext.bench.serve_client import Body, Client, EngineError, Format, Parsed

_FLUSH_LIMIT_S = 120.0
_QUIET_S = 8.0
_FIRST_QUIET_S = 60.0
_SETTLE_LIMIT_S = 120.0
_POLL_S = 0.1


@dataclass(frozen=True)
class Facts:
    """What an engine says of itself; 0 and "" where it does not say.

    device_tokens: KV tokens that fit in device memory. longest: prompt tokens that it takes. host: whether it keeps KV
    in host memory. storage: the name of its storage backend.
    """

    version: str = ""
    model: str = ""
    page_tokens: int = 0
    device_tokens: int = 0
    longest: int = 0
    host: bool = False
    storage: str = ""


class Engine(Format, Protocol):
    """A running engine. All methods raise EngineError when it does not answer."""

    client: Client

    def facts(self) -> Facts: ...

    def stored_tokens(self) -> float | None:
        """Tokens written to the storage tier so far; None where the engine does not count them."""

    def flush(self) -> None:
        """Drop what device and host memory hold. Raises EngineError when it is refused for too long."""


class SGLang:
    """SGLang's HTTP server."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def body(self, prompt: Sequence[int], new_tokens: int) -> Body:
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        values = {"input_ids": list(prompt), "stream": True, "sampling_params": sampling}
        return Body("/generate", json.dumps(values, separators=(",", ":")).encode())

    def parse(self, lines: Sequence[bytes]) -> Parsed:
        first = -1
        tokens: list[int] = []
        meta: dict[str, Any] = {}
        for number, line in enumerate(lines):
            text = line.strip().removeprefix(b"data:").strip()
            if not text or text == b"[DONE]":
                continue
            try:
                event = json.loads(text)
                if "error" in event:
                    raise ValueError(f"refused: {event['error']}")
                meta, new = event["meta_info"], event.get("output_ids") or []
                whole = len(new) >= meta["completion_tokens"]
            except (KeyError, TypeError, json.JSONDecodeError) as error:
                raise ValueError(f"not an event of SGLang's: {text[:120]!r}") from error
            if new:
                first = number if first < 0 else first
                tokens = new if whole else tokens + new
        if first < 0:
            raise ValueError("answered without a token")
        if len(tokens) != meta["completion_tokens"]:
            raise ValueError(f"{len(tokens)} of {meta['completion_tokens']} tokens arrived")
        return Parsed(tokens, first, meta.get("prompt_tokens", 0), _cached(meta))

    def facts(self) -> Facts:
        status, text = self.client.call("GET", "/server_info", timeout_s=60)
        if status == 404:  # older versions
            status, text = self.client.call("GET", "/get_server_info", timeout_s=60)
        if status != 200:
            raise EngineError(f"{self.client.url}/server_info: status {status}: is this SGLang?")
        try:
            said = json.loads(text)
            return Facts(
                version=str(said.get("version", "")),
                model=str(said.get("model_path", "")),
                page_tokens=int(said.get("page_size") or 0),
                device_tokens=int(said.get("max_total_num_tokens") or 0),
                longest=int(said.get("max_req_input_len") or 0),
                host=bool(said.get("enable_hierarchical_cache")),
                storage=str(said.get("hicache_storage_backend") or ""),
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise EngineError(f"{self.client.url}/server_info: not understood: {error}") from error

    def stored_tokens(self) -> float | None:
        status, text = self.client.call("GET", "/metrics", timeout_s=30)
        if status != 200:
            return None
        return metric(text, "sglang:backuped_tokens_total") or 0.0

    def flush(self) -> None:
        end = time.monotonic() + _FLUSH_LIMIT_S
        while True:
            status, text = self.client.call("POST", "/flush_cache", timeout_s=60)
            if status == 200:
                return
            if status in (401, 403):
                raise EngineError(f"{self.client.url}/flush_cache: status {status}. Fix: give the server's --api-key")
            if time.monotonic() > end:
                raise EngineError(f"{self.client.url}/flush_cache: refused: {' '.join(text.split())[:200]}")
            time.sleep(0.2)


def _cached(meta: dict[str, Any]) -> dict[str, int]:
    details = meta.get("cached_tokens_details")
    if details is None:  # nothing cached, or an engine that gives the sum only: then it lay in memory
        return {"device": int(meta.get("cached_tokens") or 0), "host": 0, "storage": 0}
    return {tier: int(details.get(tier) or 0) for tier in ("device", "host", "storage")}


def metric(text: str, name: str) -> float | None:
    """Sum of a Prometheus metric over its labels; None where it does not exist."""
    lines = [line for line in text.splitlines() if line.startswith((name + "{", name + " "))]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines) if lines else None


def settle(engine: Engine, expected: float, first: bool = False, pause_s: float = 1.0) -> bool:
    """Wait until the storage tier has `expected` tokens (of `stored_tokens`); whether it has.

    Gives up when nothing has come for some seconds: a tier may refuse. first: of the engine's life, for which SGLang
    compiles its page hash. Where the engine does not count, this only pauses.
    """
    seen = engine.stored_tokens()
    if seen is None:
        time.sleep(pause_s)
        return True
    begin = since = time.monotonic()
    while seen < expected:
        now = time.monotonic()
        if now - since > (_FIRST_QUIET_S if first else _QUIET_S) or now - begin > _SETTLE_LIMIT_S:
            return False
        time.sleep(_POLL_S)
        last, seen = seen, engine.stored_tokens() or 0.0
        if seen != last:
            since = now
    return True
