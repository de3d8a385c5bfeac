"""The tables of OBS-Diff (arXiv 2510.06751) on the embedded model, and whether methods rank here as they do there.

    python benchmarks/paper_tables.py [--only unstructured 2:4 ...] [--match REGEX] [--seeds 3] [--out FILE.json]

unstructured, 2:4, structured: the paper's baselines, its own method (obs) and ours: alps, auto, and auto with
--allocation error, which is what obsdiff prune does by default. timesteps, packages, prompts, compensation: the paper's
ablations, with its own method. Every row draws the same prompts, which no calibration used, with the same noise.
Intervals are 95 %, over the pictures; with several calibration seeds every figure is their mean. MACs are of one call
for one picture. What the paper reports is of other models and by other metrics: only the order can be compared.

Each result is written as soon as it is there, the same command goes on behind it, and FILE.txt holds the tables. All of
it takes about 25 minutes a seed on two quiet cores.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paper_orders as orders
from calibration import CALIBRATION, HALF, UNITS
from PIL import Image
from safetensors.torch import load_file

from obsdiff.checkpoint import CheckpointInfo, denoiser_weights, read_masks, versions
from obsdiff.errors import InputError, ObsdiffError
from obsdiff.export.totals import count_nonzero, count_totals, default_axes
from obsdiff.files import read_json, whole, write_json, write_tensors
from obsdiff.measure.comparable import Subject, look
from obsdiff.measure.drawing import Asked, draw_subject
from obsdiff.measure.environment import environment
from obsdiff.measure.fashion import held_out, unseen_captions
from obsdiff.measure.quality import Drawn
from obsdiff.measure.scoring import open_metrics, score
from obsdiff.models.layers import from_matrix
from obsdiff.models.source import find_source
from obsdiff.progress import Progress
from obsdiff.prune.stage import prune

MODEL, DEVICE = "fashion", "cpu"
TABLES = ("unstructured", "2:4", "structured", "timesteps", "packages", "prompts", "compensation")
SOLVERS = ("magnitude", "wanda", "dsnot", "obs", "alps", "auto")
FIRST_SEED, BATCH, SHOWN = 1000, 32, 8
MOST = len(unseen_captions(10**6))  # captions that no calibration used
UNIFORM, ALLOCATED = {"allocation": "uniform"}, {"allocation": "error"}

Results = dict[str, dict[str, Any]]
"""By what was asked, as JSON: one prune, with its weights compensated or its mask alone."""


@dataclass(frozen=True)
class Row:
    """One line of a table; those of one group are compared. `compensated` False: the mask on the dense weights."""

    table: str
    group: str
    name: str
    options: Mapping[str, Any]
    compensated: bool = True

    def asked(self, seed: int) -> dict[str, Any]:
        return {"options": dict(self.options), "compensated": self.compensated, "seed": seed}

    def seeds(self, count: int) -> range:
        return range(1 if self.options["solver"] == "magnitude" else count)  # it looks at no input


def make_rows(prompts: int, steps: int) -> Iterator[Row]:
    """All rows of all tables, in their order. A row may be in several tables; it is measured once."""
    usual = {**CALIBRATION, **UNIFORM, "num_prompts": prompts, "steps": steps, "packages": 4}
    usual |= {"timestep_weighting": "log-decrease", "solver": "obs"}
    blind = {"solver": "magnitude", "num_prompts": 1, "steps": 1, "packages": 1}

    def method(name: str) -> dict[str, Any]:
        return {**usual, **(blind if name in ("magnitude", "L1") else {"solver": name})}

    def sparse(share: float) -> dict[str, Any]:
        return {"pattern": "unstructured", "sparsity": share}

    for share in (0.4, 0.5, 0.6, 0.7):
        group = f"{100 * share:.0f} %"
        for name in SOLVERS:
            yield Row("unstructured", group, name, {**method(name), **sparse(share)})
        yield Row("unstructured", group, "auto, allocated", {**method("auto"), **sparse(share), **ALLOCATED})
    for name in SOLVERS:
        yield Row("2:4", "2:4", name, {**method(name), **HALF})
    for share in (0.15, 0.2, 0.25, 0.3):
        group, units = f"{100 * share:.0f} %", {**UNITS, "sparsity": share}
        for name in ("L1", "obs", "auto"):
            yield Row("structured", group, name, {**method(name), **units})
        yield Row("structured", group, "auto, allocated", {**method("auto"), **units, **ALLOCATED})
    ablated = {**usual, **sparse(0.6)}
    for name in orders.STEPS:
        yield Row("timesteps", "60 %", name, {**ablated, "timestep_weighting": name})
    for name in orders.PACKAGES:
        count = int(name) if name.isdigit() else 1000
        yield Row("packages", "60 %", name, {**ablated, "packages": count})
    for name in orders.PROMPTS:
        yield Row("prompts", "60 %", name, {**ablated, "num_prompts": int(name)})
    patterns = {"50 %": sparse(0.5), "60 %": sparse(0.6), "70 %": sparse(0.7), "2:4": HALF}
    for group, pattern in {**patterns, "structured 30 %": {**UNITS, "sparsity": 0.3}}.items():
        for name, compensated in (("obs", True), ("mask alone", False)):
            yield Row("compensation", group, name, {**usual, **pattern}, compensated)


def make_prompts(images: int) -> list[str]:
    """Captions that no calibration used, a quarter of them (if there are as many) of pairs that were never learned."""
    pool = unseen_captions(MOST)
    held, usual = [one for one in pool if held_out(one)], [one for one in pool if not held_out(one)]
    rare = min(len(held), images // 4)
    return [part[k * len(part) // n] for part, n in ((held, rare), (usual, images - rare)) for k in range(n)]


def drop_compensation(path: Path, info: CheckpointInfo) -> None:
    """Gives a pruned checkpoint's linears the dense weights under their masks."""
    dense = denoiser_weights(find_source(MODEL).denoiser_path)
    masks = read_masks(path, info)
    for file in denoiser_weights(find_source(path).denoiser_path).files:
        tensors = load_file(file)
        for name in masks.keys() & {key.removesuffix(".weight") for key in tensors}:
            weight = dense[f"{name}.weight"]
            tensors[f"{name}.weight"] = weight * from_matrix(masks[name], weight.shape)
        write_tensors(file, tensors)


