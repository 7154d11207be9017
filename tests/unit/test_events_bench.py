"""`hicache-ext bench events` measures: what it says adds up. Not how fast anything is."""

from __future__ import annotations

from hicache_ext.bench import events


def test_a_round() -> None:
    subject = events.Ours()
    found = events.measure(subject, steps=30, each=4)
    assert found.events_per_s > 0
    assert found.cpu_s_per_million > 0
    assert len(found.delays_ms) == 30
    assert all(delay > 0 for delay in found.delays_ms)
