"""Sizes on the command line: "64KiB", "2GiB".

Belongs here: reading them, and saying what is wrong with one. Does not belong here: what they mean to a command.
"""

from __future__ import annotations

from collections.abc import Sequence

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError


def size_of(text: str, option: str, step: int = 1) -> int:
    """Bytes, a multiple of `step`. BadParameter, with the option's name, for anything else."""
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise typer.BadParameter(f"{text!r} is no size such as 256KiB", param_hint=option) from error
    if size < step or size % step:
        raise typer.BadParameter(f"{text!r} is not a multiple of {step >> 10} KiB", param_hint=option)
    return size


def page_sizes(texts: Sequence[str] | None, step: int) -> tuple[int, ...]:
    """Of `--page`."""
    return tuple(size_of(text, "--page", step) for text in texts or ())
