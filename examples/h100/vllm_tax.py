"""What a connector costs a decode step of vLLM, and where: engines side by side that take turns. About 2.5 minutes.

    python vllm_tax.py RESULTS [ROLE...]        RESULTS/vllm-tax.json, vllm-tax.txt (on standard output as well), logs

    plain       no connector                            ours        HiCacheConnector, a tier in memory
    idle        one that does nothing at all            reads       the same, which stores nothing
    offloading  vLLM's own OffloadingConnector          through     ours, and behind it files in memory, which get a
                                                                    copy of every page: saves go through the host

All are one model (Llama-3.1-8B's shape, vLLM's dummy weights) on one GPU, each in a process of its own, started side by
side. One at a time has its turn, round after round, so that whatever drifts drifts for all: prompts that no cache has,
decoded by one sequence and by sixteen, the time of each step. After the rounds comes one more turn with time stamps
around vLLM's parts and the connector's hooks, and events on the GPU before and after each step.

TURNS: rounds, 4 by default. VARIABLES: JSON of environment variables of the engines; ARGUMENTS: of their arguments, as
for vllm.sh. WORK: a folder for models. MODEL=small: a rehearsal.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
ROLES = ("plain", "idle", "reads", "ours", "through", "offloading")
TURNS = int(os.environ.get("TURNS", "4"))
REHEARSAL = os.environ.get("MODEL", "large") == "small"
TOKENS = 33 if REHEARSAL else 129
#: Sequences, and the tokens of the prompt of each.
SHAPES = {1: 64, 16: 40} if REHEARSAL else {1: 1024, 16: 256}
START_SECONDS, TURN_SECONDS = 150.0, 60.0


# ---- one engine


class Engine:
    def __init__(self, role: str, work: Path) -> None:
        import vllm_engine as shared

        os.environ.update(json.loads(os.environ.get("VARIABLES", "{}")))
        if not REHEARSAL:  # six of them fit
            given = json.loads(os.environ.get("ARGUMENTS", "{}"))
            os.environ["ARGUMENTS"] = json.dumps({"max_model_len": 4096, "kv_cache_memory_bytes": 3 << 30, **given})
        memory = {**shared.MEMORY, "capacity": os.environ.get("HOST", "8GiB")}
        below = {**shared.shm(f"tax-{role}", "8GiB"), "promote": "never"}
        idle = {"kv_connector": "IdleConnector", "kv_connector_module_path": "vllm_idle", "kv_role": "kv_both"}
        transfer = {
            "plain": None, "idle": idle, "reads": {**shared.ours([memory]), "kv_role": "kv_consumer"},
            "ours": shared.ours([memory]), "through": shared.ours([memory, below]), "offloading": shared.OFFLOADING,
        }[role]  # fmt: skip
        self.saves = role in ("ours", "through")
        self.shared, self.role = shared, role
        name = "ours" if self.saves or role == "reads" else role
        self.engine = shared.Engine(work / os.environ.get("MODEL", "large"), name, transfer, not REHEARSAL)
        for tokens in (300, 1000, 64):
            self.steps(1, f"warm {tokens}", tokens, 20)
        self.steps(16, "warm", 64, 20)

    def steps(self, sequences: int, name: str, length: int, tokens: int = TOKENS) -> list[float]:
        """Milliseconds of each step after the one with the first token."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        engine = self.engine.engine
        for i in range(sequences):
            ids = self.shared.prompt(f"{self.role} {name} {i}", length, 32000 if REHEARSAL else 128256)
            engine.add_request(f"{name} {i}", {"prompt_token_ids": ids}, sampling)
        at = []
        while engine.has_unfinished_requests():
            if engine.step():
                at.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in pairwise(at)]

    def turn(self, number: int) -> dict[str, Any]:
        found = {}
        for sequences, length in SHAPES.items():
            self.settle()
            before = self.engine.counts()
            found[str(sequences)] = [round(one, 4) for one in self.steps(sequences, f"turn {number}", length)]
            self.settle()
            found[f"{sequences} counted"] = {
                name: counted
                for name, count in self.engine.counts().items()
                if (counted := count - before.get(name, 0))
            }
        return found

    def settle(self) -> None:
        """Until nothing is on its way of what came before."""
        if self.saves:
            self.engine.settle()
        else:
            time.sleep(0.3)

    def profile(self) -> dict[str, Any]:
        found = {}
        for sequences, length in SHAPES.items():
            self.settle()
            probe = Probe(self.engine)
            before, since = _threads(), time.thread_time()
            steps = self.steps(sequences, "profile", length)
            main, after = time.thread_time() - since, _threads()
            found[str(sequences)] = {
                "step_us": round(1e3 * statistics.mean(steps)), **probe.result(),
                "main_thread_us": round(1e6 * main / len(steps)),
                "threads_us": {
                    name: us for name in after if (us := round((after[name] - before.get(name, 0)) / len(steps))) > 2
                },
            }  # fmt: skip
            probe.remove()
        return found


