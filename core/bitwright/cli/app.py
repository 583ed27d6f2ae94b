"""Puts the commands together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

import bitwright
from bitwright.cli import collect, doctor, encodings, listings, new, quantize, reports, verify
from bitwright.errors import PluginError
from bitwright.plugins import default_registry

app = typer.Typer(
    name="bitwright",
    help="Simulate, improve and export quantized neural networks.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
) -> None:
    """Simulate, improve and export quantized neural networks."""
    if version:
        typer.echo(bitwright.__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command("quantize")(quantize.quantize)
app.command("collect")(collect.collect)
app.command("verify")(verify.verify)
app.command("diff")(reports.diff)
app.command("report")(reports.report)
app.add_typer(encodings.app, name="encodings")
app.command("targets")(listings.targets)
app.command("techniques")(listings.techniques)
app.command("plugins")(listings.plugins)
app.command("doctor")(doctor.doctor)
app.command("new")(new.new)


def add_commands_of_tools(word: str | None = None) -> None:
    """Add the commands that tools bring.

    Args:
        word: the command that is asked for: no other one is imported; None for all of them, for help and documentation.

    Raises:
        PluginError: the command that is asked for can't be imported, or two plugins bring it.
    """
    registry = default_registry()
    there = {command.name for command in app.registered_commands}
    for name, info in registry.commands().items():
        if name in there or word not in (None, name):
            continue
        try:
            app.command(name)(registry.command(name))
        except PluginError as error:
            if word is not None:
                raise
            app.command(name, help=f"{info.summary} (can't be used, see `bitwright plugins`)")(_broken(str(error)))
    if word is not None and word not in there and (reason := registry.lost_command(word)):
        raise PluginError(reason)


def _broken(reason: str) -> Callable[[], None]:
    def command() -> None:
        raise PluginError(reason)

    return command
