"""`share: engines` of a configuration: whether the model's pages can be shared, as far as that can be told without it.

Belongs here: what the model's config says. Does not belong here: an engine's arguments and memory, of which each engine
says itself, in one line when it starts, whether they fit.
"""

from __future__ import annotations

import json

from hicache_ext import canonical, fingerprint
from hicache_ext.config import Config
from hicache_ext.doctor.finding import Finding, ok, warning

TITLE = "share: engines"


def probe(config: Config) -> list[Finding]:
    """One finding where pages are to be shared, none elsewhere."""
    if config.share != "engines":
        return []
    pages = f"canonical pages of {config.share_page} tokens"
    rest = "each engine says in one line at start whether its own arguments and memory fit"
    if not config.model.path:
        return [ok(TITLE, f"{pages}; not checked against a model: `model.path` is not set; {rest}")]
    path = fingerprint.locate(config.model.path, None)
    try:
        if path is None:
            raise FileNotFoundError(f"{config.model.path} is not there")
        reason = canonical.objection(json.loads((path / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        return [warning(TITLE, f"{pages}; the model's config cannot be read: {error}", "correct `model.path`")]
    if reason:
        return [warning(TITLE, f"does not hold: {reason}; pages are each engine's own", "remove `share: engines`")]
    return [ok(TITLE, f"{pages}; KV of this model can be shared; {rest}")]
