"""The embedded model's data: the photographs and captions it learns from, and how its pictures are judged."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from tokenizers import Tokenizer, models, trainers
from torch import Tensor
from transformers import CLIPTokenizer

from obsdiff.measure import fashion

# Debian's package dataset-fashion-mnist puts it here.
DATASET = Path("/usr/share/datasets/fashion-mnist")
START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 12  # start, "a photo of a yellow t - shirt", end, and one to spare
NOTHING = 10  # the index of "the caption names none", after the ten items or colours
TINTS = torch.tensor(list(fashion.TINTS.values()))

SETTINGS: dict[str, Any] = {"height": 32, "width": 32, "max_sequence_length": 0, "output_type": "pt"}
PAIRS = [
    f"a photo of {fashion.with_article(f'{colour} {item}')}" for item in fashion.ITEMS for colour in fashion.COLOURS
]


def photographs(folder: Path, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Grey photographs uint8 [n, 32, 32] (0 is the background) and their items int64 [n].

    `split` is "train" or "t10k"; `count` takes only the first ones. Raises FileNotFoundError that says how
    to get the data.
    """
    images, labels = (folder / f"{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    if not images.exists() or not labels.exists():
        raise FileNotFoundError(
            f"no Fashion-MNIST in {folder}: apt-get install dataset-fashion-mnist, or say where with --data"
        )
    grey = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
    items = np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, offset=8)
    padded = np.pad(grey[:count], ((0, 0), (2, 2), (2, 2)))
    return torch.from_numpy(padded), torch.from_numpy(items[:count].astype(np.int64))


def paint(grey: Tensor, colours: Tensor) -> Tensor:
    """Tints photographs uint8 [n, 32, 32] with colours int64 [n]: float32 [n, 3, 32, 32] in [-1, 1].

    White stays white and the photograph's own maximum becomes the tint.
    """
    strength = grey.float() / grey.amax((1, 2), keepdim=True).clamp(min=1)
    ink = 1 - TINTS[colours]
    return 1 - 2 * strength[:, None] * ink[:, :, None, None]


