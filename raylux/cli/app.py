"""The application: its help, its global options, and the arguments that several commands share.

Everything heavy is imported inside the commands, so that ``raylux --help`` answers at once.
"""

from __future__ import annotations

import os
from inspect import cleandoc
from typing import Annotated

import typer

from raylux.cli.codes import EXIT_CODES


def manual(text: str) -> str:
    """A command's help: its text, then the exit codes."""
    return f"{cleandoc(text)}\n\n{EXIT_CODES}"


app = typer.Typer(
    name="raylux",
    help=manual("""Which training sequences made this language model say that?

    \b
    A first run:
      raylux models configs/quickstart.yaml      what is tracked, how a query is split into tokens
      raylux run configs/quickstart.yaml         fit, prefilter, query, score, report
      raylux top RUN --query ID -k 10            the most influential sequences
    """),
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, as in configs/")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="section.key=value", help="change keys of the config, as in prefilter.top=500"),
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="run folder: local path or fsspec URL")]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"raylux {version('raylux')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="RAYLUX_DEBUG", help="print the traceback of an internal error")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    if debug:
        os.environ["RAYLUX_DEBUG"] = "1"