def totals(path: str | Path, info: CheckpointInfo | None = None) -> dict[str, int]:
    """parameters and macs with the heads and neurons gone, nonzero: those that are not zero."""
    source = find_source(path)
    count = count_nonzero(denoiser_weights(source.denoiser_path))
    found = count_totals(source, info.groups if info else [], default_axes(source), 4, count)
    return {"parameters": found.parameters, "nonzero": found.nonzero, "macs": found.macs}


class Judge:
    """The dense model's pictures, drawn once, and the metrics of all others against them."""

    def __init__(self, images: int, steps: int, pictures: Path | None):
        self.dense: Subject = look([MODEL])[0]
        options = {"num_inference_steps": steps, "guidance_scale": CALIBRATION["guidance_scale"]}
        seeds = range(FIRST_SEED, FIRST_SEED + images)
        asked = {**self.dense.source.defaults, **options}
        self.asked = Asked(make_prompts(images), seeds, asked, BATCH, "torch", DEVICE)
        self.pictures = pictures
        names = (*orders.FIGURES, *orders.HELD_OUT)
        self.scorers, self.skipped = open_metrics(names, {}, self.dense, images, DEVICE, options)
        self.reference = self._draw(self.dense, "dense")
        self.figures = self._score([], {})[MODEL]

    def measure(self, path: Path, name: str) -> dict[str, Any]:
        """The path's figures, and those of each picture in one text: as a list they would take a line each."""
        subject = look([path])[0]
        drawn = self._draw(subject, name)
        figures = self._score([subject], {subject.path: drawn})[subject.path]
        hits = self.scorers["item_accuracy"](drawn, self.asked.prompts)
        pictures = {"latent_error": self.scorers["latent_error"](drawn, self.reference), "item_accuracy": hits}
        said = {key: " ".join(f"{value:.4g}" for value in values.tolist()) for key, values in pictures.items()}
        return {"figures": figures, "pictures": said}

    def _score(self, others: Sequence[Subject], drawn: Mapping[str, Drawn]) -> dict[str, Any]:
        every = {MODEL: self.reference, **drawn}
        return score(self.scorers, self.asked.prompts, self.dense, others, every, self.skipped, Progress())

    def _draw(self, subject: Subject, name: str) -> Drawn:
        drawn, _ = draw_subject(subject, self.asked, None, Progress())
        if self.pictures:
            self.pictures.mkdir(parents=True, exist_ok=True)
            strip = Image.new("RGB", (32 * SHOWN, 32), "white")
            for k, image in enumerate(drawn.images[:: max(1, len(drawn.images) // SHOWN)][:SHOWN]):
                strip.paste(image, (32 * k, 0))
            strip.resize((128 * SHOWN, 128)).save(self.pictures / f"{re.sub(r'[^a-z0-9]+', '-', name)}.png")
        return drawn


def key_of(asked: Mapping[str, Any]) -> str:
    return json.dumps(asked, sort_keys=True)


def measure_rows(rows: Iterable[Row], seeds: int, judge: Judge, results: Results) -> Iterator[str]:
    """Fills `results` with what is missing, one prune after another; yields a line of each. A prune is made once."""
    asked = {key_of(row.asked(seed)): (row, seed) for row in rows for seed in row.seeds(seeds)}
    todo: dict[str, list[tuple[Row, int]]] = {}
    for key, (row, seed) in sorted(asked.items(), key=lambda entry: entry[1][1]):  # the first seed of all comes first
        if key not in results:
            todo.setdefault(key_of({**row.asked(seed), "compensated": True}), []).append((row, seed))
    for number, wanted in enumerate(todo.values(), 1):
        (row, seed), folder = wanted[0], tempfile.TemporaryDirectory()
        with folder as name:
            out, start = Path(name) / "out", time.perf_counter()
            info = prune(MODEL, out, seed=seed, device=DEVICE, **row.options)
            seconds = time.perf_counter() - start
            for row, _ in sorted(wanted, key=lambda entry: not entry[0].compensated):
                if not row.compensated:
                    drop_compensation(out, info)
                start, title = time.perf_counter(), f"{row.table} {row.group} {row.name}"
                found = judge.measure(out, f"{title} {seed}") | totals(out, info) | {"prune_s": round(seconds, 1)}
                results[key_of(row.asked(seed))] = row.asked(seed) | found
                error, took = found["figures"]["latent_error"]["value"], time.perf_counter() - start
                yield (
                    f"{number}/{len(todo)} {title}, seed {seed}: latent_error {error:.4f}, "
                    f"prune {seconds:.1f} s, pictures {took:.1f} s"
                )


def say_tables(rows: Sequence[Row], state: Mapping[str, Any], skipped: Mapping[str, str]) -> str:
    """Every table of which something is there, and the orders, as Markdown that reads as text too."""
    results: Results = {
        key_of({k: one[k] for k in ("options", "compensated", "seed")}): one for one in state["results"]
    }
    setting, most = state["settings"], max((one["seed"] for one in state["results"]), default=0) + 1
    rare = state["dense"]["figures"].get("held_out_item_accuracy", {})
    tables: dict[str, dict[str, dict[str, list[Any]]]] = {}
    for row in rows:
        found = [results[key] for seed in row.seeds(most) if (key := key_of(row.asked(seed))) in results]
        if found:
            tables.setdefault(row.table, {}).setdefault(row.group, {})[row.name] = found
    lines = [
        f"{setting['images']} pictures a row, {rare.get('images', 0)} of them of pairs that the model never learned "
        f"(held out), all rows of the same prompts and noise; {setting['steps']} steps, guidance "
        f"{CALIBRATION['guidance_scale']:g}, {setting['prompts']} calibration prompts, {most} calibration seed(s).",
        "Intervals are over the pictures: with one seed they say nothing of what other calibration noise would change."
        " Seconds mean little where other jobs ran beside.",
        *(f"No {name}: {reason.replace('--num-images', '--images')}" for name, reason in skipped.items()),
    ]
    for table, groups in tables.items():
        lines += ["", f"## {table}", "", *orders.row_table(table, groups, state["dense"])]
    flat = {(table, group): found for table, groups in tables.items() for group, found in groups.items()}
    lines += ["", "## Do the methods rank as the paper says?", "", *orders.order_table(flat)]
    return "\n".join([*lines, "", json.dumps(state["environment"])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="these tables")
    parser.add_argument("--match", default="", help="rows whose 'table group name' this regular expression finds")
    parser.add_argument("--seeds", type=int, default=1, help="calibration seeds")
    parser.add_argument("--images", type=int, default=128, help="pictures a row; a Fréchet distance needs 128")
    parser.add_argument("--steps", type=int, default=CALIBRATION["steps"], help="of calibration and of pictures")
    parser.add_argument("--prompts", type=int, default=CALIBRATION["num_prompts"], help="calibration prompts")
    parser.add_argument("--out", type=Path, default=Path("paper-tables.json"), help="results; .txt: the tables")
    parser.add_argument("--pictures", type=Path, help=f"folder for {SHOWN} pictures of every row")
    args = parser.parse_args()
    try:
        code = run(args)
    except ObsdiffError as error:
        sys.exit(f"error: {error}")
    sys.exit(code)


def run(args: argparse.Namespace) -> int:
    """Measures and prints. Returns the exit code."""
    if min(args.seeds, args.steps, args.prompts, args.images) < 1 or args.images > MOST:
        raise InputError(f"--seeds, --steps, --prompts and --images are at least 1, --images at most {MOST}")
    if args.out.suffix != ".json" or not args.out.parent.is_dir():
        raise InputError(f"--out {args.out}: name a .json file in a folder that is there")
    settings = {"images": args.images, "steps": args.steps, "prompts": args.prompts, "versions": versions()}
    state = read_json(args.out) if args.out.exists() else {"settings": settings, "results": []}
    if not isinstance(state, dict) or state.get("settings") != settings:
        raise InputError(f"{args.out} is no result of these settings and versions: choose another --out")
    rows = list(make_rows(args.prompts, args.steps))
    chosen = [row for row in rows if row.table in args.only]
    try:
        chosen = [row for row in chosen if re.search(args.match, f"{row.table} {row.group} {row.name}")]
    except re.error as error:
        raise InputError(f"--match {args.match} is no regular expression: {error}") from None
    if not chosen:
        raise InputError(f"--match {args.match}: no row is called so")
    judge = Judge(args.images, args.steps, args.pictures)
    state["dense"] = {"figures": judge.figures, **totals(MODEL)}
    results: Results = {
        key_of({k: one[k] for k in ("options", "compensated", "seed")}): one for one in state["results"]
    }
    code = 0
    try:
        for line in measure_rows(chosen, args.seeds, judge, results):
            state |= {"environment": environment(DEVICE) | {"date": time.strftime("%Y-%m-%d")}}
            state["results"] = list(results.values())
            write_json(args.out, state)
            print(line, file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print(f"interrupted: {args.out} keeps what is there, and the same command goes on", file=sys.stderr)
        code = 130
    state.setdefault("environment", environment(DEVICE))
    text = say_tables(rows, state, judge.skipped)
    with whole(args.out.with_suffix(".txt")) as part:
        part.write_text(text, encoding="utf-8")
    print(text, end="")
    return code


if __name__ == "__main__":
    main()
