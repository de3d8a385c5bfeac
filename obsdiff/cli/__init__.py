"""The command line: one file a command, imported without torch so that --help answers at once."""

import os
import signal
import sys
from typing import Any, NoReturn

import typer

from obsdiff.cli import bench, demo, eval, export, inspect, models, prune, report, run, serve, triton, tune
from obsdiff.cli.show import fail

app = typer.Typer(
    name="obsdiff",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # in "rich", a help text's [default: ...] is taken for markup and lost
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Prune, compile and run diffusers text-to-image pipelines.\n\n"
    "* obsdiff prune MODEL pruned --pattern 2:4\n"
    "* obsdiff export pruned bundle\n"
    "* obsdiff run bundle 'a red ankle boot' --out boot.png\n\n"
    "MODEL is a local diffusers folder, a hub id, or `fashion`, the small model that ships with obsdiff.",
)
for module in (demo, prune, export, inspect, tune, run, serve, bench, eval, report, triton, models):
    app.command(module.__name__.rpartition(".")[2])(module.command)


def _version(asked: bool) -> None:
    if asked:
        from obsdiff import __version__

        typer.echo(f"obsdiff {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None: ...


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs a command and exits: 0 done, 1 failed, 2 bad usage or input, 3 a gate was not met, 130 interrupted."""
    from obsdiff.errors import ObsdiffError

    signal.signal(signal.SIGTERM, _terminate)
    try:
        app(arguments, standalone_mode=True)
    except ObsdiffError as error:
        fail(str(error), error.exit_code)
    except (KeyboardInterrupt, SystemExit) as ended:
        if isinstance(ended, SystemExit) and ended.code != 130:  # typer's word for a KeyboardInterrupt
            raise
        fail("interrupted; the same command goes on where it can", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}", 1)
    except MemoryError:
        fail("out of memory", 1)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        fail(f"out of memory: {str(error).splitlines()[0]}; try a smaller --batch-size or more --packages", 1)
    sys.exit(0)


def _terminate(_signal: int, _frame: Any) -> NoReturn:
    raise KeyboardInterrupt
