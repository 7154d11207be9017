"""What a command needs of an environment that is not ours: found out before it begins, said in one line.

Belongs here: whether modules import. Does not belong here: what is done with them.
"""

from __future__ import annotations

import importlib

import typer
from rich.console import Console


def require(console: Console, what: str, modules: tuple[str, ...], fix: str) -> None:
    """Import these, or end the command. A broken installation raises anything: a torchvision that was built for another
    torch a RuntimeError, a missing library an OSError."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            text = str(error).strip().splitlines()
            said = f"{type(error).__name__}: {text[0] if text else 'no more is said'}"
            console.print(f"{what}, and {module} does not import: {said}. Fix: {fix}", markup=False, soft_wrap=True)
            raise typer.Exit(2) from None
