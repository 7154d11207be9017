"""`bench serve` against an engine that fails: each failure is a line and a count, never a trace.

The engine is a small HTTP server that answers as SGLang does, remembers prompts in a "device" that a flush empties and
in a "storage" that it does not, and misbehaves on command: nothing real can be made to fail on time.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hicache_ext.bench.serve_client import Client
from hicache_ext.bench.serve_engines import SGLang
from hicache_ext.cli.main import app
from hicache_ext.cli.serving import free_port


class Fake(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.Lock()
        self.device: set[str] = set()
        self.storage: set[str] = set()
        self.stored = 0
        self.asked = self.under_way = self.most_under_way = 0
        #: number of the request -> what goes wrong with it
        self.fault: dict[int, str] = {}
        self.liar = False  # gives other tokens for what comes from storage


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Fake

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, text: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        if self.path == "/metrics":
            return self.answer(f'sglang:backuped_tokens_total{{tp="0"}} {self.server.stored}\n')
        if self.path != "/server_info":
            return self.answer("no", 404)
        facts = {"version": "0", "page_size": 16, "max_total_num_tokens": 4096, "max_req_input_len": 4000}
        return self.answer(json.dumps({**facts, "enable_hierarchical_cache": False, "hicache_storage_backend": "file"}))

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/flush_cache":
            self.server.device.clear()
            return self.answer("flushed")
        with self.server.lock:
            number, self.server.asked = self.server.asked, self.server.asked + 1
            self.server.under_way += 1
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
        try:
            self.generate(json.loads(asked), self.server.fault.get(number, ""))
        finally:
            with self.server.lock:
                self.server.under_way -= 1

    def generate(self, asked: dict[str, Any], fault: str) -> None:
        if fault == "status":
            return self.answer("out of\nmemory", 500)
        if fault == "silence":
            time.sleep(3)
        prompt, count = asked["input_ids"], asked["sampling_params"]["max_new_tokens"]
        name, whole = json.dumps(prompt), (len(prompt) - 1) // 16 * 16
        cached = {"device": 0, "host": 0, "storage": 0}
        with self.server.lock:
            if name in self.server.device:
                cached["device"] = whole
            elif name in self.server.storage:
                cached["storage"] = whole
            else:
                self.server.stored += (len(prompt) + count - 1) // 16 * 16
            self.server.device.add(name)
            self.server.storage.add(name)
        time.sleep(0.02)
        lie = self.server.liar and cached["storage"]
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for done in range(1, count + 1):
            tokens = [sum(prompt) % 100 + i + bool(lie) for i in range(done)]
            meta = {"completion_tokens": done, "prompt_tokens": len(prompt), "cached_tokens_details": cached}
            line = b"data: " + json.dumps({"output_ids": tokens, "meta_info": meta}).encode() + b"\n\n"
            if fault == "cut":
                self.wfile.write(b"ffff\r\n" + line[:20])
                self.close_connection = True
                return None
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        line = b"data: [DONE]\n\n"
        self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(line), line))
        return None


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "serve", *arguments])


def run(fake: Fake, result: Path, *arguments: str) -> tuple[Result, list[dict[str, Any]]]:
    done = bench("--url", fake.url, "--length", "100", "--requests", "3", "--json", str(result), *arguments)
    return done, json.loads(result.read_text())["rows"] if result.exists() else []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--url", f"http://127.0.0.1:{free_port()}"], "connection refused"),
        (["--url", "nonsense"], "is no URL"),
        (["--subject", "theirs"], "is no subject"),
        (["--subject", "ours", "--launch", "--port 1 --model-path x"], "chosen for each subject"),
        (["--url", "http://127.0.0.1:1", "--phase", "read", "--state", "/nowhere"], "run --phase fill"),
        (["--url", "http://127.0.0.1:1", "--trace", "/nowhere"], "/nowhere"),
    ],
)
def test_a_users_mistake_is_one_line(arguments: list[str], said: str) -> None:
    done = bench(*arguments)
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert said in done.output
    assert len(done.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["--url", "http://h:1", "--launch", "x"], ["--url", "http://h:1", "--phase", "fill"], ["--speed", "2"]],
)
def test_options_that_do_not_go_together(arguments: list[str]) -> None:
    assert bench(*arguments).exit_code == 2


def test_rows_tiers_and_outputs(fake: Fake, tmp_path: Path) -> None:
    done, rows = run(fake, tmp_path / "r.json", "--concurrency", "1", "--concurrency", "3")
    assert done.exit_code == 0, done.output
    assert [(row["tier"], row["concurrency"]) for row in rows] == [
        (tier, concurrency) for concurrency in (1, 3) for tier in ("none", "device", "local")
    ]
    assert all(row["reached"] and row["identical"] and row["requests"] == 3 for row in rows)
    assert {row["subject"] for row in rows} == {"stock-file"}
    assert "host left out: the engine has no such tier" in done.output
    assert "stock-file, local, 3 at a time: loses to recompute" in done.output
    assert fake.most_under_way == 3


def test_another_output_from_storage_is_told_and_fails(fake: Fake, tmp_path: Path) -> None:
    fake.liar = True
    done, rows = run(fake, tmp_path / "r.json")
    assert done.exit_code == 1
    assert {row["tier"]: row["identical"] for row in rows} == {"none": True, "device": True, "local": False}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("status", "status 500: out of memory"),
        ("cut", "IncompleteRead"),
        ("silence", "no answer in time"),
    ],
)
def test_a_failed_request_is_counted_and_the_rest_goes_on(fake: Fake, tmp_path: Path, fault: str, said: str) -> None:
    fake.fault = {4: fault}  # 0 to 3 warm up; this is the first one measured
    done, rows = run(fake, tmp_path / "r.json", "--tier", "none", "--tier", "device", "--timeout", "1")
    assert done.exit_code == 0, done.output
    none, device = rows
    assert (none["requests"], none["errors"]) == (2, 1)
    assert said in none["error"]
    assert (device["requests"], device["errors"]) == (3, 0)


def test_phases_with_a_restart_between(fake: Fake, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    phases = ("--state", str(state), "--phase")
    done, rows = run(fake, tmp_path / "a.json", *phases, "fill")
    assert done.exit_code == 0, done.output
    assert [row["tier"] for row in rows] == ["none", "device"]
    fake.device.clear()
    done, rows = run(fake, tmp_path / "b.json", *phases, "read")
    assert done.exit_code == 0, done.output
    assert [(row["tier"], row["reached"], row["identical"]) for row in rows] == [
        (tier, True, True) for tier in ("none", "device", "local")
    ]
    fake.storage.clear()
    fake.device.clear()
    done, rows = run(fake, tmp_path / "c.json", *phases, "read")
    assert [row["reached"] for row in rows] == [True, True, False], "storage lost everything, and the row says so"


def test_a_trace_is_replayed_at_its_times_or_in_a_closed_loop(fake: Fake, tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    requests = [{"timestamp": 200 * i, "input_length": 1024, "hash_ids": [i, 9]} for i in range(4)]
    trace.write_text("\n".join(map(json.dumps, requests)))
    arguments = ("--trace", str(trace), "--block-tokens", "64", "--requests", "4")
    for pace in (("--speed", "2"), ("--concurrency", "4")):
        fake.most_under_way = 0
        done, rows = run(fake, tmp_path / "r.json", *arguments, *pace)
        assert done.exit_code == 0, done.output
        assert [(row["pass"], row["tier"], row["requests"]) for row in rows] == [
            ("first", "none", 4),
            ("replay", "local", 4),
        ]
        assert rows[1]["identical"] is True
        passes = json.loads((tmp_path / "r.json").read_text())["subjects"]["stock-file"]["passes"]
        if pace[0] == "--speed":
            assert passes[0]["seconds"] >= 0.3, "the last of four requests, 200 ms apart, at twice the speed"
            assert rows[0]["concurrency"] == 0
        else:
            assert fake.most_under_way > 1


def test_an_engine_that_goes_away_ends_the_run_with_a_line(fake: Fake, tmp_path: Path) -> None:
    engine = SGLang(Client(fake.url))
    assert engine.facts().page_tokens == 16
    fake.fault = dict.fromkeys(range(100), "status")
    done, _ = run(fake, tmp_path / "r.json")
    assert done.exit_code == 1
    assert "status 500" in done.output.strip().splitlines()[-1]


def test_what_was_measured_is_written_while_the_run_goes_on(fake: Fake, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    seen: list[int] = []
    fake.fault = dict.fromkeys(range(7, 9), "silence")  # the second length, whose first begins after the warm-up's four

    def watch() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until and fake.asked < 8:
            time.sleep(0.05)
        seen.append(len(json.loads(result.read_text())["rows"]) if result.exists() else 0)

    thread = threading.Thread(target=watch)
    thread.start()
    done, rows = run(fake, result, "--length", "200", "--requests", "1")
    thread.join()
    assert done.exit_code == 0, done.output
    assert len(rows) == 6
    assert seen == [3], "the first length's rows"


def test_a_run_that_is_stopped_shows_what_it_had(fake: Fake, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    fake.fault = dict.fromkeys(range(7, 99), "silence")
    command = [sys.executable, "-m", "hicache_ext.cli.main", "bench", "serve", "--url", fake.url, "--json", str(result)]
    process = subprocess.Popen(
        [*command, "--length", "100", "--length", "200", "--requests", "1"], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while fake.asked < 8 and time.monotonic() < until:
        time.sleep(0.05)
    process.terminate()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped; servers that were started are down" in said
    assert said.count("stock-file") >= 3, said
    assert len(json.loads(result.read_text())["rows"]) == 3
