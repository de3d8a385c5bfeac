"""The metrics of `obsdiff eval`, as data: what each needs, what it is computed from, and which way is better."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from obsdiff.measure import fashion
from obsdiff.measure.metrics import alone, distributions, paired
from obsdiff.measure.metrics.weights import Missing


@dataclass(frozen=True)
class Metric:
    """`open(weights, device)` gives the function of alone.py, paired.py or distributions.py; it raises Missing.

    It loads nothing but looks whether all is there: the weights are loaded when the function is first called, after
    the pipelines are gone. `of`: whose pictures it is for. `share`: its values are 0 or 1. `distance`: of features.
    `fewest`: how many pictures it needs, as many as features for a Fréchet distance.
    """

    kind: Literal["paired", "alone", "distribution"]
    better: Literal["lower", "higher"]
    open: Callable[[Path | None, str], Callable[..., Tensor]]
    of: Literal["all", "embedded", "other"] = "all"
    share: bool = False
    distance: Callable[[Tensor, Tensor], float] | None = None
    fewest: int = 1


def _accuracy(which: int, held_out: bool = False) -> Metric:
    return Metric("alone", "higher", alone.accuracy(which, held_out), "embedded", share=True)


def _distance(open: Any, distance: Any, of: Any, fewest: int) -> Metric:
    return Metric("distribution", "lower", open, of, distance=distance, fewest=fewest)


METRICS: dict[str, Metric] = {
    "latent_mse": Metric("paired", "lower", paired.latent_mse),
    "latent_error": Metric("paired", "lower", paired.latent_error),
    "psnr": Metric("paired", "higher", paired.psnr),
    "ssim": Metric("paired", "higher", paired.ssim),
    "lpips": Metric("paired", "lower", paired.lpips, "other"),
    "item_accuracy": _accuracy(0),
    "colour_accuracy": _accuracy(1),
    "held_out_item_accuracy": _accuracy(0, held_out=True),
    "held_out_colour_accuracy": _accuracy(1, held_out=True),
    "frechet_distance": _distance(distributions.fashion_features, fashion.frechet_distance, "embedded", 128),
    "fid": _distance(distributions.inception_features, fashion.frechet_distance, "other", 2048),
    "kid": _distance(distributions.inception_features, distributions.kernel_distance, "other", 2),
    "clip_score": Metric("alone", "higher", alone.clip_score, "other"),
    "image_reward": Metric("alone", "higher", alone.image_reward, "other"),
    "hpsv2": Metric("alone", "higher", alone.hpsv2, "other"),
}

__all__ = ["METRICS", "Metric", "Missing"]
