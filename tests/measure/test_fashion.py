"""The embedded model's captions, the classifier that judges its pictures, and the calibration prompts."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPTokenizer

from obsdiff.measure import fashion
from obsdiff.measure.fashion import COLOURS, ITEMS

PROMPTS = fashion.DATA / "prompts"


def read_prompts(name: str) -> list[str]:
    return Path(PROMPTS / name).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("caption", "item", "colour"),
    [
        ("a photo of a red ankle boot", "ankle boot", "red"),
        ("a black boot", "ankle boot", "black"),
        ("t-shirt", "t-shirt", None),
        ("a pink shirt", "shirt", "pink"),
        ("an orange tee", "t-shirt", "orange"),
        ("Teal Trousers", "trousers", "teal"),
        ("pants in blue", "trousers", "blue"),
        ("a handbag in pink", "bag", "pink"),
        ("a photo of something yellow", None, "yellow"),
        ("", None, None),
        ("a hundred baggy coated bootleg things", None, None),
    ],
)
def test_parse_caption(caption: str, item: str | None, colour: str | None) -> None:
    expected = (
        None if item is None else ITEMS.index(item),
        None if colour is None else COLOURS.index(colour),
    )
    assert fashion.parse_caption(caption) == expected


def test_every_caption_parses_to_what_made_it() -> None:
    for name, item in fashion.NAMES.items():
        index = ITEMS.index(item)
        assert {fashion.parse_caption(text) for text in fashion.item_captions(name)} == {(index, None)}
        for number, colour in enumerate(COLOURS):
            parsed = {fashion.parse_caption(text) for text in fashion.pair_captions(name, colour)}
            assert parsed == {(index, number)}
    for number, colour in enumerate(COLOURS):
        assert {fashion.parse_caption(text) for text in fashion.colour_captions(colour)} == {(None, number)}


def test_the_grammar() -> None:
    captions = fashion.captions()
    assert len(captions) == 709
    assert len(set(captions)) == 687
    assert {"a photo of a red ankle boot", "teal trousers", "a bag in pink", "an orange bag", ""} <= set(captions)
    assert not {"a trousers", "a photo of a pants", "a orange bag", "a ankle boot"} & set(captions)
    parsed = map(fashion.parse_caption, captions)
    pairs = {(COLOURS[c], ITEMS[i]) for i, c in parsed if i is not None and c is not None}
    assert len(pairs) == 100
    assert set(fashion.HELD_OUT) < pairs


@pytest.fixture(scope="module")
def drawn() -> tuple[torch.Tensor, list[str]]:
    """Twenty pictures, float32 [20, 3, 32, 32] in [-1, 1]: every item and every colour twice."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        fashion.DATA / "fashion", text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    captions = [
        f"a photo of {fashion.with_article(f'{COLOURS[(row + shift) % 10]} {item}')}"
        for shift in (0, 3)
        for row, item in enumerate(ITEMS)
    ]
    images = pipeline(
        captions,
        height=32,
        width=32,
        num_inference_steps=10,
        guidance_scale=2.5,
        max_sequence_length=0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    return images * 2 - 1, captions


def test_drawn_pictures_show_what_was_asked_for(drawn: tuple[torch.Tensor, list[str]]) -> None:
    images, captions = drawn
    scores = fashion.accuracy(images, captions)
    assert set(scores) == {"item_accuracy", "colour_accuracy"}
    assert min(scores.values()) >= 0.8
    mistaken = fashion.accuracy(images, captions[1:] + captions[:1])
    assert max(mistaken.values()) <= 0.3


def test_accuracy_counts_only_what_captions_name(drawn: tuple[torch.Tensor, list[str]]) -> None:
    images, captions = drawn
    colours = [COLOURS[fashion.parse_caption(caption)[1] or 0] for caption in captions]
    scores = fashion.accuracy(images, [f"something {colour}" for colour in colours])
    assert scores["colour_accuracy"] >= 0.8
    assert scores["item_accuracy"] != scores["item_accuracy"]  # NaN: no caption names an item
    with pytest.raises(ValueError, match="20 images for 19 captions"):
        fashion.accuracy(images, captions[1:])


def test_classify_takes_bytes_and_floats_alike(drawn: tuple[torch.Tensor, list[str]]) -> None:
    pixels = ((drawn[0] + 1) * 127.5).round().clamp(0, 255)
    from_bytes = fashion.classify(pixels.to(torch.uint8))
    from_floats = fashion.classify(pixels / 127.5 - 1)
    assert [tuple(output.shape) for output in from_bytes] == [(20, 10), (20, 10), (20, 128)]
    for left, right in zip(from_bytes, from_floats, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 64, 64),
        torch.zeros(3, 32, 32),
        torch.zeros(0, 3, 32, 32),
        torch.zeros(2, 3, 32, 32, dtype=torch.int64),
        torch.full((2, 3, 32, 32), 255.0),
        torch.full((2, 3, 32, 32), float("nan")),
    ],
)
def test_classify_refuses_what_it_cannot_judge(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="the classifier wants"):
        fashion.classify(images)


