"""Admission and eviction as options of the local tier: what they refuse, and how it is counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from storage_backends.base import Dispatcher, Outcome
from storage_backends.local import LocalBackend
from tests.pages import HostPool, chain, namespace

MIB = 1 << 20
LENGTHS = (128 << 10,)
FIRST = 40  # more chains of four pages than 16 MiB hold


@pytest.fixture
def dispatcher() -> Iterator[Dispatcher]:
    found = Dispatcher()
    yield found
    found.close()


def opened(path: Path, dispatcher: Dispatcher, **options: object) -> LocalBackend:
    parsed = LocalBackend.Options.model_validate({"path": path, "capacity": 16 * MIB, **options})
    return LocalBackend(parsed, dispatcher)  # type: ignore[arg-type]


def store(backend: LocalBackend, name: str) -> list[Outcome]:
    pool = HostPool(namespace(LENGTHS), 4)
    return backend.write(pool.write_batch(chain(name, 4))).result(30)


@pytest.mark.parametrize("index", ["python", "native"])
@pytest.mark.parametrize("eviction", ["lru", "s3fifo", "credit"])
def test_always_lets_everything_in(
    tmp_path: Path, dispatcher: Dispatcher, eviction: str, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HICACHE_EXT_INDEX", index)
    if index == "native":
        pytest.importorskip("storage_backends.local.index_native", exc_type=ImportError)
    backend = opened(tmp_path, dispatcher, eviction=eviction)
    assert all(store(backend, f"chain {n}") == [Outcome.HIT] * 4 for n in range(FIRST))
    stats = backend.stats()
    assert int(stats["evicted"]) > 0
    assert stats["index"] == index
    assert stats["pages"] == int(stats["stored"]) - int(stats["evicted"])
    backend.close()


def test_second_hit_fills_an_empty_disk_and_then_wants_a_second_offer(tmp_path: Path, dispatcher: Dispatcher) -> None:
    backend = opened(tmp_path, dispatcher, admission="second_hit")
    outcomes = [store(backend, f"chain {n}") for n in range(FIRST)]
    assert outcomes[0] == [Outcome.HIT] * 4
    assert outcomes[-1] == [Outcome.REJECTED] * 4
    refused = sum(chain.count(Outcome.REJECTED) for chain in outcomes)
    assert backend.stats()["rejected_second_hit"] == refused
    assert "evicted" not in backend.stats(), "nothing goes for a page that does not come in"
    assert store(backend, f"chain {FIRST - 1}") == [Outcome.HIT] * 4
    assert int(backend.stats()["evicted"]) > 0
    backend.close()


def test_a_write_budget_runs_out(tmp_path: Path, dispatcher: Dispatcher) -> None:
    slot = (128 << 10) + 4096
    backend = opened(tmp_path, dispatcher, admission="write_budget", write_bytes_per_day=24 * 6 * slot)
    outcomes = [store(backend, f"chain {n}") for n in range(FIRST)]
    assert backend.stats()["evicted"] == 6, "an hour's bytes, and no more"
    refused = sum(chain.count(Outcome.REJECTED) for chain in outcomes)
    assert backend.stats()["rejected_write_budget"] == refused
    backend.close()


@pytest.mark.parametrize("options", [{"admission": "write_budget"}, {"write_bytes_per_day": "1GiB"}])
def test_a_budget_needs_its_size(options: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="give both or neither"):
        LocalBackend.Options.model_validate({"path": "/tmp", "capacity": 16 * MIB, **options})
