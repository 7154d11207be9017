"""What the phases `fill` and `read` hand each other while an operator restarts the engine: one JSON file.

Belongs here: that file. Does not belong here: what the phases do (hicache_ext.bench.serve).

Prompts are not in it: they are drawn again from the seed, and a digest of each group's tells if the draw came out
the same.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hicache_ext.bench.serve_matrix import Draw, Group

_VERSION = 1


class StateError(ValueError):
    """The state file cannot be used; the message names it."""


@dataclass(frozen=True)
class State:
    """subject: the name in the rows. expected: output ids after a device hit, by group. rows: those of the fill."""

    subject: str
    draw: Draw
    new_tokens: int
    expected: dict[Group, list[list[int]]]
    rows: list[dict[str, Any]]

    def save(self, path: Path) -> None:
        groups = [
            {**asdict(group), "digest": group.digest(self.draw), "expected": expected}
            for group, expected in self.expected.items()
        ]
        values = {
            "version": _VERSION,
            "subject": self.subject,
            "seed": self.draw.seed,
            "vocabulary": self.draw.vocabulary,
            "new_tokens": self.new_tokens,
            "groups": groups,
            "rows": self.rows,
        }
        path.write_text(json.dumps(values) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> State:
        """Raises StateError."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["version"] != _VERSION:
                raise StateError(f"{path}: of version {values['version']}, not {_VERSION}. Fix: fill again")
            draw = Draw(int(values["seed"]), int(values["vocabulary"]))
            expected = {}
            for each in values["groups"]:
                group = Group(int(each["prompt_tokens"]), int(each["concurrency"]), int(each["requests"]))
                if group.digest(draw) != each["digest"]:
                    raise StateError(f"{path}: other prompts are drawn here. Fix: fill and read with one numpy")
                expected[group] = each["expected"]
            return cls(values["subject"], draw, int(values["new_tokens"]), expected, values["rows"])
        except OSError as error:
            raise StateError(
                f"{path}: {error.strerror or error}. Fix: run --phase fill with this --state first"
            ) from error
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise StateError(f"{path}: is no state of `bench serve`: {error!r}. Fix: fill again") from error