def test_frechet_distance_of_a_set_to_itself_is_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    assert fashion.frechet_distance(features, features) == pytest.approx(0, abs=1e-8)
    assert fashion.frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_of_gaussians_is_known() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20_000, 8, generator=generator, dtype=torch.float64)
    shift = torch.linspace(-1, 2, 8, dtype=torch.float64)
    moved = fashion.frechet_distance(features, features + shift)
    assert moved == pytest.approx(shift.square().sum().item(), rel=1e-6)
    # Same mean, standard deviation tripled: the sum over the features of (3 - 1)² variances.
    spread = features - features.mean(0)
    widened = fashion.frechet_distance(spread, 3 * spread)
    assert widened == pytest.approx(4 * spread.var(0).sum().item(), rel=1e-6)


def test_frechet_distance_is_symmetric_and_bears_dead_features() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200, 12, generator=generator).relu() * scale for scale in (1.0, 2.0))
    a[:, 3] = b[:, 3] = 0
    distance = fashion.frechet_distance(a, b)
    assert distance > 0
    assert fashion.frechet_distance(b, a) == pytest.approx(distance, rel=1e-6)


def test_frechet_distance_refuses_too_few_images() -> None:
    enough, few = torch.randn(200, 128), torch.randn(100, 128)
    with pytest.raises(ValueError, match="at least 128 images, not 100"):
        fashion.frechet_distance(enough, few)
    with pytest.raises(ValueError, match="one d"):
        fashion.frechet_distance(enough, torch.randn(200, 64))


def test_fashion_prompts_are_the_calibration_captions() -> None:
    prompts = read_prompts("fashion.txt")
    assert prompts == fashion.calibration_captions()
    assert len(prompts) == len(set(prompts)) == 128
    assert set(prompts) < set(fashion.captions())
    assert not any(map(fashion.held_out, prompts))
    for counts in map(Counter, zip(*map(fashion.parse_caption, prompts), strict=True)):
        assert len(counts) == 11
        assert max(counts.values()) - min(counts.values()) <= 2
    assert max(Counter(map(fashion.parse_caption, prompts)).values()) <= 2


def test_calibration_captions_refuses_more_than_there_are() -> None:
    assert len(fashion.calibration_captions(3)) == 3
    with pytest.raises(ValueError, match="not 1000"):
        fashion.calibration_captions(1000)


def test_captions_encode_one_token_a_word() -> None:
    """The alphabet has all bytes, so nothing is ever unknown: a strange word would fall to pieces instead."""
    tokenizer = CLIPTokenizer.from_pretrained(fashion.DATA / "fashion" / "tokenizer")
    for caption in [*fashion.captions(), *read_prompts("fashion.txt")]:
        ids = tokenizer(caption).input_ids
        assert len(ids) - 2 == len(caption.replace("-", " - ").split())
        assert len(ids) <= tokenizer.model_max_length
        assert tokenizer.unk_token_id not in ids[1:-1]


def test_general_prompts() -> None:
    prompts = read_prompts("general.txt")
    assert len(prompts) == len({prompt.lower() for prompt in prompts}) == 120
    assert all(6 <= len(prompt.split()) <= 25 and prompt == prompt.strip() for prompt in prompts)


def test_unseen_captions_are_in_no_calibration_and_name_both() -> None:
    prompts = fashion.unseen_captions()
    assert len(prompts) == len(set(prompts)) == 64
    assert not set(prompts) & set(read_prompts("fashion.txt"))
    parsed = [fashion.parse_caption(prompt) for prompt in prompts]
    assert all(None not in pair for pair in parsed)
    assert len({item for item, _ in parsed}) == len({colour for _, colour in parsed}) == 10
    assert len(fashion.unseen_captions(5)) == 5
    assert sum(map(fashion.held_out, fashion.unseen_captions(128))) >= 8
