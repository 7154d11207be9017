"""Starting and stopping a server process, with a small HTTP server in SGLang's place."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest

from hicache_ext.cli.serving import Server, ServerFailed, free_port

# Answers /health, /metrics and a streamed /generate; argv: port, whether output_ids are cumulative.
FAKE = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
port, cumulative = int(sys.argv[1]), sys.argv[2] == "1"
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *a): pass
    def body(self, text):
        self.send_response(200); self.send_header("Content-Length", str(len(text))); self.end_headers()
        self.wfile.write(text)
    def do_GET(self):
        self.body(b'sglang:backuped_tokens_total{a="1"} 16.0\\nsglang:backuped_tokens_total{a="2"} 4\\nother 1\\n')
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200); self.send_header("Transfer-Encoding", "chunked"); self.end_headers()
        tokens = [7, 8, 9]
        for i in range(3):
            time.sleep(0.05)
            ids = tokens[: i + 1] if cumulative else tokens[i : i + 1]
            details = {"device": 1, "host": 2, "storage": 3}
            meta = {"completion_tokens": i + 1, "prompt_tokens": 5, "cached_tokens_details": details}
            line = b"data: " + json.dumps({"output_ids": ids, "meta_info": meta}).encode() + b"\\n\\n"
            self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(line), line))
        line = b"data: [DONE]\\n\\n"
        self.wfile.write(b"%x\\r\\n%s\\r\\n0\\r\\n\\r\\n" % (len(line), line))
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_free_port_is_none_that_the_kernel_gives_to_a_connection_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found = {free_port() for _ in range(20)}
    assert len(found) > 1
    assert all(1024 < port < lowest for port in found)
    with socket.create_server(("127.0.0.1", found.pop())) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr("random.randrange", lambda *_: port)
        assert free_port() != port, "one that is taken is passed over"


@pytest.mark.parametrize("cumulative", ["0", "1"])
def test_a_request_is_timed_and_read(tmp_path: Path, cumulative: str) -> None:
    port = free_port()
    with Server([sys.executable, "-c", FAKE, str(port), cumulative], tmp_path / "log", port) as server:
        server.wait_until_up(20)
        answer = server.generate([1, 2, 3, 4, 5], 3)
        assert answer.tokens == [7, 8, 9]
        assert (answer.prompt_tokens, answer.device, answer.host, answer.storage) == (5, 1, 2, 3)
        assert 0.04 < answer.first_token_s < answer.total_s
        assert server.metric("sglang:backuped_tokens_total") == 20
        assert server.metric("absent") == 0


def test_a_server_that_dies_is_told_with_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('no such model'); sys.exit(3)"]
    with (
        Server(command, tmp_path / "server.log", free_port()) as server,
        pytest.raises(ServerFailed, match=r"(?s)ended with code 3.*server\.log.*no such model"),
    ):
        server.wait_until_up(20)


def test_a_server_that_never_comes_up_is_told(tmp_path: Path) -> None:
    with (
        Server([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", free_port()) as server,
        pytest.raises(ServerFailed, match="not up after 1 s"),
    ):
        server.wait_until_up(1)


def test_stopping_reaches_the_children(tmp_path: Path) -> None:
    # A launcher that ends at SIGTERM and leaves a child which ignores it, as a busy scheduler might.
    script = """
        import subprocess, sys, time
        stubborn = (
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
            "print('ready', flush=True); time.sleep(60)"
        )
        child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
        child.stdout.readline()
        print(child.pid, flush=True)
        time.sleep(60)
    """
    server = Server([sys.executable, "-c", textwrap.dedent(script)], tmp_path / "log", 1)
    with server:
        end = time.monotonic() + 20
        while not (text := (tmp_path / "log").read_text().strip()) and time.monotonic() < end:
            time.sleep(0.05)
        child = int(text)
        assert alive(child)
        server.stop(patience_s=5, grace_s=0.5)
    assert not alive(child)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_the_command_stops_the_server(tmp_path: Path, number: int) -> None:
    """The whole command, with a stand-in for SGLang that says its process id and never comes up."""
    package = tmp_path / "fake" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    pid_file = tmp_path / "pid"
    (package / "launch_server.py").write_text(
        f"import os, time\nopen({str(pid_file)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n", encoding="utf-8"
    )
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    command = [sys.executable, "-m", "hicache_ext.cli.main", "demo", "--backend", "file", "--dir", str(tmp_path / "d")]
    process = subprocess.Popen(
        [*command, "--json", str(tmp_path / "demo.json")],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "fake")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell starts what runs in its background with SIGINT ignored, and the tests may be part of that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        end = time.monotonic() + 40
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        server = int(pid_file.read_text())
        assert alive(server)
        process.send_signal(number)
        output = process.communicate(timeout=40)[0]
    finally:
        process.kill()
    assert not alive(server), output
    assert process.returncode in (130, 128 + number), output
    assert not (tmp_path / "demo.json").exists()
