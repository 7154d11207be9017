"""`hicache-ext events` as a user calls it, over a real stream."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from typer.testing import CliRunner

from hicache_ext.cli.events import app
from hicache_ext.events.model import BlockRemoved, Medium
from hicache_ext.events.publisher import Publisher, PublisherOptions
from tests.streams import Store


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[tuple[Store, Publisher]]:
    store = Store()
    publisher = Publisher(
        PublisherOptions(endpoint=f"ipc://{tmp_path}/live", replay_endpoint=f"ipc://{tmp_path}/replay"), store.queue
    )
    store.wake = publisher.wake
    yield store, publisher
    publisher.close()


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def test_tail(stream: tuple[Store, Publisher]) -> None:
    store, publisher = stream
    store.change(50)
    code, text = call("tail", publisher.endpoint, "--replay", publisher.replay_endpoint, "--seconds", "0.5", "--json")
    rows = [json.loads(line) for line in text.splitlines()]
    assert code == 0
    assert rows[0]["type"] == "AllBlocksCleared"
    assert {(Medium(row["medium"]), row["block_hashes"][0]) for row in rows[1:]} == {
        (medium, block) for medium, blocks in store.truth().items() for block in blocks
    }
    code, text = call("tail", publisher.endpoint, "--replay", publisher.replay_endpoint, "--seconds", "0.5",
                      "--medium", "disk", "--type", "stored")  # fmt: skip
    assert (code, text.count("DISK")) == (0, len(store.held[Medium.DISK]))
    assert "EXTERNAL" not in text
    assert call("tail", publisher.endpoint, "--type", "moved")[0] == 2
    assert call("tail", "nowhere")[0] == 2


def test_check_passes_a_good_stream(stream: tuple[Store, Publisher]) -> None:
    store, publisher = stream
    store.change(100)
    code, text = call("check", publisher.endpoint, "--replay", publisher.replay_endpoint, "--seconds", "0.5")
    assert (code, "no rule was broken" in text) == (0, True), text
    code, text = call("check", publisher.endpoint, "--replay", publisher.replay_endpoint, "--seconds", "0.5", "--json")
    assert json.loads(text)["resident"] == {"0": {m.value: len(b) for m, b in store.truth().items()}}


def test_check_names_the_first_violation(stream: tuple[Store, Publisher]) -> None:
    store, publisher = stream
    store.queue.put([BlockRemoved([424242], "DISK")])
    threading.Timer(0.3, lambda: (store.queue.put([BlockRemoved([424242], "DISK")]), publisher.wake())).start()
    code, text = call("check", publisher.endpoint, "--replay", publisher.replay_endpoint, "--seconds", "5")
    assert code == 1
    assert "rule 3" in text
    assert "424242 is not in DISK" in text


def test_check_of_a_replay_endpoint_that_nobody_serves(
    stream: tuple[Store, Publisher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hicache_ext.events.subscriber._REPLAY_SECONDS", 0.1)
    code, text = call("check", stream[1].endpoint, "--replay", "tcp://127.0.0.1:9", "--seconds", "5")
    assert (code, "rule 10" in text) == (1, True), text


def test_check_of_a_counter_that_starts_again(tmp_path: Path) -> None:
    """As an engine that restarts does."""
    endpoint = f"ipc://{tmp_path}/live"

    def publish() -> None:
        with zmq.Context() as context, context.socket(zmq.PUB) as socket:
            socket.bind(endpoint)
            time.sleep(0.3)
            for number in (7, 8, 0):
                socket.send_multipart([b"", number.to_bytes(8, "big"), msgspec.msgpack.encode([1.0, [], 0])])
            time.sleep(0.3)

    thread = threading.Thread(target=publish)
    thread.start()
    code, text = call("check", endpoint, "--seconds", "3")
    thread.join()
    assert (code, "rule 9, batch 0" in text) == (1, True), text
    code, text = call("check", f"ipc://{tmp_path}/nobody", "--seconds", "0.2")
    assert (code, "nothing came" in text) == (0, True)
