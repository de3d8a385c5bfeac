"""What mkdocs makes from the code: the reference of the commands, and tables in place of `<!-- table: ... -->`."""

import importlib
import inspect
import json
import re
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel

from obsdiff.cli import app

COMMANDS = "reference/commands.md"
MARKER = re.compile(r"<!-- table: (\S+) -->")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page of the commands, which is written nowhere."""
    files.append(File.generated(config, COMMANDS, content=commands_page()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the table that a marker asks for in its place: `families`, or the fields of a class as `module:Class`."""
    return MARKER.sub(lambda match: families() if match[1] == "families" else fields(match[1]), markdown)


def commands_page() -> str:
    """Every command with its arguments, options, defaults and help, as typer has them."""
    group: Any = typer.main.get_command(app)
    codes = inspect.getdoc(importlib.import_module("obsdiff.cli").main).partition(": ")[2]  # type: ignore[union-attr]
    parts = [f"# Commands\n\nExit codes: {codes} `obsdiff COMMAND --help` says the same as this page."]
    for name, command in group.commands.items():
        context = command.context_class(command, info_name=f"obsdiff {name}")
        usage = re.sub(r"\b[a-z]+\b(?=[\]}])", lambda m: m[0].upper(), command.get_usage(context)).removeprefix(
            "Usage: "
        )
        rows = [record(parameter, context) for parameter in command.params if parameter.name != "help"]
        help_text = re.sub(r"^Example: (.*)$", r"```sh\n\1\n```", command.help, flags=re.MULTILINE)
        parts += [
            f"## obsdiff {name}",
            f"```text\n{' '.join(usage.replace('{', '').replace('}', '').split())}\n```",
            help_text,
            table(("", "what it does", "default"), rows),
        ]
    return "\n\n".join(parts) + "\n"


def record(parameter: Any, context: Any) -> tuple[str, str, str]:
    """An argument or option as a row: its name and what it takes, what it does, its default or `required`."""
    shown, _ = parameter.get_help_record(context)
    option = parameter.param_type_name == "option"
    name = ", ".join(parameter.opts) if option else parameter.name.upper()
    takes = "" if getattr(parameter, "is_flag", False) or not option else shown.partition(" ")[2]
    takes = re.sub(r"list\[(\w+)\]", r"\1", takes.replace(" range", "").replace("<", "").replace(">", ""))
    low, high = parameter.min, parameter.max
    bounds = "" if low is None else f" from {low:g}" if high is None else f" {low:g} to {high:g}"
    text, default = parameter.help, ""
    if found := re.search(r"\s*\[default: ([^]]*)\]\s*$", text):  # said in words, where no value says it
        text, default = text[: found.start()], found[1]
    elif parameter.required:
        default = "required"
    elif parameter.default not in (None, ()) and parameter.default is not False:
        default = f"`{parameter.default}`"
    return f"`{name}`" + (f" {takes.lower()}{bounds}" if takes else ""), text, default


def families() -> str:
    """The table of `obsdiff models`."""
    from obsdiff.cli.models import COLUMNS, cells, rows

    heads = ("denoiser", "family, pipelines", "patterns", "verified")
    found = (dict(zip(COLUMNS, cells(row), strict=True)) for row in rows())
    return table(
        heads, [(f"`{r['denoiser']}`", f"{r['family']}: {r['pipelines']}", r["patterns"], r["verified"]) for r in found]
    )


def fields(place: str) -> str:
    """The fields of a pydantic model: name, type, default, under what its docstring says (not with `:fields`)."""
    module, name, *alone = place.split(":")
    model: type[BaseModel] = getattr(importlib.import_module(module), name)
    rows = [
        (
            f"`{key}`",
            code(say(field.annotation)),
            "" if field.is_required() else code(json.dumps(field.get_default(), default=repr)),
        )
        for key, field in model.model_fields.items()
    ]
    told = "" if alone or model.__doc__ is None else f"{inspect.cleandoc(model.__doc__)}\n\n"
    return told + table(("field", "type", "default"), rows)


def say(annotation: Any) -> str:
    """A type as a reader of JSON knows it, without where it is defined."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(map(say, typing.get_args(annotation)))
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(map(json.dumps, typing.get_args(annotation)))
    if typing.get_origin(annotation) is typing.Annotated:
        return say(typing.get_args(annotation)[0])
    if origin := typing.get_origin(annotation):
        inner = ", ".join("..." if part is ... else say(part) for part in typing.get_args(annotation))
        return f"{origin.__name__}[{inner}]"
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar or a line break within a cell does not end it."""
    lines = [heads, ["---"] * len(heads), *rows]
    cells = ([" ".join(cell.split()).replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def code(text: str) -> str:
    return f"`{text}`" if text else ""
