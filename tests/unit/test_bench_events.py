"""`hicache-ext bench events-scheduler` measures what the scheduler runs, and everything that it stores is moved."""

from __future__ import annotations

import pytest

from hicache_ext.bench import events_scheduler


def test_rows_name_what_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_scheduler, "_engines_own", lambda *_: [1.0])  # SGLang takes long to import
    rows = events_scheduler.run(1500, page=16)
    found = {row["what"]: row for row in rows}
    assert {"move, blocks stored", "move, blocks removed", "a call with nothing to move"} <= found.keys()
    for row in rows:
        assert 0 < row["spread"][0] <= row["value"] <= row["spread"][1]
        assert row["unit"].startswith("us/")


def test_what_is_stored_is_moved_and_removed_again() -> None:
    scheduler = events_scheduler._Scheduler(16)
    _, moved, events = scheduler.turns(scheduler.store, 0, 700)
    assert moved == 700
    assert 700 // 128 <= events <= 700
    _, moved, _ = scheduler.turns(scheduler.remove, 0, 700)
    assert moved == 700
    assert scheduler._events.announcer.stats()["pages"] == 0
