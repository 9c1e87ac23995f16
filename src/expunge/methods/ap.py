"""AP - adversarial preservation, and AGE - adaptive guided erasure.

A concept is erased as by ESD. Every few updates the word of a vocabulary that training has changed most so far is
sought, and held until the next search.

    min_theta  || e_theta(x_t, t, c) - [e(x_t, t, a) - eta (e(x_t, t, c) - e(x_t, t, null))] ||^2 + lambda D(c_a)
    c_a = argmax_c D(c),   D(c) = || e_theta(z_t, t, c) - e(z_t, t, c) ||^2

x_t lies on trajectories of the concept, z_t on those of the vocabulary; a = null in AP. With `adaptive` this is AGE: a
and null both become c_a in the concept's place. adversary="exact" compares all candidates on one batch, "gumbel"
ascends logits over them (the papers' search), "pgd" ascends through the space of encodings.
`split` below 1 holds e(x_t, t, c) at times t > split * last, and `anchor` e(x_t, t, null) (ANT, arXiv:2504.12782).
`smallest` trains only the smallest weights of each tensor (SaRA, arXiv:2409.06633); magnitude pruning may undo that.

Notation    e: original network · e_theta: trained network · c: concept · c_a: adversary · a: anchor · null: empty
            prompt · eta: strength · lambda: `adversarial`
Erases      objects, styles, names, nudity; each concept has its own adversary, several take turns in the search
Limits      holds what the vocabulary names; with few words, or between searches, others drift
Differs     the authors' code takes losses in x0 (space="x0"), which favours noisy times; its latents are cleaner than
            their t says; its search leaves out how the original network depends on c_a. It thins candidates by k-means
            of their distances, here evenly by rank, and lets z_t follow c_a; here z_t belongs to random candidates,
            since c_a changes faster than a bank of latents. AGE's paper maximises the erasing term over c_a as well; in
            its code, as here, that term gives c_a no gradient: the word most unlike the concept would win. AGE's
            mixtures of several targets are left out. `preserve` is ours; their search takes one step an update
Reference   Bui et al., Erasing Undesirable Concepts in Diffusion Models with Adversarial Preservation, NeurIPS 2024.
            arXiv:2410.15618; AGE: Bui et al., Fantastic Targets for Concept Erasure in Diffusion Models and Where To
            Find Them, ICLR 2025. arXiv:2501.18950
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le

from ..concept import Targets
from ..edits import Edit, of
from ..errors import SettingError
from ..kernel.adversary import Search, adversary
from ..kernel.bank import Bank
from ..kernel.condition import Condition
from ..kernel.descent import Rate
from ..kernel.model import Model
from ..kernel.neighbours import encoded
from ..kernel.saliency import unlocked
from ..kernel.state import State, Step
from ..kernel.terms import Space, distance, gated, held, is_late, some
from ..papers import Paper
from ..vocabulary import candidates, instead
from .base import File, Needs, conditions, kept, sizes


@dataclass(frozen=True, kw_only=True)
class AP:
    """Adversarial preservation; the module's docstring has the equations."""

    group: Annotated[str, "weights to train"] = "cross-attention"
    rank: Annotated[int, Ge(0), Le(256), "0 trains the weights themselves, else a low-rank update (LoRA)"] = 0
    smallest: Annotated[float, Ge(0), Le(1), "train only this share of each tensor, the smallest weights; 0: all"] = 0.0
    eta: Annotated[float, Ge(0), Le(20), "negative guidance eta"] = 1.0
    adversary: Annotated[Search, "search for c_a: exact, gumbel or pgd"] = "exact"
    adaptive: Annotated[bool, "erase towards the adversary (AGE)"] = False
    adversarial: Annotated[float, Ge(0), Le(100), "lambda: weight of the adversary's term"] = 1.0
    vocabulary: Annotated[File, "file of words, one a line; empty: the model's world, or a list shipped here"] = ""
    near: Annotated[int, Ge(2), Le(100_000), "words nearest to the concept that are considered"] = 100
    candidates: Annotated[int, Ge(2), Le(10_000), "words, spread over those, that c_a is sought among"] = 32
    every: Annotated[int, Ge(1), Le(10_000), "updates between two searches"] = 10
    ascent: Annotated[int, Ge(1), Le(1000), "ascent steps of a search by gumbel or pgd"] = 10
    search_lr: Annotated[float, Gt(0), Le(1), "learning rate of gumbel's logits; pgd's step, relative to c_a"] = 1e-2
    tau: Annotated[float, Gt(0), Le(100), "gumbel's temperature"] = 2.0
    space: Annotated[Space, "space of the losses: native, the network's own output, or x0"] = "native"
    guidance: Annotated[float, Ge(1), Le(30), "guidance scale while sampling"] = 3.0
    split: Annotated[float, Gt(0), Le(1), "share of the time axis, from no noise, that is erased; 1: all"] = 1.0
    anchor: Annotated[float, Ge(0), Le(100), "weight of the unconditional anchor; 0 for the paper's loss"] = 0.0
    preserve: Annotated[float, Ge(0), Le(100), "weight of the kept concepts' term; 0 for the paper's loss"] = 1.0
    steps: Annotated[int, Ge(0), Le(100_000), "optimiser updates"] = 100
    lr: Annotated[Rate, "Adam's learning rate; auto: 1 % of the weights' root mean square"] = "auto"
    batch: Annotated[int, Ge(1), Le(256), "latents an update"] = 8
    rollouts: Annotated[int, Ge(1), Le(256), "trajectories a refresh of each bank"] = 8
    sampling_steps: Annotated[int, Ge(1), Le(1000), "sampling steps a trajectory"] = 20
    reuse: Annotated[int, Ge(1), Le(100), "uses of each latent before a refresh"] = 2

    family: ClassVar[str] = "score distillation"
    paper: ClassVar[Paper] = Paper(
        "bui2024erasing",
        "Erasing Undesirable Concepts in Diffusion Models with Adversarial Preservation",
        "Bui, Anh and Vuong, Long and Doan, Khanh and Le, Trung and Montague, Paul and Abraham, Tamas and Phung, Dinh",
        2024,
        "Advances in Neural Information Processing Systems",
        "2410.15618",
    )
    needs: ClassVar[Needs] = Needs(text=False)

    def fit(self, model: Model, targets: Sequence[Targets], state: State) -> Generator[Step, None, Edit]:
        """Train the group; yields a Step an update, returns the edit."""
        self._check(targets)
        words = candidates(model, targets, self.vocabulary, self.near, self.candidates)
        known = [encoded(model, own) for own in words]
        c, a = conditions(model, targets)
        owner = [j for j, target in enumerate(targets) for _ in target.prompts]
        keep, null = kept(model, targets), model.encode("")
        e, e_theta = model.denoiser.teacher, model.denoiser
        student, opt, choice = unlocked(e_theta, state, self.group, self.lr, self.steps, self.smallest, self.rank)
        trajectories = partial(
            Bank, e_theta, e_theta, null=null, state=state, batch=self.batch, rollouts=self.rollouts,
            steps=self.sampling_steps, guidance=self.guidance, reuse=self.reuse,
        )  # fmt: skip
        bank = state.keep("bank", trajectories(c, sizes=sizes(targets)))
        others = state.keep("others", trajectories(Condition.cat(known), sizes=[len(own) for own in words]))
        foe = state.keep("adversary", adversary(
            self.adversary, e_theta, known, state.generator,
            lr=self.search_lr, tau=self.tau, steps=self.ascent, space=self.space,
        ))  # fmt: skip
        apart = partial(distance, e_theta, space=self.space)
        for i in state.steps(self.steps):
            (x_t, t, k), (z_t, s, _) = bank.draw(), others.draw()
            # before the first update nothing has changed, and the nearest candidate serves
            if i and i % self.every == 0:
                foe.search((i // self.every - 1) % len(targets), z_t, s)
            c_a = Condition.cat([foe.condition(owner[j]) for j in k.tolist()])
            if self.adaptive:
                near = [p for j, own in enumerate(targets) for p in instead(own, words[j][foe.index[j]], model.world)]
                e_a = e_0 = e(x_t, t, model.encode([near[j] for j in k.tolist()]))
            else:
                e_a, e_0 = e(x_t, t, a[k]), e(x_t, t, null)
            e_c, late = e(x_t, t, c[k]), is_late(e_theta, t, self.split)
            target = e_a - self.eta * (e_c - e_0)
            terms = {"erase": apart(t, e_theta(x_t, t, c[k]), gated(late, target, e_c))}
            terms["adversary"] = self.adversarial * apart(s, e_theta(z_t, s, c_a), e(z_t, s, c_a))
            if self.anchor:
                terms["anchor"] = self.anchor * held(e_theta, x_t, t, null)
            if keep is not None and self.preserve:
                terms["keep"] = self.preserve * held(e_theta, x_t, t, some(keep, len(t), state.generator))
            losses = opt.step(**terms)
            choice.after(i)
            yield Step(i, self.steps, losses)
        return of(model, student)

    def _check(self, targets: Sequence[Targets]) -> None:
        """Refuse an adaptive target that is no word, or is given already."""
        if self.adaptive and self.adversary == "pgd":
            raise SettingError("adaptive=True erases towards a word, and 'pgd' finds none: use exact or gumbel.")
        if self.adaptive and (given := [own.concept for own in targets if own.concept.anchor]):
            raise SettingError(
                f"{given[0].name!r} has the anchor {given[0].anchor!r}, and adaptive=True finds its own. Leave one out."
            )
