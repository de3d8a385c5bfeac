"""The judge of the embedded model's pictures: its captions, and a classifier of what is seen."""

import functools
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

DATA = Path(__file__).parents[1] / "data"

# The labels of Fashion-MNIST, in its order; so are the classifier's outputs.
ITEMS = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
SYNONYMS = {
    "tee": "t-shirt",
    "pants": "trousers",
    "sweater": "pullover",
    "trainer": "sneaker",
    "handbag": "bag",
    "boot": "ankle boot",
}
PLURALS = ("trousers", "pants")

# RGB in [0, 1]: what the darkest part of a photograph becomes.
TINTS = {
    "red": (0.86, 0.08, 0.12),
    "orange": (0.97, 0.48, 0.05),
    "yellow": (0.95, 0.78, 0.05),
    "green": (0.10, 0.55, 0.18),
    "teal": (0.02, 0.60, 0.62),
    "blue": (0.10, 0.25, 0.85),
    "purple": (0.48, 0.12, 0.68),
    "pink": (0.98, 0.40, 0.68),
    "brown": (0.45, 0.26, 0.12),
    "black": (0.03, 0.03, 0.03),
}
COLOURS = tuple(TINTS)

# (colour, item) pairs that the transformer and the text encoders never saw together.
HELD_OUT = (
    ("purple", "sneaker"),
    ("green", "bag"),
    ("orange", "dress"),
    ("blue", "coat"),
    ("yellow", "ankle boot"),
    ("teal", "trousers"),
)

NAMES = {item: item for item in ITEMS} | SYNONYMS


