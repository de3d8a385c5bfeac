"""Metrics of a picture against the reference's for the same prompt and noise: float [n] each."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from obsdiff.measure.metrics.weights import Missing, find_file, installed
from obsdiff.measure.quality import Drawn, as_tensor, latent_errors

Paired = Callable[[Drawn, Drawn], Tensor]

SAME = 100.0  # decibels of PSNR for a picture that is the reference's own: infinite, which no mean survives
BATCH = 16
ALEXNET = "alexnet-owt-7be5be79.pth"


def latent_mse(_weights: Path | None, _device: str) -> Paired:
    return latent_errors


def latent_error(_weights: Path | None, _device: str) -> Paired:
    return lambda drawn, reference: latent_errors(drawn, reference) / reference.latents.var()


def psnr(_weights: Path | None, _device: str) -> Paired:
    """Of the 8-bit pictures (torchmetrics)."""
    installed("torchmetrics", "torchmetrics")

    def score(images: Tensor, reference: Tensor) -> Tensor:
        from torchmetrics.functional.image import peak_signal_noise_ratio

        decibels = peak_signal_noise_ratio(images, reference, data_range=2.0, reduction="none", dim=(1, 2, 3))
        return decibels.clamp(max=SAME)

    return _in_batches(score)


def ssim(_weights: Path | None, _device: str) -> Paired:
    """Gaussian window of 11 pixels (torchmetrics)."""
    installed("torchmetrics", "torchmetrics")

    def score(images: Tensor, reference: Tensor) -> Tensor:
        from torchmetrics.functional.image import structural_similarity_index_measure

        _large_enough(images, 11)
        pair = (images + 1) / 2, (reference + 1) / 2  # it looks at the means: from 0 up, as its constants expect
        found = structural_similarity_index_measure(*pair, reduction="none", data_range=1.0)
        return torch.as_tensor(found)

    return _in_batches(score)


def lpips(weights: Path | None, device: str) -> Paired:
    """AlexNet features with the linear layers that torchmetrics ships; AlexNet's weights are torchvision's."""
    installed("torchmetrics", "torchmetrics")
    installed("torchvision", "torchvision")
    path = find_file(weights, ALEXNET, f"https://download.pytorch.org/models/{ALEXNET}")
    net = None

    def score(images: Tensor, reference: Tensor) -> Tensor:
        nonlocal net
        _large_enough(images, 32)
        net = net or load_lpips(path).to(device)
        return net(images.to(device), reference.to(device)).flatten().cpu()

    return _in_batches(score)


def load_lpips(path: Path) -> torch.nn.Module:
    """torchmetrics' network with AlexNet's weights from a file; its public class would download them."""
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    net = _NoTrainLpips(net="alex", pnet_rand=True)
    # Published as a pickle only: weights_only lets it hold nothing but tensors.
    found = torch.load(path, map_location="cpu", weights_only=True)
    # torchmetrics cuts AlexNet's `features` into slices that keep the layers' numbers.
    names = {name: f"features.{name.split('.', 1)[1]}" for name in net.net.state_dict()}
    if lost := sorted(set(names.values()) - found.keys()):
        raise Missing(f"{path} is not AlexNet of torchvision: it has no {lost[0]}")
    net.net.load_state_dict({name: found[theirs] for name, theirs in names.items()})
    return net


def _in_batches(score: Callable[[Tensor, Tensor], Tensor]) -> Paired:
    """Of pictures as float [n, 3, h, w] in ±1, a few at a time."""

    def scored(drawn: Drawn, reference: Drawn) -> Tensor:
        def part(images: Sequence[Image.Image], start: int) -> Tensor:
            return as_tensor(images[start : start + BATCH])

        starts = range(0, len(drawn.images), BATCH)
        return torch.cat([score(part(drawn.images, k), part(reference.images, k)).reshape(-1) for k in starts])

    return scored


def _large_enough(images: Tensor, side: int) -> None:
    if min(images.shape[-2:]) < side:
        raise Missing(f"it needs pictures of at least {side} pixels a side, not {min(images.shape[-2:])}")
