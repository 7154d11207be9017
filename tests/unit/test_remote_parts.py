"""What backends of remote stores are made of: back-off, presence, where secrets come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from hicache_ext.config import Config, ConfigError
from storage_backends.backoff import Backoff
from storage_backends.base import OptionError
from storage_backends.presence import Presence
from storage_backends.secrets import load_seal, load_secret
from tests.pages import chain, key_batch, namespace

KEYS = chain("a", 4)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        monkeypatch.setattr("random.uniform", lambda low, high: high)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_server_that_is_away_is_tried_later_each_time_and_by_one(clock: Clock) -> None:
    backoff = Backoff(first=1, longest=4)
    assert backoff.allow()
    assert backoff.bad("refused"), "the first failure"
    for wait in (1, 2, 4, 4):
        clock.now += wait - 0.01
        assert not backoff.allow()
        clock.now += 0.02
        assert backoff.allow()
        assert not backoff.allow(), "one caller tries"
        assert not backoff.bad("refused")
    assert backoff.good()
    assert not backoff.good()
    assert backoff.allow()
    assert backoff.reason == ""


def test_what_was_seen_is_remembered_for_a_while(clock: Clock) -> None:
    space, other = namespace(), namespace(model="model-b")
    presence = Presence(pages=3, seconds=60)
    presence.seen(space.digest, KEYS)
    assert presence.lookup(key_batch(space, KEYS)).tolist() == [0, 1, 1, 1], "the oldest makes room"
    assert not presence.lookup(key_batch(other, KEYS)).any()
    presence.gone(space.digest, KEYS[1:2])
    assert presence.lookup(key_batch(space, KEYS)).tolist() == [0, 0, 1, 1]
    clock.now += 61
    assert not presence.lookup(key_batch(space, KEYS)).any()
    presence.seen(space.digest, KEYS[:1])
    presence.forget(space.digest)
    assert len(presence) == 0


def test_a_secret_comes_from_a_variable_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IT", "hunter2")
    (tmp_path / "it").write_text("hunter3\n")
    found = load_secret("password", "IT", None)
    assert found is not None
    assert found.get_secret_value() == "hunter2"
    assert "hunter2" not in f"{found} {found!r}"
    found = load_secret("password", "", tmp_path / "it")
    assert found is not None
    assert found.get_secret_value() == "hunter3"
    assert load_secret("password", "", None) is None


@pytest.mark.parametrize(
    ("env", "file", "says"),
    [
        ("NOT_THERE", "", "password_env = 'NOT_THERE': is not set"),
        ("IT", "it", "is given too"),
        ("", "nowhere", "password_file.*cannot be read"),
        ("", "empty", "is empty"),
        ("", "binary", "is not text"),
    ],
)
def test_a_secret_that_is_not_there_is_a_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: str, file: str, says: str
) -> None:
    monkeypatch.setenv("IT", "hunter2")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00hunter2")
    with pytest.raises(OptionError, match=says) as caught:
        load_secret("password", env, tmp_path / file if file else None)
    assert "hunter2" not in str(caught.value)


def test_a_sealing_key_that_is_none_is_a_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IT", "hunter2")
    with pytest.raises(OptionError, match="openssl rand -hex 32") as caught:
        load_seal("IT", None)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("redis", {"url": "http://host"}, r"url = .*no address.*redis://"),
        ("redis", {"url": "redis://host:99999"}, r"url = .*Fix"),
        ("redis", {"sentinels": ["a:1"]}, r"service = .*give both"),
        ("redis", {"sentinels": ["a"], "service": "x"}, r"sentinels = 'a'.*host:port"),
        ("redis", {"sentinels": ["a:1"], "service": "x", "cluster": True}, r"cluster = True.*remove one"),
        ("redis", {"tls_ca": "/nowhere.pem"}, r"tls_ca = .*rediss://"),
        ("redis", {"url": "rediss://host", "tls_ca": "/nowhere.pem"}, r"tls_ca = .*is not a file"),
        ("redis", {"password_env": "NOT_THERE"}, r"password_env = 'NOT_THERE'"),
        ("redis", {"prefix": "a*b"}, r"prefix = 'a\*b'"),
        ("redis", {"connections": 0}, r"connections = 0"),
        ("s3", {}, r"bucket: missing"),
        ("s3", {"bucket": "b", "endpoint": "http://host"}, r"endpoint = .*allow_http"),
        ("s3", {"bucket": "b", "endpoint": "host:9000"}, r"endpoint = .*no address"),
        ("s3", {"bucket": "b", "access_key_env": "IT"}, r"access_key_env = .*give both"),
        ("s3", {"bucket": "b", "multipart_size": "1MiB"}, r"multipart_size = .*5 MiB"),
        ("s3", {"bucket": "b", "seal_key_file": "/nowhere"}, r"seal_key_file = .*cannot be read"),
        ("mooncake", {"master": "http://host:1"}, r"master = .*host:port"),
        ("mooncake", {"master": "host"}, r"master = .*host:port"),
        ("mooncake", {"metadata": "host:8080"}, r"metadata = .*P2PHANDSHAKE"),
        ("mooncake", {"devices": "mlx5_0"}, r"devices = .*protocol: rdma"),
        ("mooncake", {"protocol": "udp"}, r"protocol = 'udp'"),
        ("mooncake", {"segment": "1MiB"}, r"segment = .*16MiB"),
        ("mooncake", {"buffer": "1MiB", "connections": 4}, r"buffer = .*4MiB or more"),
        ("mooncake", {"log": "/nowhere/at/all"}, r"log = .*does not exist"),
    ],
)
def test_options_that_cannot_work_name_key_and_fix(
    monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, object], says: str
) -> None:
    pytest.importorskip({"redis": "redis", "s3": "obstore", "mooncake": "mooncake"}[kind])
    monkeypatch.setenv("IT", "hunter2")
    with pytest.raises(ConfigError, match=rf"tiers\[0\]\.{says}") as caught:
        Config.load({"tiers": [{"type": f"storage_backends.{kind}:{kind.capitalize()}Backend", **options}]})
    assert "Fix: " in str(caught.value)
    assert "hunter2" not in str(caught.value)