def _one_of(words: Sequence[str]) -> re.Pattern[str]:
    """Matches the longest of the words: "ankle boot" and not "boot", "t-shirt" and not the "shirt" in it."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(rf"\b({'|'.join(map(re.escape, longest_first))})\b", re.IGNORECASE)


_ITEM, _COLOUR = _one_of(list(NAMES)), _one_of(COLOURS)


def parse_caption(caption: str) -> tuple[int | None, int | None]:
    """The indexes in ITEMS and in COLOURS of what the caption names, None for what it does not say.

    Synonyms count, case does not. Of several items or colours the first counts.
    """
    item, colour = _ITEM.search(caption), _COLOUR.search(caption)
    return (
        ITEMS.index(NAMES[item[1].lower()]) if item else None,
        COLOURS.index(colour[1].lower()) if colour else None,
    )


def held_out(caption: str) -> bool:
    """True when the caption names a pair of HELD_OUT."""
    item, colour = parse_caption(caption)
    return item is not None and colour is not None and (COLOURS[colour], ITEMS[item]) in HELD_OUT


def with_article(phrase: str) -> str:
    """The phrase with its a or an; plurals take none."""
    if phrase.endswith(PLURALS):
        return phrase
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def item_captions(name: str) -> list[str]:
    return [f"a photo of {with_article(name)}", with_article(name), name]


def colour_captions(colour: str) -> list[str]:
    # A reconstruction: the tokenizer's merges fix every other template and that there are two of these,
    # but "something in red" in the place of one of them gives the same merges.
    return [f"something {colour}", f"a photo of something {colour}"]


def pair_captions(name: str, colour: str) -> list[str]:
    both = f"{colour} {name}"
    return [
        f"a photo of {with_article(both)}",
        with_article(both),
        both,
        f"{with_article(name)} in {colour}",
    ]


def captions() -> list[str]:
    """The 709 captions that the embedded model's grammar makes, held-out pairs and the empty one included.

    The plurals take no article, so 22 captions stand there twice: 687 are different.
    """
    return [
        "",
        *(caption for name in NAMES for caption in item_captions(name)),
        *(caption for colour in COLOURS for caption in colour_captions(colour)),
        *(caption for name in NAMES for colour in COLOURS for caption in pair_captions(name, colour)),
    ]


def calibration_captions(count: int = 128, seed: int = 0) -> list[str]:
    """Different captions, balanced over items, colours and pairs; the defaults make `prompts/fashion.txt`.

    Held-out pairs and the empty caption are left out. "No item" and "no colour" are balanced as if they were
    one more item and one more colour. Any prefix is balanced too. Raises ValueError when `count` is larger
    than the number of such captions.
    """
    pool = [caption for caption in dict.fromkeys(captions()) if caption and not held_out(caption)]
    if count > len(pool):
        raise ValueError(f"the grammar has {len(pool)} captions to calibrate on, not {count}")
    random.Random(seed).shuffle(pool)  # noqa: S311
    parsed = {caption: parse_caption(caption) for caption in pool}
    items: Counter[int | None] = Counter()
    colours: Counter[int | None] = Counter()
    pairs: Counter[tuple[int | None, int | None]] = Counter()
    chosen: list[str] = []

    def crowd(caption: str) -> tuple[int, int]:
        item, colour = parsed[caption]
        return pairs[item, colour], items[item] + colours[colour]

    for _ in range(count):
        caption = min(pool, key=crowd)
        pool.remove(caption)
        item, colour = parsed[caption]
        pairs[item, colour] += 1
        items[item] += 1
        colours[colour] += 1
        chosen.append(caption)
    return chosen


def unseen_captions(count: int = 64) -> list[str]:
    """Captions with an item and a colour that no calibration used, spread over the whole grammar: 515 at most."""
    seen = set(calibration_captions())
    pool = [
        caption for caption in dict.fromkeys(captions()) if caption not in seen and None not in parse_caption(caption)
    ]
    return pool[:: max(1, len(pool) // count)][:count]


class Classifier(nn.Module):
    """A small CNN with two heads: which item, which colour."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(3, 32, 2), (32, 64, 1), (64, 64, 2), (64, 128, 1), (128, 128, 2)]
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(inner, outer, 3, stride, 1), nn.BatchNorm2d(outer), nn.ReLU())
                for inner, outer, stride in widths
            )
        )
        self.fc = nn.Linear(128 * 4 * 4, 128)
        self.item = nn.Linear(128, len(ITEMS))
        self.color = nn.Linear(128, len(COLOURS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Item logits [n, 10], colour logits [n, 10], features [n, 128] of float [n, 3, 32, 32] in ±1."""
        features = self.fc(self.body(images).flatten(1)).relu()
        return self.item(features), self.color(features), features


@functools.cache
def load_classifier() -> Classifier:
    """The shipped classifier: float32, on the CPU, in eval mode. One instance a process."""
    classifier = Classifier()
    classifier.load_state_dict(load_file(DATA / "fashion_classifier.safetensors"))
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def classify(images: Tensor, classifier: Classifier | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Item logits [n, 10], colour logits [n, 10] and features [n, 128], float32 on the CPU.

    By the shipped classifier, or by another one in eval mode.

    `images` [n, 3, 32, 32] are uint8, or of a floating dtype in [-1, 1] (what a pipeline returns for
    `output_type="pt"` is in [0, 1]). Raises ValueError for another shape, dtype or range, NaN, or no picture.
    """
    if images.ndim != 4 or images.shape[1:] != (3, 32, 32) or not len(images):
        raise ValueError(f"the classifier wants images [n, 3, 32, 32], not {list(images.shape)}")
    if images.dtype == torch.uint8:
        images = images.cpu().float() / 127.5 - 1
    elif not images.is_floating_point() or not images.abs().max() <= 1.5:  # a decoder may overshoot a little
        raise ValueError(f"the classifier wants finite images, uint8 or in [-1, 1]; these are {images.dtype}")
    classifier = classifier or load_classifier()
    batches = [classifier(part) for part in images.cpu().float().split(256)]
    items, colours, features = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return items, colours, features


def accuracy(images: Tensor, captions: Sequence[str], classifier: Classifier | None = None) -> dict[str, float]:
    """How often the classifier sees in a picture what its caption names: `item_accuracy`, `colour_accuracy`.

    `images` and `classifier` as for `classify`. Each is over the captions that name an item or a
    colour, NaN when none does. Raises ValueError unless there is one caption for each image.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images for {len(captions)} captions")
    items, colours, _ = classify(images, classifier)
    wanted = list(zip(*map(parse_caption, captions), strict=True))

    def share(logits: Tensor, wanted: Sequence[int | None]) -> float:
        guesses = logits.argmax(1).tolist()
        hits = [guess == want for guess, want in zip(guesses, wanted, strict=True) if want is not None]
        return sum(hits) / len(hits) if hits else float("nan")

    return {"item_accuracy": share(items, wanted[0]), "colour_accuracy": share(colours, wanted[1])}


def _psd_sqrt(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between the Gaussians fitted to features `a` [n, d] and `b` [m, d] (arXiv 1706.08500).

    Computed in float64. It falls as n grows: compare only values from equally many images. Raises ValueError
    when a set has fewer images than features, for its covariance is then singular, or when d differs.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be [n, d] with one d, not {list(a.shape)} and {list(b.shape)}")
    fewest, needed = min(len(a), len(b)), a.shape[1]
    if fewest < needed:
        raise ValueError(f"the Fréchet distance on {needed} features needs at least {needed} images, not {fewest}")
    a, b = a.cpu().double(), b.cpu().double()
    root = _psd_sqrt(a.T.cov())
    covariance = b.T.cov()
    # tr sqrt(A B) = tr sqrt(sqrt(A) B sqrt(A)), which is symmetric: no complex square root is needed.
    cross = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum() - 2 * cross
    return max(distance.item(), 0.0)
