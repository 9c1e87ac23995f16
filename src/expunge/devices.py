"""Which device to work on: what commands and recipes are asked for by name. No torch until one is looked for."""

from __future__ import annotations

from .errors import SettingError, nearest

DEVICES = ("auto", "cpu", "cuda", "mps")


def resolve(wanted: str) -> str:
    """Return the device to use; "auto" takes the fastest there is.

    Raises:
        SettingError: unknown, or not on this machine.
    """
    if wanted not in DEVICES:
        raise SettingError(f"unknown device {wanted!r}. Devices: {', '.join(DEVICES)}.{nearest(wanted, DEVICES)}")
    if wanted == "cpu":
        return wanted
    import torch  # noqa: PLC0415 (the command line starts without it)

    fastest_first = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here = [name for name, is_here in fastest_first.items() if is_here]
    if wanted not in ("auto", *here):
        raise SettingError(f"there is no {wanted} device here. Devices here: {', '.join(here)}.")
    return here[0] if wanted == "auto" else wanted
