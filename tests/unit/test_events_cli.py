"""`hicache-ext events` as a user calls it, over a real stream."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq
from typer.testing import CliRunner

from hicache_ext.cli.events import app
from hicache_ext.config import Config
from hicache_ext.events.model import BlockRemoved, Medium
from hicache_ext.events.publisher import Publisher, PublisherOptions
from hicache_ext.store.tiered import TieredStore
from storage_backends.base import Outcome
from tests.pages import PAGE_TOKENS, HostPool, chain, key_batch, namespace
from tests.streams import Reader, Store, wait

SPACE = namespace()


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
    code, text = call("tail", publisher.endpoint, "--replay", publisher.replay_endpoint, "--batches", "2", "--json")
    rows = [json.loads(line) for line in text.splitlines()]
    assert code == 0
    assert rows[0]["type"] == "AllBlocksCleared"
    assert {(Medium(row["medium"]), row["block_hashes"][0]) for row in rows[1:]} == {
        (medium, block) for medium, blocks in store.truth().items() for block in blocks
    }
    code, text = call("tail", publisher.endpoint, "--replay", publisher.replay_endpoint, "--batches", "2",
                      "--medium", "disk", "--type", "stored")  # fmt: skip
    assert (code, text.count("DISK")) == (0, len(store.held[Medium.DISK]))
    assert "EXTERNAL" not in text
    assert call("tail", publisher.endpoint, "--type", "moved")[0] == 2
    assert call("tail", "nowhere")[0] == 2


def test_check_passes_a_good_stream(stream: tuple[Store, Publisher]) -> None:
    store, publisher = stream
    store.change(100)
    code, text = call("check", publisher.endpoint, "--replay", publisher.replay_endpoint, "--batches", "2")
    assert (code, "no rule was broken" in text) == (0, True), text
    code, text = call("check", publisher.endpoint, "--replay", publisher.replay_endpoint, "--batches", "2", "--json")
    assert json.loads(text)["resident"] == {"0": {m.value: len(b) for m, b in store.truth().items()}}


def test_check_names_the_first_violation(stream: tuple[Store, Publisher]) -> None:
    store, publisher = stream
    done = threading.Event()

    def publish() -> None:
        while not done.wait(0.05):
            store.queue.put([BlockRemoved([424242], "DISK")])
            publisher.wake()

    thread = threading.Thread(target=publish)
    thread.start()
    code, text = call("check", publisher.endpoint, "--replay", publisher.replay_endpoint, "--seconds", "60")
    done.set()
    thread.join()
    assert code == 1
    assert "rule 3" in text
    assert "424242 is not in DISK" in text


def test_check_of_a_replay_endpoint_that_nobody_serves(
    stream: tuple[Store, Publisher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hicache_ext.events.subscriber._REPLAY_SECONDS", 0.1)
    code, text = call("check", stream[1].endpoint, "--replay", "tcp://127.0.0.1:9", "--seconds", "60")
    assert (code, "rule 10" in text) == (1, True), text


def test_check_of_a_counter_that_starts_again(tmp_path: Path) -> None:
    """As an engine that restarts does."""
    done = threading.Event()
    endpoint = f"ipc://{tmp_path}/live"

    def publish() -> None:
        with zmq.Context() as context, context.socket(zmq.PUB) as socket:
            socket.bind(endpoint)
            while not done.wait(0.05):
                for number in (7, 8, 0):
                    socket.send_multipart([b"", number.to_bytes(8, "big"), msgspec.msgpack.encode([1.0, [], 0])])

    thread = threading.Thread(target=publish)
    thread.start()
    code, text = call("check", endpoint, "--seconds", "60")
    done.set()
    thread.join()
    assert (code, "rule 9, batch" in text) == (1, True), text
    code, text = call("check", f"ipc://{tmp_path}/nobody", "--seconds", "0.2")
    assert (code, "nothing came" in text) == (0, True)


def test_publish_beside_an_engine(tmp_path: Path) -> None:
    """Another process's pages, those of before and those that come and go meanwhile; and nothing is written."""
    folder, config = tmp_path / "tier", tmp_path / "hicache.yaml"
    config.write_text(f"tiers: [{{type: local, path: {folder}, capacity: 16MiB}}]")
    engine = TieredStore.open(Config.load(config))
    first, second = chain("a", 20), chain("b", 20)
    save(engine, first)
    files = sorted(path.name for path in folder.iterdir())
    live, replay = f"ipc://{tmp_path}/live", f"ipc://{tmp_path}/replay"
    command = ["events", "publish", "--config", str(config), "--endpoint", live, "--replay", replay]
    with subprocess.Popen(
        [sys.executable, "-m", "hicache_ext.cli.main", *command], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            said = process.stderr.readline()
            assert f"{SPACE.digest.hex()}, blocks of {PAGE_TOKENS} tokens" in said, said + process.stderr.read()
            reader = Reader(live, replay)
            wait(lambda: reader.view.held() == {Medium.DISK: set(map(number, first))})
            save(engine, second)
            engine.remove(key_batch(SPACE, first[5:]))
            wait(lambda: reader.view.held() == {Medium.DISK: set(map(number, first[:5] + second))})
            reader.view.media[Medium.DISK][12345] = None
            process.send_signal(signal.SIGUSR1)
            wait(lambda: reader.view.held() == {Medium.DISK: set(map(number, first[:5] + second))})
            assert reader.cleared() == 2
            with socket.create_server(("127.0.0.1", 0)) as other:
                taken = f"tcp://127.0.0.1:{other.getsockname()[1]}"
                code, text = call("publish", "--config", str(config), "--endpoint", taken, "--replay", taken)
            assert (code, "address already in use" in text) == (2, True), text
            reader.close()
            assert sorted(path.name for path in folder.iterdir()) == files
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
    engine.close()


def number(key: bytes) -> int:
    return int.from_bytes(key[:8], "big", signed=True)


def save(store: TieredStore, keys: list[bytes]) -> None:
    hashes = np.array([number(key) for key in keys], np.int64)
    batch = replace(
        HostPool(SPACE, len(keys)).write_batch(keys),
        tokens=np.zeros((len(keys), PAGE_TOKENS), np.uint32),
        event_hashes=np.stack([hashes, np.concatenate([[0], hashes[:-1]])], 1),
    )
    assert set(store.write(batch).result(30)) == {Outcome.HIT}


LOCAL = "tiers: [{type: local, path: PATH, capacity: 16MiB}]"


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("tiers: [{type: memory}]", [], "no local tier"),
        (LOCAL, ["--endpoint", "127.0.0.1:1"], "--endpoint: Value error, an address begins"),
        ("tiers: [{type: tape}]", [], "tape"),
    ],
)
def test_publish_says_what_is_wrong(tmp_path: Path, text: str, options: list[str], said: str) -> None:
    config = tmp_path / "hicache.yaml"
    config.write_text(text.replace("PATH", str(tmp_path)))
    code, output = call("publish", "--config", str(config), *options)
    assert (code, said in output) == (2, True), output
