"""Options of the gds tier: those of the local tier, and what may be done with cuFile.

Belongs here: keys and defaults. Does not belong here: what they lead to (decision.py).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from storage_backends.local.options import LocalOptions


class GdsOptions(LocalOptions):
    """As the local tier's, and:

    mode: how pages reach device memory. "auto": past the CPU where that goes, else as from a local tier, through
    pinned host memory; "gds": past the CPU, or the tier does not open; "compatibility": by cuFile, through host memory
    of its own where it must; "staging": without cuFile. way: how cuFile is asked ("auto": the best that works here;
    "stream": past the CPU alone).
    device: ordinal of the GPU; without it the one that the opening thread uses.
    """

    mode: Literal["auto", "gds", "compatibility", "staging"] = "auto"
    way: Literal["auto", "batch", "stream", "calls"] = "auto"
    device: int | None = Field(default=None, ge=0)
