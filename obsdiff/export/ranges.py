"""The ranges that a graph is made for: the user's images and pixels as axes of a denoiser call."""

from obsdiff.errors import InputError
from obsdiff.export.schema import Axis
from obsdiff.export.totals import default_axes
from obsdiff.models import size_of
from obsdiff.models.source import Source


def make_axes(source: Source, batch: str, size: str | None) -> dict[str, Axis]:
    """The dynamic axes of the graph, in latents and denoiser calls, from the user's images and pixels."""
    names = source.spec.axes(source.config)
    if size and "height" not in names:
        raise InputError(f"--size {size}: this model draws pictures of one size: leave the option out")
    patch = size_of(source.spec.patch, source.config)
    step = source.side_step
    own = default_axes(source)["height"] * source.vae_scale
    low, opt, high = (
        _triple("--size", size)
        if size
        else (
            max(step, own // 2 // step * step),
            own,
            own * 3 // 2 // step * step,
        )
    )
    if any(side % step for side in (low, opt, high)):
        raise InputError(f"--size {size}: sides must be multiples of {step} pixels for this model")
    side = Axis(min=low // source.vae_scale, opt=opt // source.vae_scale, max=high // source.vae_scale, multiple=patch)
    low, opt, high = _triple("--batch", batch)
    passes, (shortest, _usual, longest) = source.spec.passes, source.spec.tokens
    axes = {
        "batch": Axis(min=low, opt=passes * opt, max=passes * high),
        "height": side,
        "width": side,
        "tokens": Axis(min=shortest, opt=source.prompt_tokens, max=longest),
        "image": Axis(min=(side.min // patch) ** 2, opt=(side.opt // patch) ** 2, max=(side.max // patch) ** 2),
    }
    return {name: axes[name] for name in names}


def _triple(option: str, text: str) -> tuple[int, int, int]:
    try:
        low, opt, high = (int(part) for part in text.split(":"))
    except ValueError:
        example = "512:1024:1024" if option == "--size" else "1:1:8"
        raise InputError(f"{option} {text}: write MIN:OPT:MAX, for example {example}") from None
    if not 1 <= low <= opt <= high:
        raise InputError(f"{option} {text}: needs 1 <= MIN <= OPT <= MAX")
    return low, opt, high
