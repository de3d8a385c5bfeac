"""Where tensors live: a user's --device, checked before anything is loaded."""

from obsdiff.errors import InputError


def pick_device(device: str | None) -> str:
    """The device itself, or cuda where there is one, else cpu. Raises InputError when torch cannot use it here."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: torch cannot use it here: {str(error).splitlines()[0]}") from None
    return device
