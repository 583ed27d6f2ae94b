"""Puts the commands together."""

from __future__ import annotations

from typing import Annotated

import typer

import bitwright
from bitwright.cli import console, doctor, encodings, listings, quantize, verify
from bitwright.plugins import default_registry, import_dotted

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
app.command("verify")(verify.verify)
app.add_typer(encodings.app, name="encodings")
app.command("targets")(listings.targets)
app.command("techniques")(listings.techniques)
app.command("plugins")(listings.plugins)
app.command("doctor")(doctor.doctor)


def _add_tools() -> None:
    """The commands that tools bring; one that can't be imported is named and left out."""
    for info in default_registry().tools().values():
        if info.command:
            try:
                app.command(info.command_name or info.name.replace("_", "-"))(import_dotted(info.command))
            except Exception as error:
                console.complain(f"warning: tool {info.name!r} has no command: {type(error).__name__}: {error}")


_add_tools()
