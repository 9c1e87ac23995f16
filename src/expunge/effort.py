"""What an erasure costs before it is begun: updates, evaluations of the network, pictures. No torch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .errors import Unseen

# samples that a network looks at for each sample of an update, by the defaults, with something to retain
LOOKS = {
    "allbutone": 6, "ant": 7, "ap": 8, "erasediff": 3, "esd": 6, "fewshot": 2, "hfi": 4, "neggrad": 2, "salun": 3,
    "sdd": 4, "sfd": 16, "spm": 5, "ssd": 4,
}  # fmt: skip
SHOWN = 64  # pictures of each set that are drawn, as in the documentation, for methods which learn from pictures
FEW = {"fewshot": 4}  # its paper's number; drawing them is a part of its seconds


def cost(name: str, method: type[Any]) -> str:
    """Return what a method does with its defaults; how long that takes is the machine's and the model's business."""
    s, needs = {f.name: f.default for f in fields(method)}, method.needs
    said = f"{s['steps']} updates of {s['batch']} samples" if "steps" in s else "no update"
    said += " by each of two networks" if "fake_lr" in s else ""
    if found := {k: n for k, n in evaluations(name, s).items() if n}:
        parts = ", ".join(f"{n:,} {k}" for k, n in found.items())
        said += f"; {sum(found.values()):,} evaluations of the network, a sample each" + f": {parts}" * (len(found) > 1)
    said += f"; samples are looked at every {s['probe']} updates" if "probe" in s else ""
    if needs.images:
        shown, also = FEW.get(name, SHOWN), " and as many to retain" if needs.retained else ""
        said += f"; {shown} pictures of the concept{also}, given or drawn"
    if "inversion" in s:
        said += f"; {s['inversion']} updates before, if the concept is given by pictures"
    if needs.sae:
        said += "; reads prompts through a sparse autoencoder, which is trained once"
    return said + (f"; reads {s['sample']} prompts to erase and as many to keep at most" if "sample" in s else "")


def drawn(name: str, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Return how often a method draws a batch to learn from, and the samples of one."""
    return (settings["draws"], 1) if name == "ssd" else (settings.get("steps", 0), settings.get("batch", 0))


def extra(name: str, settings: Mapping[str, Any]) -> int:
    """Return how often it draws one besides, for a map of weights."""
    return int(settings["maps"]) if name == "ant" and settings["density"] < 1 else 0


def trajectories(name: str, settings: Mapping[str, Any]) -> int:
    """Return how many trajectories a method that has `rollouts` samples, into each of its banks."""
    times = drawn(name, settings)[0] + extra(name, settings)
    return -(-times // _lasts(name, settings)) * int(settings["rollouts"])


def _lasts(name: str, s: Mapping[str, Any]) -> int:
    """Return how many batches a refresh of a bank gives."""
    return int(max(1, s["rollouts"] * s["sampling_steps"] * s.get("reuse", 1) // drawn(name, s)[1]))


def enough(name: str, settings: Mapping[str, Any], concepts: int) -> int:
    """Return after how many updates (`ssd`: gradients) each of so many concepts has a trajectory."""
    refreshes = -(-concepts // settings["rollouts"])
    return int((refreshes - 1) * _lasts(name, settings) + 1 - extra(name, settings))


def warn_unseen(name: str, settings: Mapping[str, Any], concepts: int) -> None:
    """Warn where there are fewer trajectories than concepts: each shows one, and the rest would stay as they are.

    Args:
        name: the method's.
        settings: all of them.
        concepts: how many are erased at once.
    """
    # spm trains a membrane for each, with trajectories of its own; without updates nothing is erased at all
    if "rollouts" not in settings or name == "spm" or not (seen := trajectories(name, settings)) < concepts or not seen:
        return
    often, what = ("draws", "gradients") if name == "ssd" else ("steps", "updates")
    warnings.warn(
        f"{name} samples {seen} trajectories in {settings[often]} {what}, each of one concept, and {concepts} are "
        f"to be erased: {concepts - seen} are never looked at. Ask for more: --set {often}="
        f"{enough(name, settings, concepts)}. A closed form, such as tuce, looks at all of them.",
        Unseen,
        stacklevel=3,
    )


def evaluations(name: str, settings: Mapping[str, Any], shown: int = SHOWN) -> dict[str, int]:
    """Return how many samples the network looks at while a method erases one concept, by what for.

    Args:
        name: the method's.
        settings: all of them; what counts in an update counts as by default.
        shown: pictures of the concept, where the method learns from pictures.
    """
    s, looks = settings, LOOKS.get(name, 0)
    # gradients alone, each of one sample
    updates, batch = drawn(name, s)
    maps = extra(name, s)
    # a map of the reversal alone, which asks four times
    for_maps = 4 * maps * batch
    if name == "salun" and s["threshold"] == "hard" and s["density"] < 1:
        for_maps = -(-s["draws"] * shown // batch) * batch
    searches, search = (max(0, updates - 1) // s["every"], s["adversary"]) if name == "ap" else (0, "")
    each = 2 * min(s["near"], s["candidates"]) if search == "exact" else 4 * s.get("ascent", 0)
    rolled = 0
    if "rollouts" in s:
        guided = 2 if s["guidance"] > 1 else 1
        rolled = trajectories(name, s) * s["sampling_steps"] * guided * (2 if name == "ap" else 1)
    return {
        "in updates" if name != "ssd" else "for gradients": looks * updates * batch,
        "to sample what is trained on": rolled,
        "for the map of weights": for_maps,
        "to search adversaries": searches * each * batch,
    }
