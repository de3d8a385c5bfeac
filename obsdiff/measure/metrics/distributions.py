"""Metrics of all pictures together against all of the reference's: features [n, d], and a distance between two sets."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from obsdiff.measure import fashion
from obsdiff.measure.metrics.weights import find_file, installed
from obsdiff.measure.quality import Drawn, as_tensor

Features = Callable[[Drawn], Tensor]

BATCH = 16
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
WHERE = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"


def fashion_features(_weights: Path | None, _device: str) -> Features:
    """Float32 [n, 128] of the embedded model's classifier."""
    return lambda drawn: fashion.classify(as_tensor(drawn.images))[2]


def inception_features(weights: Path | None, device: str) -> Features:
    """Float32 [n, 2048] of the Inception v3 that FID was defined with, by torchmetrics and torch-fidelity.

    Its weights are published as a pickle only; torch.load's default lets it hold nothing but tensors.
    """
    installed("torchmetrics", "torchmetrics")
    installed("torch_fidelity", "torch-fidelity")
    path = find_file(weights, INCEPTION, WHERE)
    loaded: list[torch.nn.Module] = []

    @torch.no_grad()
    def features(drawn: Drawn) -> Tensor:
        from torchmetrics.image.fid import NoTrainInceptionV3

        if not loaded:
            net = NoTrainInceptionV3(
                name="inception-v3-compat", features_list=["2048"], feature_extractor_weights_path=str(path)
            )
            loaded[:] = [net.to(device)]
        found = []
        for k in range(0, len(drawn.images), BATCH):
            pixels = np.stack([np.asarray(image.convert("RGB")) for image in drawn.images[k : k + BATCH]])
            found.append(loaded[0](torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)).float().cpu())
        return torch.cat(found)

    return features


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """KID (arXiv 1801.01401): the unbiased squared MMD with a cubic kernel, over all pictures of both sets [n, d].

    0 on average for two sets of one kind, and so below 0 half of the time.
    """
    from torchmetrics.image.kid import poly_mmd

    return float(poly_mmd(a.double(), b.double()))
