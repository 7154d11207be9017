"""The long run: `python -m tests.fuzz.run [TARGET...] [--inputs N]`, or `make fuzz`.

With atheris inputs are guided by coverage; where it cannot be installed, they are mutated blindly. An input that
breaks something is kept in build/fuzz, and the command that repeats it is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType

from tests.fuzz.mutate import CORPUS, mutations

KEPT = Path("build/fuzz")
_WHOLE_RUN = 1_000_000
_SAY_SECONDS = 10.0
_LONGEST = 1 << 14


def blind(target: str, inputs: int, seed: int) -> int:
    """Mutations without coverage; the exit code."""
    from tests.fuzz.targets import TARGETS, TOKENS

    start = said = time.monotonic()
    for i, data in enumerate(mutations(target, TOKENS[target], seed)):
        if i == inputs:
            break
        try:
            TARGETS[target](data)
        except BaseException:
            name = KEPT / f"{target}-{hashlib.sha256(data).hexdigest()[:16]}"
            name.write_bytes(data)
            print(f"{target}: broken by input {i}, kept. Repeat: python -m tests.fuzz.run {target} --repeat {name}")
            raise
        if time.monotonic() - said > _SAY_SECONDS:
            said = time.monotonic()
            print(f"{target}: {i + 1} inputs, {(i + 1) / (said - start):.0f} a second", flush=True)
    print(f"{target}: {inputs} inputs in {time.monotonic() - start:.0f} s without a finding (blind)")
    return 0


def guided(target: str, inputs: int, seed: int) -> int:
    """libFuzzer through atheris, on a copy of the corpus; does not return."""
    import atheris

    sys.meta_path.insert(0, _PlainLoaders())
    with atheris.instrument_imports(include=["hicache_ext", "storage_backends"]):
        from tests.fuzz.targets import TARGETS, TOKENS

    grown = KEPT / f"corpus-{target}"
    grown.mkdir(exist_ok=True)
    words = KEPT / f"{target}.dict"
    escaped = ("".join(f"\\x{byte:02x}" for byte in token) for token in TOKENS[target])
    words.write_text("".join(f'"{token}"\n' for token in escaped))
    arguments = [
        sys.argv[0], f"-runs={inputs}", f"-seed={seed}", f"-max_len={_LONGEST}", f"-dict={words}", "-timeout=20",
        f"-artifact_prefix={KEPT}/{target}-", "-print_final_stats=1", "-verbosity=1", str(grown), str(CORPUS / target),
    ]  # fmt: skip
    atheris.Setup(arguments, TARGETS[target])
    atheris.Fuzz()
    return 0


class _PlainLoaders(MetaPathFinder):
    """Gives Python's own loader for source files that others import with theirs, as editable installs do: atheris
    instruments nothing that comes from another, and only says so.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.origin is not None and spec.origin.endswith(".py"):
                    spec.loader = SourceFileLoader(fullname, spec.origin)
                return spec
        return None


def main() -> int:
    names = ["headers", "log", "config"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--inputs", type=int, default=_WHOLE_RUN, help="for each target (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--blind", action="store_true", help="without coverage, also where atheris is installed")
    parser.add_argument("--repeat", type=Path, metavar="FILE", help="one input instead")
    chosen = parser.parse_args()
    if unknown := set(chosen.targets) - set(names):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    KEPT.mkdir(parents=True, exist_ok=True)
    if chosen.repeat:
        from tests.fuzz.targets import TARGETS

        TARGETS[chosen.targets[0]](chosen.repeat.read_bytes())
        return 0
    if len(chosen.targets) == 1:
        how = blind if chosen.blind or not _has_atheris() else guided
        return how(chosen.targets[0], chosen.inputs, chosen.seed)
    # libFuzzer ends its process: one for each target, and the first that breaks ends the run.
    options = [f"--inputs={chosen.inputs}", f"--seed={chosen.seed}", *(["--blind"] if chosen.blind else [])]
    for name in chosen.targets or names:
        done = subprocess.run([sys.executable, "-m", "tests.fuzz.run", name, *options])
        if done.returncode:
            return done.returncode
    return 0


def _has_atheris() -> bool:
    from importlib.util import find_spec

    return find_spec("atheris") is not None


if __name__ == "__main__":
    sys.exit(main())
