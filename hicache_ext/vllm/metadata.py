"""What the scheduler's half tells the worker's half at each step, and once at start the other way round.

Belongs here: the messages. vLLM carries them between its processes in its own way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from hicache_ext.page import Namespace
from hicache_ext.vllm.pages import Pages
from storage_backends.base import Notes, Residency


@dataclass
class StepMetadata(KVConnectorMetadata):
    """leaving: saves as well, of requests that are over, so that their blocks may be anybody's from the next step on.
    epoch: the cache's, which a reset changes. idle: nothing is computed in this step. fresh: blocks that
    requests were given for this step, of any group: its forward writes into them."""

    loads: Sequence[Pages] = ()
    saves: Sequence[Pages] = ()
    leaving: Sequence[Pages] = ()
    epoch: str = ""
    idle: bool = False
    fresh: Sequence[int] = ()


@dataclass(frozen=True)
class WorkerMetadata(KVConnectorHandshakeMetadata):
    """The namespaces in which a worker's pages are, by group."""

    spaces: tuple[Namespace, ...]


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """What a worker saw become of pages in tiers that the scheduler's process cannot know of: servers.

    changes: (number of the tier, change, namespace digest, packed keys, what is known of the pages).
    """

    changes: list[tuple[int, Residency, bytes, bytes, Notes | None]]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, WorkerReport)
        return WorkerReport(self.changes + other.changes)
