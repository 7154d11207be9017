"""The adapter's parts that need no SGLang: versions, fingerprints, the state of weights, notes of tokens, seeds."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hicache_ext import fingerprint
from hicache_ext.config import Config, ConfigError
from hicache_ext.sglang import identity, seeds, versions, weights
from hicache_ext.sglang.stats import AdapterStats
from hicache_ext.sglang.tokens import BATCH_PAGES, TokenNotes
from hicache_ext.store import inject

MEMORY = {"tiers": [{"type": "tests.dictionary:DictionaryBackend", "name": "memory"}]}


def safetensors(path: Path, names: list[str], fill: int = 0) -> None:
    header = {name: {"dtype": "U8", "shape": [8], "data_offsets": [8 * i, 8 * i + 8]} for i, name in enumerate(names)}
    packed = json.dumps({"__metadata__": {}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + bytes([fill]) * 8 * len(names))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "_name_or_path": "x", "rope": {"theta": 1}}))
    safetensors(folder / "model.safetensors", ["a", "b"])
    return folder


# --- versions


@pytest.mark.parametrize("version", ["0.5.17", "0.5.19", "0.5.21.post1", "0.5.23+cpu", "v0.5.20"])
def test_supported(version: str) -> None:
    versions.check(version)


@pytest.mark.parametrize("version", ["0.5.16", "0.5.24", "0.6.0", "1.0.0", "", "main", "0.5"])
def test_unsupported_says_the_range(version: str) -> None:
    with pytest.raises(versions.UnsupportedVersion, match=r"0\.5\.17 to 0\.5\.23"):
        versions.check(version)


# --- fingerprints and identity


def test_config_ignores_where_it_lies(model: Path) -> None:
    before = fingerprint.digest(fingerprint.model_config(model))
    (model / "config.json").write_text(json.dumps({"rope": {"theta": 1}, "hidden_size": 8, "_name_or_path": "y"}))
    assert fingerprint.digest(fingerprint.model_config(model)) == before
    (model / "config.json").write_text(json.dumps({"rope": {"theta": 2}, "hidden_size": 8}))
    assert fingerprint.digest(fingerprint.model_config(model)) != before


def test_weights_change_with_every_write(model: Path) -> None:
    file = model / "model.safetensors"
    status = file.stat()
    before = fingerprint.weights([file])
    assert fingerprint.weights([file]) == before
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert fingerprint.weights([file]) != before
    # Another model's weights with the same name, size and time.
    safetensors(file, ["a", "b"], fill=1)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint.weights([file]) != before


def test_snapshot_folder_is_its_commit(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / ("ab" * 20)
    assert fingerprint.snapshot_commit(folder) == "ab" * 20
    assert fingerprint.snapshot_commit(tmp_path / "snapshots" / "main") == ""
    assert fingerprint.snapshot_commit(tmp_path / ("ab" * 20)) == ""


def test_tensor_names(model: Path, tmp_path: Path) -> None:
    assert fingerprint.tensor_names(model) == {"a", "b"}
    (model / "extra.bin").write_bytes(b"x")
    assert fingerprint.tensor_names(model) is None
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "m.safetensors").write_bytes(b"\xff" * 9)
    assert fingerprint.tensor_names(tmp_path / "bad") is None


def test_revision_wins_over_the_files(model: Path) -> None:
    args = SimpleNamespace(model_path=str(model))
    found = identity.identify(Config.load({**MEMORY, "model": {"revision": "r"}}), args)
    assert found.weights == "revision:r"
    assert found.model == identity.identify(Config.load(MEMORY), args).model


def test_configured_path_is_used_without_an_engine(model: Path) -> None:
    found = identity.identify(Config.load({**MEMORY, "model": {"path": str(model)}}), None)
    assert found.weights.startswith("files:")


def test_unknown_model_names_the_keys() -> None:
    with pytest.raises(ConfigError, match=r"model\.path.*model\.revision"):
        identity.identify(Config.load(MEMORY), SimpleNamespace(model_path="no/such"))


def test_no_weight_files_names_the_key(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.revision"):
        identity.identify(Config.load(MEMORY), SimpleNamespace(model_path=str(model)))


def test_defaults_spelled_out_are_defaults(model: Path) -> None:
    plain = SimpleNamespace(model_path=str(model))
    spelled = SimpleNamespace(
        model_path=str(model), dtype="auto", quantization=None, context_length=None, json_model_override_args="{}"
    )
    assert identity.identify(Config.load(MEMORY), plain).model == identity.identify(Config.load(MEMORY), spelled).model


def test_adapter_is_its_content(tmp_path: Path) -> None:
    def make(name: str, fill: int) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        safetensors(folder / "adapter_model.safetensors", ["a"], fill)
        return folder

    one, same, other = make("one", 1), make("same", 1), make("other", 2)
    assert fingerprint.adapter(one) == fingerprint.adapter(same) != fingerprint.adapter(other)
    with pytest.raises(FileNotFoundError):
        fingerprint.adapter(tmp_path)
    # Nothing to read: an identity that nobody else has.
    assert fingerprint.adapter_content(str(tmp_path)) != fingerprint.adapter_content(str(tmp_path))


# --- the state of weights


def test_an_update_freezes_until_the_flush() -> None:
    state = weights.WeightState()
    assert not state.frozen
    assert state.override is None
    state.begin("disk")
    assert state.frozen
    state.flushed()  # a flush while it runs proves nothing
    assert state.frozen
    state.end("files:x")
    assert state.frozen
    assert state.override == "files:x"
    state.flushed()
    assert not state.frozen
    assert state.override == "files:x"


def test_every_update_has_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(weights.RUN_VARIABLE, "run")
    names = set()
    state, rank = weights.WeightState(), weights.WeightState()
    for _ in range(3):
        for each in (state, rank):
            each.begin("tensor")
            each.end()
        assert state.override == rank.override, "ranks of one server must agree"
        names.add(state.override)
    assert len(names) == 3
    # Another server, launched by the same process.
    weights.new_run()
    other = weights.WeightState()
    other.begin("tensor")
    assert other.override not in names
    monkeypatch.delenv(weights.RUN_VARIABLE)
    alone = weights.WeightState()
    alone.begin("tensor")
    assert alone.override not in {*names, other.override}


def test_a_session_outlasts_flushes() -> None:
    state = weights.WeightState()
    state.open_session()
    state.flushed()
    assert state.frozen
    before = state.override
    state.close_session()
    assert state.frozen
    assert state.override != before
    state.flushed()
    assert not state.frozen


def test_nested_updates() -> None:
    state = weights.WeightState()
    state.begin("target")
    state.begin("draft")
    state.end()
    state.flushed()
    assert state.frozen
    state.end()
    state.flushed()
    assert not state.frozen


def test_adapters_hear_of_it_and_are_not_kept_alive() -> None:
    class Adapter:
        def __init__(self) -> None:
            self.heard: list[str] = []

        def weights_changing(self, kind: str) -> None:
            self.heard.append(kind)

    state, adapter = weights.WeightState(), Adapter()
    state.listen(adapter)
    state.begin("disk")
    assert adapter.heard == ["disk"]
    del adapter
    assert not list(state._listeners)


@pytest.mark.parametrize(
    ("had", "has", "whole"), [(["a"], ["a"], True), (["a"], ["a", "b"], True), (["a", "b"], ["a"], False)]
)
def test_only_a_whole_model_replaces_the_old_one(tmp_path: Path, had: list[str], has: list[str], whole: bool) -> None:
    for name, tensors in (("old", had), ("new", has)):
        (tmp_path / name).mkdir()
        safetensors(tmp_path / name / "m.safetensors", tensors)
    found = weights.loaded_from_disk(tmp_path / "old", tmp_path / "new", "auto")
    assert (found is not None) is whole
    assert weights.loaded_from_disk(None, tmp_path / "new", "auto") is None
    assert weights.loaded_from_disk(tmp_path / "old", tmp_path / "new", "dummy") is None


# --- tokens


def test_tokens_are_taken_once_per_batch() -> None:
    notes = TokenNotes()
    hashes = [f"{i:064x}" for i in range(BATCH_PAGES + 3)]
    tokens = list(range(4 * len(hashes)))
    notes.note(hashes, tokens, 4)
    assert len(notes) == 2
    first = notes.take(hashes[0])
    assert first is not None
    assert first.pages(2, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    second = notes.take(hashes[BATCH_PAGES])
    assert second is not None
    assert second.pages(3, 4).tolist()[0][0] == 4 * BATCH_PAGES
    assert notes.take(hashes[0]) is None


def test_tokens_are_bounded() -> None:
    notes = TokenNotes(limit=5)
    for i in range(9):
        notes.note([str(i)], [0], 1)
    assert len(notes) == 5
    assert notes.take("0") is None
    assert notes.take("8") is not None


@pytest.mark.parametrize("tokens", [[1, 2, 3], [-1, 2, 3, 4], [1 << 32, 2, 3, 4], [(1, 2)] * 4])
def test_tokens_that_are_not_plain_ids_are_left_out(tokens: list[int]) -> None:
    notes = TokenNotes()
    notes.note(["h"], tokens, 4)
    noted = notes.take("h")
    assert noted is not None
    assert noted.pages(1, 4) is None


def test_notes_know_what_comes_before_each_batch() -> None:
    notes = TokenNotes()
    hashes = [f"h{i}" for i in range(BATCH_PAGES + 2)]
    notes.note(hashes, list(range(BATCH_PAGES + 2)), 1, ["p0", "p1"], (None, "salt"))
    first, second = notes.take("h0"), notes.take(hashes[BATCH_PAGES])
    assert first is not None
    assert second is not None
    assert first.ancestors == ["p0", "p1"]
    assert second.ancestors == ["p0", "p1", *hashes[:BATCH_PAGES]]
    assert first.space == second.space == (None, "salt")
    notes.note(["x"], [1], 1)
    unknown = notes.take("x")
    assert unknown is not None
    assert unknown.ancestors == []
    assert unknown.space is None


# --- seeds


def test_seeds_tell_salts_apart() -> None:
    seen = {seeds.seed(key) for key in ("a", "b", "ab", "a" * 32, "b" * 64)}
    assert len(seen) == 5
    assert all(len(bytes.fromhex(one or "")) == 32 for one in seen)
    assert seeds.seed(None) is None
    assert seeds.seed("") is None


def test_seeds_know_adapters_by_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "_contents", {"1" * 32: "content", "2" * 32: "content", "3" * 32: "other"})
    assert seeds.seed("1" * 32) == seeds.seed("2" * 32) != seeds.seed("3" * 32)
    assert seeds.seed("salt" + "1" * 32) not in (seeds.seed("1" * 32), seeds.seed("salt"), seeds.seed("saltcontent"))


def test_hash_hook_seeds_only_the_beginning() -> None:
    calls = []

    def original(tokens: object, prior: str | None, page: int | None) -> str:
        calls.append(prior)
        return "hash"

    key = SimpleNamespace(extra_key="salt")
    seeds.around_hash(original, key, None, 16)
    seeds.around_hash(original, key, "", 16)
    seeds.around_hash(original, key, "ab" * 32, 16)
    seeds.around_hash(original, [1, 2], "", None)
    assert calls == [seeds.seed("salt"), seeds.seed("salt"), "ab" * 32, ""]


# --- numbers and faults


def test_said_once_counted_always(caplog: pytest.LogCaptureFixture) -> None:
    stats = AdapterStats(per_batch=False)
    for _ in range(3):
        stats.once("kind", 30, "something %s", "happened")
    assert stats.snapshot()["kind"] == 3
    assert len(caplog.records) == 1
    stats.batch("prefetch", 2, 100, 0.0)
    assert stats.snapshot()["prefetch_pages"] == 2
    assert not stats._batches["prefetch"], "SGLang will not collect them"


def test_no_faults_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(inject.VARIABLE, raising=False)
    store = object()
    assert inject.wrap(store) is store  # type: ignore[arg-type]
    monkeypatch.setenv(inject.VARIABLE, '{"failure": 1.0}')
    wrapped = inject.wrap(store)  # type: ignore[arg-type]
    assert isinstance(wrapped, inject.FaultyStore)
    batch = SimpleNamespace(__len__=lambda: 1)
    assert wrapped._fails("read")
    assert wrapped.injected == {"read_delayed": 0, "read_failed": 1}
    assert batch is not None
    assert np.all(wrapped.lookup([1, 2]) == 255)  # type: ignore[arg-type]
