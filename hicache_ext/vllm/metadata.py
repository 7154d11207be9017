"""What the scheduler's half tells the worker's half at each step, and once at start the other way round.

Belongs here: the messages. vLLM carries them between its processes in its own way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata

from hicache_ext.page import Namespace
from hicache_ext.vllm.pages import Pages


@dataclass
class StepMetadata(KVConnectorMetadata):
    """epoch: the cache's, which a reset changes. idle: nothing is computed in this step."""

    loads: list[Pages] = field(default_factory=list)
    saves: list[Pages] = field(default_factory=list)
    epoch: str = ""
    idle: bool = False


@dataclass(frozen=True)
class WorkerMetadata(KVConnectorHandshakeMetadata):
    """The namespace in which a worker's pages are."""

    space: Namespace
