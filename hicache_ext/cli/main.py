"""The `hicache-ext` command: finds its subcommands and hands over.

What belongs here: the table of subcommands, `--version`, and how errors end a command. What a command
does belongs in its own module, which is imported only when the command is called: `hicache-ext --version`
must not pay for torch.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import typer
from typer.main import get_command

import hicache_ext

# name -> (module with an `app`, help). A command whose module is not part of this install is not listed.
COMMANDS = {
    "demo": ("hicache_ext.cli.demo", "Run the real SGLang server, restart it, and show what the local tier gave back."),
    "bench": ("hicache_ext.cli.bench", "Measure storage tiers."),
    "doctor": ("hicache_ext.cli.doctor", "Check this machine and a configuration, and say how to fix what is wrong."),
    "events": ("hicache_ext.cli.events", "KV events: look at a stream, check it, publish one."),
    "config": ("hicache_ext.cli.config", "Explain a configuration file, and ask its tiers whether they answer."),
    "inspect": ("hicache_ext.cli.inspect", "Show what the directory of a local tier holds."),
    "verify": ("hicache_ext.cli.verify", "Check every page in the directory of a local tier against its checksums."),
}


class _Lazy(typer.core.TyperGroup):
    """A group that knows its commands' names and imports one when it is used."""

    def list_commands(self, ctx):  # type: ignore[no-untyped-def]  # click's types differ between versions
        return [name for name, (module, _) in COMMANDS.items() if find_spec(module) is not None]

    def get_command(self, ctx, cmd_name):  # type: ignore[no-untyped-def]
        if cmd_name not in self.list_commands(ctx):
            return None
        module, text = COMMANDS[cmd_name]
        command = get_command(importlib.import_module(module).app)
        command.name = cmd_name
        command.help = command.help or text
        return command


app = typer.Typer(
    cls=_Lazy, no_args_is_help=True, add_completion=False, help="Storage tiers for SGLang's hierarchical KV cache."
)


def native_parts() -> dict[str, str]:
    """Each part that a build can leave out -> what this install has in its place."""
    parts = {}
    try:
        from hicache_ext import _native

        info = _native.native_info()
        parts["checksums"] = f"native, CRC32C by {info['crc32c']} ({info['compiler']})"
        engine = "in" if info["io_engine"] else "left out: built without liburing 2.3 or newer and its headers"
        parts["native I/O engine"] = engine
    except ImportError:
        parts["checksums"] = "left out: built without a C++ compiler; the crc32c wheel is used"
        parts["native I/O engine"] = "left out: built without a C++ compiler"
    try:
        from hicache_ext import _cuda

        kernels = "in" if _cuda.kernels_built else "in, copy engines only: built without nvcc"
        parts["CUDA block copies"] = kernels
    except ImportError:
        parts["CUDA block copies"] = "left out: built without a C++ compiler"
    try:
        parts["liburing engine"] = f"in, liburing {version('liburing')} from PyPI"
    except PackageNotFoundError:
        parts["liburing engine"] = "left out: pip install 'hicache-ext[liburing]'"
    return parts


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    typer.echo(f"hicache-ext {hicache_ext.__version__}")
    for part, state in native_parts().items():
        typer.echo(f"  {part}: {state}")
    raise typer.Exit


@app.callback()
def _options(
    show_version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Version, and which native parts are in."
    ),
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
