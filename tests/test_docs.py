"""docs/: the site builds without the network, every command in it parses, and what can run here runs.

A page's ```bash and ```python blocks without a title are run in order in a folder of their own, `obsdiff` in this
process (importing torch costs seconds). Blocks with a title need what it names, and their commands are parsed only, as
are those of the README. To keep it short, and nothing else is changed:

- CHEAPER is appended to commands: few prompts, steps and runs. Pictures are then noise, so a gate may exit with 3.
- What a reader brings stands in: MODELS are random or embedded pipelines under the names that the pages use.
- A prune or export that another page asked for word by word is copied from there.
- The peak memory of bench, a process of its own for each path, is not taken.
- `obsdiff serve` runs in the background on a free port, in the place of 8000, until its page ends.
"""

import contextlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import typer
from cli import call
from page import Page

from obsdiff.cli import app
from obsdiff.measure import latency
from obsdiff.runtime.ray_serve import Options

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
GROUP: Any = typer.main.get_command(app)
FENCE = re.compile(r"^```(\w+)?(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CHEAPER = {
    "prune": "--num-prompts 4 --steps 4 --batch-size 4 --solver obs --device cpu",
    "run": "--steps 2",
    "eval": "--num-images 2 --steps 2",
    "bench": "--steps 2 --warmup 0",
    "tune": "--runs 1 --backends torch",
}
BENCH = {"--url": "--requests 4", "--scenario": "--requests 8", "--compare": "", "": "--runs 1"}
MODELS = {"my-model": "one_block_sd3", "my-sd3": "sd3", "black-forest-labs/FLUX.1-dev": "flux"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its title ("" without one), its text."""

    language: str
    title: str
    text: str

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python") and not self.title


pytestmark = pytest.mark.timeout(600)  # a page is some ten commands


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(language, title, body) for language, title, body in FENCE.findall(text)]


def lines(text: str) -> list[str]:
    """The commands of a shell block: continued lines joined, a here-document one with its command."""
    text = re.sub(r"^(cat > .*<<END\n.*?^END)$", lambda m: m[0].replace("\n", "\0"), text, flags=re.DOTALL | re.M)
    joined = text.replace("\\\n", " ").splitlines()
    return [line.replace("\0", "\n") for line in joined if line.strip() and not line.startswith("#")]


def invocations(line: str) -> list[list[str]]:
    """The arguments of every call of obsdiff in a line of shell."""
    words = shlex.split(line, comments=True)
    ends = [k for k, word in enumerate(words) if word in ("&&", "|", ";", "&")] + [len(words)]
    starts = [k for k, word in enumerate(words) if word == "obsdiff" and (k == 0 or words[k - 1] in ("&&", ";", "-m"))]
    return [words[start + 1 : next(end for end in ends if end > start)] for start in starts]


def parse(arguments: list[str]) -> dict[str, Any]:
    """The options that a call of obsdiff sets; typer raises for what it does not know."""
    assert arguments[0] in GROUP.commands, f"there is no command {arguments[0]}"
    return GROUP.commands[arguments[0]].make_context(arguments[0], list(arguments[1:])).params


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_nothing_on_a_page_comes_from_elsewhere(site: Path) -> None:
    found = sorted(site.rglob("*.html"))
    assert len(found) == len(PAGES) + 2  # the commands and 404
    for path in found:
        page = Page(path.read_text(encoding="utf-8"))
        loaded = [tag.get("src") for name in ("script", "img", "iframe", "source") for tag in page.all(name)]
        loaded += [tag["href"] for tag in page.all("link") if tag.get("rel") != "canonical"]
        for address in filter(None, loaded):
            assert not urlsplit(address).netloc, f"{path.name} loads {address}"
            if path.name != "404.html":  # its addresses start at the root of the server
                assert (path.parent / urlsplit(address).path).exists(), f"{path.name}: {address} is missing"
    for path in site.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?(?:https?:)?//[^)]+", path.read_text(encoding="utf-8")), path
    assert not list(site.rglob("*.py"))


def test_the_page_of_commands_names_every_option(site: Path) -> None:
    text = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    for name, command in GROUP.commands.items():
        part = text[text.index(f'id="obsdiff-{name}"') :]
        part = part[: part.find("<h2", 10)]
        for parameter in command.params:
            if parameter.name != "help":
                shown = parameter.opts[0] if parameter.param_type_name == "option" else parameter.name.upper()
                assert f"<code>{shown}</code>" in part, f"{name} {shown}"


def test_no_marker_is_left(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert "<!-- table:" not in path.read_text(encoding="utf-8"), path.name
    files = (site / "reference" / "files.html").read_text(encoding="utf-8")
    assert files.count("<th>field</th>") == (DOCS / "reference" / "files.md").read_text().count("<!-- table:") + 1


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_one_that_there_is(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        for line in lines(block.text) if block.language in ("bash", "sh", "console", "") else []:
            for arguments in invocations(line.removeprefix("$ ")):
                parse(arguments)
            if line.startswith("serve run "):
                _, _, target, *pairs = shlex.split(line)
                assert target == "obsdiff.runtime.ray_serve:app"
                Options.model_validate(dict(pair.split("=") for pair in pairs))
    for code in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        for name, rest in re.findall(r"(?:^|\s)obsdiff ([a-z]+)(.*)", code, re.DOTALL):
            known = {option for parameter in GROUP.commands[name].params for option in parameter.opts}
            assert set(re.findall(r"--[a-z-]+", rest)) <= known, code


def test_a_wrong_command_is_noticed() -> None:
    (good, bad) = invocations(
        "obsdiff inspect pruned --json && torchrun -m obsdiff prune fashion out --patern 2:4  # x"
    )
    assert parse(good)["json"]
    with pytest.raises(Exception, match="--patern"):
        parse(bad)
    with pytest.raises(AssertionError, match="no command"):
        parse(["prun", "fashion"])


@dataclass
class Reader:
    """Somebody who types what a page says into a shell, in `folder`."""

    folder: Path
    made: dict[tuple[str, ...], Path]
    origin: dict[str, tuple[str, ...]] = field(default_factory=dict)
    servers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    port: int = 0

    def read(self, block: Block) -> None:
        text = block.text.replace("localhost:8000", f"localhost:{self.port}")
        if block.language == "python":
            exec(compile(text, "page", "exec"), {"__name__": "page"})  # noqa: S102
            return
        for line in lines(text):
            calls = invocations(line)
            if not calls:
                subprocess.run(["bash", "-ec", line], check=True)
            for arguments in calls:
                self.type(arguments)

    def type(self, arguments: list[str]) -> None:
        name = arguments[0]
        if name == "serve":
            return self.serve(arguments)
        if name in ("prune", "export"):
            return self.make(arguments)
        done = call(*arguments, *self.cheaper(arguments))
        gated = name == "eval" and {"--min", "--max"} & set(arguments)
        assert done.code in ((0, 3) if gated else (0,)), f"obsdiff {' '.join(arguments)}\n{done.err}"
        return None

    @staticmethod
    def cheaper(arguments: list[str]) -> list[str]:
        name = arguments[0]
        kind = next((kind for kind in BENCH if kind in arguments), "")
        few = CHEAPER.get(name, "") if kind != "--compare" else ""
        return shlex.split(f"{few} {BENCH[kind]}" if name == "bench" else few)

    def make(self, arguments: list[str]) -> None:
        """Runs a prune or an export, or copies what the same words made of the same things on another page."""
        name, model, out, *options = arguments
        key = (name, *self.origin.get(model, (model,)), "|", *options)
        self.origin[out] = key
        if key in self.made:
            shutil.copytree(self.made[key], out)
            return
        done = call(*arguments, *self.cheaper(arguments))
        assert done.code == 0, f"obsdiff {' '.join(arguments)}\n{done.err}"
        if not any(Path(option).is_file() for option in options):
            self.made[key] = Path(out).resolve()

    def serve(self, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "obsdiff", *arguments, "--port", str(self.port)]
        self.servers.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        until = time.monotonic() + 120
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://localhost:{self.port}/health/ready")
                return
            assert self.servers[-1].poll() is None, "the server ended"
            time.sleep(0.2)
        raise AssertionError("the server is not ready after two minutes")


@pytest.fixture(scope="module")
def made() -> dict[tuple[str, ...], Path]:
    """Folders of the pages that were read, by the words that made them."""
    return {}


@pytest.fixture
def reader(
    tmp_path: Path,
    made: dict[tuple[str, ...], Path],
    tiny_model: Callable[[str], Path],
    one_block_sd3: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[Reader]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latency, "peak_memory", lambda *_: 1)
    text = request.getfixturevalue("page").read_text(encoding="utf-8")
    for name, family in MODELS.items():
        if name in text:
            shutil.copytree(one_block_sd3 if family == "one_block_sd3" else tiny_model(family), name)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    reader = Reader(tmp_path, made, port=port)
    yield reader
    for server in reader.servers:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


RUN = [page for page in PAGES if any(block.runs for block in blocks(page))]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_a_page_can_be_followed(page: Path, reader: Reader) -> None:
    for block in blocks(page):
        if block.runs:
            reader.read(block)


def test_most_pages_can_be_followed() -> None:
    assert {page.stem for page in RUN} >= {"index", "tutorial", "numbers", "fine-tune", "flux", "engines", "triton"}
    assert sum(block.runs for page in RUN for block in blocks(page)) > 25