def draw_colours(items: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` different random colours for each item, never a held-out pair: int64 [n, count]."""
    allowed = torch.ones(len(fashion.ITEMS), len(fashion.COLOURS))
    for colour, item in fashion.HELD_OUT:
        allowed[fashion.ITEMS.index(item), fashion.COLOURS.index(colour)] = 0
    return torch.multinomial(allowed[items], count, generator=generator)


def _byte_alphabet() -> list[str]:
    """The printable stand-ins of the 256 bytes, in the order of CLIP's own vocabulary."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in plain] + [chr(256 + index) for index in range(256 - len(plain))]


def train_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair encoding, its merges learned on the grammar: 2 × 256 bytes, 100 merges, 2 specials.

    The order of two merges that are equally frequent differs from run to run (a hash order in `tokenizers`).
    """
    blank = CLIPTokenizer().backend_tokenizer
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    every_word = trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator(fashion.captions(), every_word)
    merges = [(left, right) for left, right in json.loads(trained.to_str())["model"]["merges"]]
    alphabet = _byte_alphabet()
    tokens = [
        *alphabet,
        *(f"{byte}</w>" for byte in alphabet),
        *("".join(merge) for merge in merges),
        START,
        END,
    ]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def caption_ids(tokenizer: CLIPTokenizer) -> tuple[Tensor, Tensor]:
    """Token ids of the grammar's captions by what they say, and how many there are.

    Returns int64 [11, 11, most, 12] (item, colour, caption; NOTHING where it names none) and int64 [11, 11].
    """
    said: dict[tuple[int, int], list[str]] = {}
    for caption in fashion.captions():
        item, colour = (NOTHING if index is None else index for index in fashion.parse_caption(caption))
        said.setdefault((item, colour), []).append(caption)
    counts = torch.zeros(NOTHING + 1, NOTHING + 1, dtype=torch.int64)
    ids = torch.zeros(NOTHING + 1, NOTHING + 1, max(map(len, said.values())), LENGTH, dtype=torch.int64)
    for (item, colour), texts in said.items():
        counts[item, colour] = len(texts)
        encoded = tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt")
        ids[item, colour, : len(texts)] = encoded.input_ids
    return ids, counts


def draw_captions(ids: Tensor, counts: Tensor, items: Tensor, colours: Tensor) -> Tensor:
    """A random caption's token ids int64 [n, 12] for each item and colour, as `caption_ids` tabulates them.

    10 % are empty, 8 % name no colour, 5 % no item: what guidance and half-said prompts need.
    """
    dice = torch.rand(len(items))
    items = items.where((dice >= 0.10) & ~((dice >= 0.18) & (dice < 0.23)), torch.tensor(NOTHING))
    colours = colours.where(dice >= 0.18, torch.tensor(NOTHING))
    choice = (torch.rand(len(items)) * counts[items, colours]).long()
    return ids[items, colours, choice]


def draw(pipeline: StableDiffusion3Pipeline, captions: list[str], seed: int, **options: float) -> Tensor:
    """The pipeline's pictures of the captions, float32 [n, 3, 32, 32] in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    pipeline.set_progress_bar_config(disable=True)
    parts = [captions[row : row + 100] for row in range(0, len(captions), 100)]
    drawn = [pipeline(part, generator=generator, **SETTINGS, **options).images for part in parts]
    return torch.cat(drawn).float() * 2 - 1


def draw_grid(pipeline: StableDiffusion3Pipeline, seed: int, steps: int) -> Image.Image:
    """Ten items by ten colours at guidance 2.5, three times enlarged."""
    images = draw(pipeline, PAIRS, seed, num_inference_steps=steps, guidance_scale=2.5)
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    grid = Image.new("RGB", (1020, 1020), "lightgrey")
    for index, picture in enumerate(pixels):
        row, column = divmod(index, 10)
        grid.paste(Image.fromarray(picture).resize((96, 96)), (column * 102 + 3, row * 102 + 3))
    return grid


@torch.no_grad()
def evaluate(
    pipeline: StableDiffusion3Pipeline,
    classifier: fashion.Classifier,
    folder: Path,
    seed: int = 0,
    steps: int = 20,
    pictures: int = 500,
) -> list[dict[str, str | float]]:
    """One row a setting of the pipeline, then the floors: what photographs, the VAE and noise would get.

    `pictures` a row, equally many of each pair of item and colour; the distances are to all test photographs.
    """
    captions = PAIRS * (pictures // len(PAIRS))
    unseen = [index for index, caption in enumerate(captions) if fashion.held_out(caption)]
    generator = torch.Generator().manual_seed(seed)

    def real(split: str) -> tuple[Tensor, list[str]]:
        grey, items = photographs(folder, split)
        order = torch.randperm(len(grey), generator=generator)[:10_000]
        colours = torch.randint(10, (len(order),), generator=generator)
        named = zip(colours.tolist(), items[order].tolist(), strict=True)
        names = [f"{fashion.COLOURS[colour]} {fashion.ITEMS[item]}" for colour, item in named]
        return paint(grey[order], colours), names

    def row(what: str, images: Tensor, names: list[str] | None = None) -> dict[str, str | float]:
        judged = fashion.accuracy(images, names, classifier) if names else {}
        distance = fashion.frechet_distance(fashion.classify(images, classifier)[2], reference)
        return {"pictures": what, **judged, "frechet_distance": distance}

    (test, test_names), (train, train_names) = real("t10k"), real("train")
    reference = fashion.classify(test, classifier)[2]
    rows = []
    for count, guidance in ((steps, 2.5), (steps // 2, 2.5), (steps, 4.0)):
        images = draw(pipeline, captions, seed, num_inference_steps=count, guidance_scale=guidance)
        apart = fashion.accuracy(images[unseen], [captions[index] for index in unseen], classifier)
        made = row(f"guidance {guidance}, {count} steps", images, captions)
        rows.append(made | {"held_out_item_accuracy": apart["item_accuracy"]})
    some, some_names = test[:pictures], test_names[:pictures]
    rebuilt = pipeline.vae.decode(pipeline.vae.encode(some).latent_dist.mode()).sample.clamp(-1, 1)
    return [
        *rows,
        row("all test photographs", test, test_names),
        row("training photographs", train[:pictures], train_names[:pictures]),
        row("VAE reconstructions", rebuilt, some_names),
        row("noise", torch.rand(some.shape, generator=generator) * 2 - 1),
    ]


def markdown(rows: list[dict[str, str | float]]) -> str:
    """The rows as a Markdown table, three decimals."""
    columns = ["pictures", "item_accuracy", "colour_accuracy", "frechet_distance", "held_out_item_accuracy"]
    cells = [[row.get(column, "") for column in columns] for row in rows]
    lines = [[f"{cell:.3f}" if isinstance(cell, float) else cell for cell in line] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *lines])
