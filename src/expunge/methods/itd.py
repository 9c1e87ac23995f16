"""ItD - interpret then deactivate.

A sparse autoencoder on the text encoder's residual stream interprets prompts as features. The features that a concept's
prompts have and neutral ones have not are turned down while a prompt is read, and only in prompts that show them.

    F = union_c top_K(c)  minus  union_r top_K(r)        top_K(p): features by their largest activation over p's tokens
    h' = h + (scale - 1) sum_{f in F} z_f d_f            where mean |h' - h|^2 > tau, else h itself

Both steps need no training. The autoencoder does: `expunge sae` makes one in minutes, and one that lies beside the
model's weights is used without being named. tau is a quantile of the very number that it is compared with, over neutral
prompts that had no say in F: a share `fpr` of them is taken for the concept. A prompt below tau keeps its states:
its pictures are the base's, bit for bit.

Notation    h: states after a layer, per token · z_f, d_f: activation and direction of feature f · c: concept's prompt ·
            r: neutral prompt · tau: threshold
Erases      objects, styles, names; several at once, in seconds, with no weight changed
Limits      needs our runtime: whoever removes the hook has the concept back. Prompts that the autoencoder does not
            recognise pass, and so do embeddings that never went through the text encoder
Differs     the paper replaces h by the reconstruction; here its error stays, so that an empty F is the identity. The
            paper's scale is 0; the released code's is -8, as here, since with a small autoencoder 0 hardly erases. That
            code takes tau from another statistic than it compares with (largest token, not mean; -6, not -8), and for
            nudity from none, so that it stops; its loss against dead features never starts; its autoencoder is trained
            without the padding that it edits later; its tau is 0.99 of what the concept's weakest prompt has, `margin`.
            A small autoencoder has no feature without a few neutral prompts that share it, which `shared` allows
Reference   Tian et al., Sparse Autoencoder as a Zero-Shot Classifier for Concept Erasing in Text-to-Image Diffusion
            Models, 2025. arXiv:2503.09446
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Le, Lt
from torch import Tensor

from ..concept import Targets
from ..edits import Edit, HookEdit
from ..errors import EmptySelection, NeedsError
from ..kernel.model import Model
from ..kernel.sae import SAE, Ablation, active
from ..kernel.state import State, Step
from ..papers import Paper
from ..sae import batches, find, states
from .base import File, Needs

Look = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True, kw_only=True)
class ItD:
    """Interpret then deactivate; the module's docstring has the equations."""

    sae: Annotated[File, "file of the autoencoder; empty for the one beside the model's weights"] = ""
    top: Annotated[int, Ge(1), Le(4096), "K: strongest features of a prompt"] = 32
    shared: Annotated[
        float, Ge(0), Le(1), "share of neutral prompts that may have a chosen feature; 0 in the paper"
    ] = 0.005
    scale: Annotated[float, Ge(-100), Le(1), "factor of the chosen features; 0 in the paper"] = -8.0
    fpr: Annotated[float, Ge(0), Lt(1), "share of neutral prompts that may be taken for the concept"] = 0.01
    margin: Annotated[float, Ge(0), Le(1), "the paper's tau: so much of the concept's weakest prompt; 0 for fpr"] = 0.0

    family: ClassVar[str] = "inference-time features"
    paper: ClassVar[Paper] = Paper(
        "tian2025sparse",
        "Sparse Autoencoder as a Zero-Shot Classifier for Concept Erasing in Text-to-Image Diffusion Models",
        "Tian, Zhihua and Nan, Sirun and Xu, Ming and Zhai, Shengfang and Qu, Wenjie and Liu, Jian and Ren, Kui and "
        "Jia, Ruoxi and Zhang, Jiaheng",
        2025,
        "arXiv preprint",
        "2503.09446",
    )
    needs: ClassVar[Needs] = Needs(text=True, encoders=True, sae=True)

    def fit(self, model: Model, targets: Sequence[Targets], state: State) -> Generator[Step, None, Edit]:
        """Choose features and thresholds; yields one Step, returns the edit."""
        found, first = find(model, self.sae), model.need_text().first
        neutral = ordinary(targets, found.held)
        deciding, choosing = neutral[::2], neutral[1::2]
        groups = [*(t.prompts for t in targets), deciding]
        caught = [torch.zeros(len(prompts), dtype=torch.bool) for prompts in groups]
        ablations, chosen = {}, 0
        for name, sae in found.saes.items():
            look = partial(seen, model, name, found.layers[name])
            own, usual = ([self.frequency(look, sae, p, first) for p in part] for part in (groups[:-1], [choosing]))
            features = ((torch.stack(own).amax(0) > 0) & (usual[0] <= self.shared)).nonzero()[:, 0]
            ablation = Ablation(
                sae.encoder.detach(), sae.bias.detach(), features, sae.decoder.detach()[features], sae.k,
                found.layers[name], self.scale, 0.0, first,
            ).to(model.device)  # fmt: skip
            strength = [strengths(look, ablation, prompts) for prompts in groups]
            # a prompt is changed where any encoder says so: each has its part of the false positives
            tau = torch.quantile(strength[-1], 1 - self.fpr / len(found.saes), interpolation="higher")
            if self.margin:
                tau = self.margin * torch.cat(strength[:-1]).min()
            ablations[name] = replace(ablation, threshold=tau.item())
            caught = [hit | (s > tau) for hit, s in zip(caught, strength, strict=True)]
            chosen += len(features)
        for target, hit in zip(targets, caught, strict=False):
            if not bool(hit.any()):
                raise EmptySelection(
                    f"no prompt of {target.concept.name!r} shows more of the {chosen} chosen features than neutral "
                    f"prompts do, so nothing would be erased. Raise shared ({self.shared}) or fpr ({self.fpr}), or "
                    "train a larger autoencoder: `expunge sae --set expansion=16`."
                )
        *hits, wrong = caught
        figures = {"features": float(chosen), "caught": share(torch.cat(hits)), "false_positives": share(wrong)}
        for i in state.steps(1):
            yield Step(i, 1, figures)
        return HookEdit(ablations)

    def frequency(self, look: Look, sae: SAE, prompts: Sequence[str], first: int) -> Tensor:
        """Return the share of prompts that have each feature among their strongest, (n,)."""
        counts = torch.zeros(len(sae.encoder))
        for part in batches(prompts):
            values, index = active(look(part)[:, first:], sae.encoder.detach(), sae.bias.detach(), sae.k)
            peak = values.new_zeros(len(part), len(sae.encoder))
            peak = peak.scatter_reduce(1, index.flatten(1), values.flatten(1), "amax")
            values, index = peak.topk(min(self.top, peak.shape[1]))
            counts += torch.bincount(index[values > 0], minlength=len(counts)).cpu()
        return counts / max(1, len(prompts))


def seen(model: Model, name: str, layer: int, prompts: Sequence[str]) -> Tensor:
    """Return a layer's states of prompts, (b, n, d)."""
    return states(model, {name: layer}, prompts)[name]


def strengths(look: Look, ablation: Ablation, prompts: Sequence[str]) -> Tensor:
    """Return how much an ablation would change each prompt, (n,)."""
    return torch.cat([ablation.strength(ablation.change(look(part))).cpu() for part in batches(prompts)])


def ordinary(targets: Sequence[Targets], held: Sequence[str]) -> tuple[str, ...]:
    """Return neutral prompts: what is kept, and the autoencoder's held-out prompts that name no concept."""
    words = [w.casefold() for t in targets for w in (*t.concept.words(), *t.prompts)]
    others = [p for p in held if not any(w in p.casefold() for w in words)]
    found = tuple(dict.fromkeys([*(k for t in targets for k in t.keeps), *others]))
    if len(found) < 2:
        raise NeedsError("itd needs neutral prompts to contrast the concept with. Say what to keep: --keep.")
    return found


def share(hits: Tensor) -> float:
    """Return the share of True."""
    return hits.float().mean().item()