class Probe:
    """Time stamps around parts of a step, and events on the GPU where its work begins and ends."""

    HOOKS = (
        "start_load_kv", "wait_for_save", "handle_preemptions", "get_finished", "get_transfer_results",
        "get_block_ids_with_load_errors", "get_kv_connector_stats", "build_connector_worker_meta", "take_events",
        "build_connector_meta", "update_connector_output", "request_finished_all_groups",
    )  # fmt: skip

    def __init__(self, engine: Any) -> None:
        import torch

        self.torch = torch
        self.cuda = torch.cuda.is_available()
        self.spent: dict[str, list[float]] = {}
        self.undo: list[Callable[[], None]] = []
        self.events: list[tuple[Any, Any]] = []
        self.began: Any = None
        scheduler = engine.core.scheduler
        runner = engine.core.model_executor.driver_worker.worker.model_runner
        theirs = ("schedule", "update_from_output", "_build_kv_connector_meta", "_update_from_kv_xfer_finished")
        around = getattr(runner, "kv_connector", None)
        for thing, names in ((scheduler, theirs), (around, ("pre_forward", "post_forward"))):
            for name in names:
                if hasattr(thing, name):
                    self.around(thing, name, f"vLLM {name}")
        self.around(runner, "execute_model", "vLLM execute_model", self.begin)
        self.around(runner, "sample_tokens", "vLLM sample_tokens", None, self.end)
        connectors = [scheduler.connector]
        if scheduler.connector is not None:
            connectors.append(engine.connector)
        for connector in connectors:
            for name in self.HOOKS:
                if hasattr(connector, name):
                    self.around(connector, name, f"hook {name}")

    def around(self, thing: Any, name: str, label: str, before: Any = None, after: Any = None) -> None:
        real = getattr(thing, name)
        spent = self.spent.setdefault(label, [])

        def timed(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before()
            since = time.perf_counter()
            try:
                result = real(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - since)
            if after is not None:
                after()
            if hasattr(result, "get_output"):  # where the engine waits for the GPU
                self.around(result, "get_output", "vLLM get_output (waits for the GPU)")
            return result

        try:
            setattr(thing, name, timed)
        except AttributeError:
            return
        self.undo.append(lambda: delattr(thing, name) if name in vars(thing) else None)

    def begin(self) -> None:
        if self.cuda:
            self.began = self.torch.cuda.Event(enable_timing=True)
            self.began.record()

    def end(self) -> None:
        if self.cuda and self.began is not None:
            ended = self.torch.cuda.Event(enable_timing=True)
            ended.record()
            self.events.append((self.began, ended))
            self.began = None

    def result(self) -> dict[str, Any]:
        count = max(1, len(self.spent["vLLM sample_tokens"]))
        parts = {
            label: {
                "us_a_step": round(1e6 * sum(spent) / count, 1), "median_us": round(1e6 * statistics.median(spent), 1),
                "most_us": round(1e6 * max(spent), 1), "calls": len(spent),
            }
            for label, spent in self.spent.items() if spent
        }  # fmt: skip
        hooks = sum(one["us_a_step"] for label, one in parts.items() if label.startswith("hook"))
        found: dict[str, Any] = {"hooks_us": round(hooks, 1), "parts": parts}
        if self.events:
            self.torch.cuda.synchronize()
            busy = [begun.elapsed_time(ended) for begun, ended in self.events][1:]
            gaps = [a[1].elapsed_time(b[0]) for a, b in pairwise(self.events[1:])]
            found["gpu_ms"] = {
                "step": round(statistics.mean(busy), 4), "step_median": round(statistics.median(busy), 4),
                "gap": round(statistics.mean(gaps), 4), "gap_median": round(statistics.median(gaps), 4),
                "gaps_over_0.2": [round(gap, 2) for gap in gaps if gap > 0.2][:40],
            }  # fmt: skip
        return found

    def remove(self) -> None:
        for undo in self.undo:
            undo()


def _threads() -> dict[str, float]:
    """Microseconds of processor time so far, by the thread's name."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    found: dict[str, float] = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            name = names.get(int(task.name)) or (task / "comm").read_text().strip()
            spent = int((task / "schedstat").read_text().split()[0]) / 1e3
        except OSError:
            continue
        found[name] = found.get(name, 0) + spent
    return found


def serve(role: str, work: Path, answers: int) -> None:
    """Turns as standard input asks for them; an answer each, a line of JSON."""

    def answer(given: Any) -> None:
        os.write(answers, json.dumps(given).encode() + b"\n")

    try:
        since = time.monotonic()
        engine = Engine(role, work)
        answer({"started_s": round(time.monotonic() - since, 1)})
        for line in sys.stdin:
            asked = line.strip()
            answer(engine.profile() if asked == "profile" else engine.turn(int(asked)))
    except BaseException:
        traceback.print_exc()
        answer({"error": traceback.format_exc()[-1500:]})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# ---- all of them


class Child:
    def __init__(self, role: str, work: Path, results: Path) -> None:
        self.role, self.buffer = role, b""
        self.answers, theirs = os.pipe()
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", role, str(work), str(theirs)]
        self.log = results / f"tax-{role}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[theirs],
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])},
            )  # fmt: skip
        os.close(theirs)

    def ask(self, what: str, seconds: float) -> Any:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{what}\n".encode())
            self.process.stdin.flush()
        except OSError:
            return {"error": "has ended"}
        return self.hear(seconds)

    def hear(self, seconds: float) -> Any:
        until = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([self.answers], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                self.process.kill()
                return {"error": f"no answer within {seconds:.0f} s"}
            part = os.read(self.answers, 1 << 16)
            if not part:
                return {"error": "has ended"}
            self.buffer += part
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)


def main() -> None:
    results, roles = Path(sys.argv[1]).resolve(), sys.argv[2:] or list(ROLES)
    work = Path(os.environ.get("WORK", "/tmp/bench-vllm"))
    results.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    if not (work / "large").exists():
        subprocess.run([sys.executable, str(HERE / "vllm_engine.py"), "models", str(work)], check=True, timeout=90)
    for tier in Path(os.environ.get("FAST", "/dev/shm"), "hicache-vllm").glob("tax-*"):
        shutil.rmtree(tier)  # of an earlier run, whose prompts are the same
    children = [Child(role, work, results) for role in roles]
    found: dict[str, dict[str, Any]] = {role: {"turns": []} for role in roles}

    def say(what: str) -> None:
        print(f"[{time.monotonic() - begun:.0f} s] {what}", flush=True)

    def failed(child: Child, told: Any) -> bool:
        if "error" in told:
            found[child.role]["error"] = told["error"]
            say(f"{child.role}: NOT: {told['error'].strip().splitlines()[-1]}")
            alive.remove(child)
        return "error" in told

    alive = list(children)
    for child in children:
        if not failed(child, told := child.hear(max(5.0, START_SECONDS - (time.monotonic() - begun)))):
            found[child.role] |= told
            say(f"{child.role} is up")
    for number in range(TURNS):
        # Forth and back, so that nobody is always the first after somebody else.
        for child in list(alive if number % 2 == 0 else reversed(alive)):
            if not failed(child, told := child.ask(str(number), TURN_SECONDS)):
                found[child.role]["turns"].append(told)
        say(f"turn {number + 1} of {TURNS}")
    for child in list(alive):
        if not failed(child, told := child.ask("profile", TURN_SECONDS)):
            found[child.role]["profile"] = told
    (results / "vllm-tax.json").write_text(json.dumps(found))
    text = "\n".join(report(found))
    (results / "vllm-tax.txt").write_text(text + "\n")
    print(text, flush=True)
    for child in children:
        child.process.kill()
        child.process.wait()


def report(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for sequences in map(str, SHAPES):
        lines.append(
            f"== {sequences} sequences: milliseconds a token (mean of a turn's steps; of the turns the median)"
        )
        turns = {role: [turn[sequences] for turn in one["turns"]] for role, one in found.items() if one["turns"]}
        means = {role: [statistics.mean(steps) for steps in every] for role, every in turns.items()}
        middles = {role: [statistics.median(steps) for steps in every] for role, every in turns.items()}
        for role, every in means.items():
            mean, middle = statistics.median(every), statistics.median(middles[role])
            line = f"{role:10s} {mean:7.3f} [{min(every):.3f} ... {max(every):.3f}]  median step {middle:7.3f}"
            if role != "plain" and "plain" in means:
                # Each turn against the plain one of its round.
                tax = [100 * (a / b - 1) for a, b in zip(every, means["plain"], strict=False)]
                step = [100 * (a / b - 1) for a, b in zip(middles[role], middles["plain"], strict=False)]
                line += f"  tax {statistics.median(tax):+6.2f} % [{min(tax):+.2f} ... {max(tax):+.2f}]"
                line += f"  of the median step {statistics.median(step):+6.2f} %"
            lines.append(line)
            quarters = [
                statistics.median(statistics.mean(steps[at : at + (TOKENS - 1) // 4]) for steps in turns[role])
                for at in range(0, TOKENS - 1, (TOKENS - 1) // 4)
            ]  # fmt: skip
            lines.append(f"{'':10s} by quarters of the output: {', '.join(f'{one:.3f}' for one in quarters)}")
            if counted := found[role]["turns"][-1].get(f"{sequences} counted"):
                lines.append(f"{'':10s} counted in the last turn: {counted}")
        for role, one in found.items():
            if profile := one.get("profile", {}).get(sequences):
                lines.append(
                    f"{role:10s} with stamps: step {profile['step_us']} us, main thread {profile['main_thread_us']}, "
                    f"hooks {profile['hooks_us']}, GPU ms {profile.get('gpu_ms')}"
                )
                parts = profile["parts"]
                told = ", ".join(
                    f"{name} {part['us_a_step']} (most {part['most_us']:.0f})" for name, part in parts.items()
                )
                lines.append(f"{'':10s} us a step: {told}")
                lines.append(f"{'':10s} threads, us of processor a step: {profile['threads_us']}")
    return lines


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
