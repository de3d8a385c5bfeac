"""Help: every command answers without loading torch, names all of its options, and shows an example."""

import os
import re
import subprocess
import sys

import pytest
import typer

from obsdiff import __version__
from obsdiff.cli import app

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
CODE = """
import sys
from obsdiff.cli import main
try:
    main(sys.argv[1:])
finally:
    heavy = [name for name in ("torch", "diffusers", "transformers", "onnxruntime", "numpy") if name in sys.modules]
    print("loaded:", *heavy, file=sys.stderr)
"""


def ask(*arguments: str, columns: int = 160) -> str:
    """What a fresh process answers on standard output; it must not load a heavy library."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": str(columns), "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "loaded:\n"
    return done.stdout


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_lists_every_command_and_the_three_stages(flag: str) -> None:
    text = ask(flag)
    for name in COMMANDS:
        assert re.search(rf"^│ {name} +\S", text, re.MULTILINE), name
    assert text.index("obsdiff prune MODEL") < text.index("obsdiff export pruned") < text.index("obsdiff run bundle")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_its_options_and_shows_an_example(name: str) -> None:
    text = ask(name, "--help")
    words = "".join(text.replace("│", " ").split())
    assert f"Example:obsdiff{name}" in words
    for parameter in COMMANDS[name].params:
        if parameter.name != "help":
            shown = parameter.name if parameter.param_type_name == "argument" else parameter.opts[0]
            assert re.search(rf"^│ [ *]*{shown}\b", text, re.MULTILINE), shown
            assert parameter.help, f"{shown} is not explained"
            assert "".join(parameter.help.replace("`", "").split()) in words, f"{shown}: a word of its help is lost"


@pytest.mark.parametrize("columns", [40, 80])
def test_help_fits_a_narrow_terminal(columns: int) -> None:
    assert max(map(len, ask("prune", "--help", columns=columns).splitlines())) <= columns


def test_the_version_is_the_packages() -> None:
    assert ask("--version").split() == ["obsdiff", __version__]


def test_without_arguments_the_help_is_shown() -> None:
    done = subprocess.run([sys.executable, "-m", "obsdiff"], capture_output=True, text=True, check=False)
    assert "Commands" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 2)
