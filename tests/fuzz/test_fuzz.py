"""The short run, with every test: the whole corpus, and mutations of it that are the same each time."""

from __future__ import annotations

from itertools import islice

import pytest

from tests.fuzz.mutate import corpus, mutations
from tests.fuzz.seeds import config, headers, log
from tests.fuzz.targets import TARGETS, TOKENS

#: Together a few seconds: YAML is slow to parse.
INPUTS = {"headers": 12_000, "log": 7_000, "config": 1_000}


@pytest.mark.parametrize(("target", "name"), [(target, name) for target in TARGETS for name in corpus(target)])
def test_corpus(target: str, name: str) -> None:
    TARGETS[target](corpus(target)[name])


@pytest.mark.parametrize("target", TARGETS)
def test_mutations(target: str) -> None:
    for i, data in enumerate(islice(mutations(target, TOKENS[target]), INPUTS[target])):
        try:
            TARGETS[target](data)
        except BaseException:
            print(f"broken by input {i}: python -m tests.fuzz.run {target} --blind --inputs {i + 1} keeps it")
            raise


def test_the_corpus_is_what_the_seeds_write() -> None:
    """The corpus follows the format: a change of either shows here (python -m tests.fuzz.seeds)."""
    for target, made in {"headers": headers(), "log": log(), "config": config()}.items():
        there = corpus(target)
        assert {name: there.get(f"seed-{name}") for name in made} == made
