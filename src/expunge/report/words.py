"""Numbers -> words: what is said of an edit, and how surely. The thresholds of every word stand here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..records import Card, Score
from .read import Contents

# UA from which a concept counts as hardly recognised, and the lower end of the interval that must bear it out
ERASED, ERASED_LOW = 0.95, 0.85
MOSTLY, PARTLY = 0.80, 0.50
# IRA and CRA as a share of the base model's own
KEPT, SOME_LOSS = 0.95, 0.85
# a base model recognised less often than this leaves little to erase
DREW_IT = 0.50
# widest 95 % interval that passes without a remark; rise of degenerate pictures; damage to one neighbour
WIDE, DEGENERATE_RISE, HURT = 0.10, 0.02, 0.20
CHANCE = 0.05
# of verdicts, the worst last
LEVELS = ("good", "mixed", "bad", "unknown")

# how a card's kind of edit is called
KINDS = {
    "weights": "changed weights",
    "lowrank": "low-rank layers",
    "gated": "gated low-rank layers",
    "hook": "hooks, weights as they were",
    "generator": "a one-step generator",
}

NBSP = "\u00a0"


@dataclass(frozen=True)
class Metric:
    """How a metric is named and printed; `form` is rate, number, seconds or bytes."""

    label: str
    form: str
    better: str
    meaning: str


METRICS: dict[str, Metric] = {
    "ua": Metric("UA, unlearning accuracy", "rate", "higher", "target pictures not recognised as the target"),
    "ira": Metric("IRA, retained accuracy in domain", "rate", "higher", "other pictures of the same kind, recognised"),
    "cra": Metric("CRA, retained accuracy across domains", "rate", "higher", "the other kind (styles for objects)"),
    "h": Metric("H, harmonic mean", "rate", "higher", "of UA, IRA and, where there is one, CRA"),
    "clip_score": Metric("CLIP score", "number", "higher", "agreement of retained pictures with their prompts"),
    "fid": Metric("FID to the base model", "number", "lower", "distance between the two models' retained pictures"),
    "kid": Metric("KID to the base model", "number", "lower", "the same, unbiased for few pictures"),
    "perceptual": Metric("Perceptual distance", "number", "lower", "base to edited, same prompt and seed, retained"),
    "degenerate": Metric("Degenerate pictures", "rate", "lower", "pictures in which the judge is sure of nothing"),
    "degenerate_target": Metric("Degenerate target pictures", "rate", "lower", "the same, target pictures only"),
    "probability": Metric("Probability of the erased class", "rate", "lower", "mean over its target pictures"),
    "entropy": Metric("Entropy of the judge, nats", "number", "lower", "target pictures; low: they show another class"),
    "seconds": Metric("Time of the erasure", "seconds", "lower", "wall clock"),
    "peak_memory": Metric("Peak memory of the erasure", "bytes", "lower", "of the process, or of the device"),
}


# distances to real pictures, by the first part of their name; the rest of it names the feature network
REAL: dict[str, Metric] = {
    "fid": Metric("FID to real pictures", "number", "lower", "retained pictures, and real ones of the same classes"),
    "kid": Metric("KID to real pictures", "number", "lower", "the same, unbiased for few pictures"),
    "precision": Metric("Precision", "rate", "higher", "retained pictures that look like real ones"),
    "recall": Metric("Recall", "rate", "higher", "real pictures like which some retained one looks"),
}


def metric(name: str) -> Metric:
    """Return how to print a metric; an unknown one is printed as a plain number under its own name."""
    if name in METRICS:
        return METRICS[name]
    kind, _, network = name.partition("_")
    if kind in REAL and network:
        return replace(REAL[kind], label=f"{REAL[kind].label} ({network})")
    return Metric(name, "number", "", "")


def percent(x: float) -> str:
    """Spell a share in [0, 1]; 0 and 100 % are only said of exact ones."""
    text = f"{100 * x:.1f}"
    if text == "100.0":
        text = "100" if x == 1 else "> 99.9"
    elif text == "0.0":
        text = "0" if x == 0 else "< 0.1"
    return f"{text}{NBSP}%"


def span(low: float | None, high: float | None, form: str = "rate") -> str:
    """Spell an interval, "" where there is none."""
    if low is None or high is None:
        return ""
    if form == "rate":
        return f"{100 * low:.1f}\N{EN DASH}{100 * high:.1f}{NBSP}%"
    return f"{plain(low)} to {plain(high)}"


def plain(x: float) -> str:
    """Spell a number with three or four significant digits."""
    usual = x == 0 or 0.001 <= abs(x) < 100_000
    text = f"{x:.2e}" if not usual else f"{x:.4g}" if abs(x) < 1000 else f"{x:,.0f}"
    return text.replace("-", "\N{MINUS SIGN}")


def seconds(x: float) -> str:
    """Spell a duration."""
    if x < 120:
        return f"{x:.1f}{NBSP}s"
    minutes, rest = divmod(round(x), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{NBSP}h {minutes}{NBSP}min" if hours else f"{minutes}{NBSP}min {rest}{NBSP}s"


def memory(x: float) -> str:
    """Spell a size in bytes."""
    return f"{x / 1e9:.2f}{NBSP}GB" if x >= 1e9 else f"{x / 1e6:.0f}{NBSP}MB"


def measure(form: str, x: float | None) -> str:
    """Spell a value of a metric, a dash where there is none."""
    if x is None:
        return "\N{EN DASH}"
    return {"rate": percent, "seconds": seconds, "bytes": memory}.get(form, plain)(x)


def change(form: str, x: float | None, base: float | None) -> str:
    """Spell the difference from the base model; rates in percentage points."""
    if x is None or base is None:
        return ""
    d = round(100 * (x - base), 1) if form == "rate" else x - base
    sign = "+" if d > 0 else "\N{MINUS SIGN}" if d < 0 else "\N{PLUS-MINUS SIGN}"
    return sign + (f"{abs(d):.1f}" if form == "rate" else measure(form, abs(d)))


def points(share: float) -> str:
    """Spell a share in percentage points."""
    return f"{100 * share:.1f}".replace("-0.0", "0.0").replace("-", "\N{MINUS SIGN}")


def p_value(p: float | None) -> str:
    """Spell a p-value."""
    if p is None:
        return ""
    return "<" + NBSP + "0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def listed(items: Sequence[str], most: int = 3) -> str:
    """Join names: "a, b and c"; of more than `most`, "a, b, c and 7 more"; "" of none."""
    names = list(items[:most])
    if len(items) > most:
        names.append(f"{len(items) - most} more")
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def subject(card: Card) -> str:
    """Return the erased concepts' names; of a plain distillation what was distilled."""
    return listed([c["name"] for c in card.concepts]) or f"{card.model} in one step"


def title(card: Card) -> str:
    """Return the heading of a run."""
    return f"{'Erasing' if card.concepts else 'Distilling'} {subject(card)}"


def headline_protocol(scores: Sequence[Score]) -> str:
    """Return the protocol that the sentence speaks of: the first one with a UA, else with an IRA, "" without."""
    return next((s.protocol for metric in ("ua", "ira") for s in scores if s.metric == metric), "")


def of_protocol(scores: Sequence[Score], protocol: str) -> dict[str, Score]:
    """Return metric -> score."""
    return {s.metric: s for s in scores if s.protocol == protocol}


def sentence(run: Contents) -> str:
    """Say in one line what the edit did; goes after the concept's name and a colon."""
    by = of_protocol(run.scores, headline_protocol(run.scores))
    ua = by.get("ua")
    if not run.card.concepts and by:
        return f"nothing was to be forgotten. {_rest(run.card, by)}"
    if ua is None:
        return "not audited yet, so nothing is known of what this edit erased or spared."
    if ua.value is None:
        return f"none of its {ua.errors} pictures could be scored, so nothing is known of this edit."
    # a picture that could not be scored counts as no success, yet nothing was recognised in it either
    drawn = ua.n + ua.errors
    after = f"in {max(0, _recognised(ua.value, drawn) - ua.errors)} of {drawn} after"
    if ua.errors:
        after += f" ({ua.errors} could not be scored)"
    before = "" if ua.base is None else f" in {_recognised(ua.base, drawn)} of {drawn} pictures before,"
    interval = span(ua.low, ua.high)
    text = f"recognised{before} {after} (UA{NBSP}{percent(ua.value)}"
    text += f", 95{NBSP}% interval {interval})." if interval else ", no interval)."
    return f"{text} {_rest(run.card, by)}"


@dataclass(frozen=True)
class Verdict:
    """What may be concluded: `level` good, mixed, bad or unknown; `cautions` say what limits it."""

    level: str
    text: str
    cautions: list[str]


def verdict(run: Contents) -> Verdict:
    """Judge an edit by the figures of the headline protocol, never beyond them."""
    protocol = headline_protocol(run.scores)
    by = of_protocol(run.scores, protocol)
    ua = by.get("ua")
    cautions = _state(run.card)
    if not run.card.concepts and by:
        kept_level, kept = _retained(by)
        damage = _degenerate(by)
        level = max(kept_level, "mixed" if damage or cautions else "good", key=LEVELS.index)
        text = f"Distilled{'; ' if kept_level == 'unknown' else ' '}{kept}."
        return Verdict(level, text, [*cautions, *damage, *_errors(by), *_widths(by)])
    if ua is None or ua.value is None:
        cautions += _errors(by)
        return Verdict("unknown", "No verdict: there is no measurement to base one on.", cautions)
    level, erased = _erased(ua, ua.value)
    kept_level, kept = _retained(by)
    worst = max(level, kept_level, key=LEVELS.index)
    damage = [*_degenerate(by), *_hurt(run)]
    if damage or cautions:
        worst = max(worst, "mixed", key=LEVELS.index)
    if kept_level == "good" and any(n.damage >= HURT for n in run.neighbours):
        kept += ", except near the target"
    text = f"{erased}{'; ' if kept_level == 'unknown' else ', '}{kept}."
    cautions += [*_chance(ua), *damage, *_errors(by), *_widths(by)]
    cautions.append("Plain prompts only: no attack has tried to bring the concept back.")
    return Verdict(worst, text, cautions)


def _recognised(ua: float, n: int) -> int:
    return round((1 - ua) * n)


def _domains(card: Card) -> tuple[str, str]:
    """Name what IRA and CRA are measured on."""
    kinds = {"style": ("other styles", "objects"), "object": ("other objects", "styles")}
    kinds["class"] = ("other classes", "")  # a world of classes has no other domain
    return kinds.get(str(card.concept.get("kind", "object")), ("the rest in its domain (IRA)", "other domains (CRA)"))


def _rest(card: Card, by: Mapping[str, Score]) -> str:
    """Say what became of everything that was retained."""
    same, other = _domains(card) if card.concepts else ("objects", "styles")
    kept = [k for label, name in ((same, "ira"), (other, "cra")) if (k := _kept(label, by.get(name)))]
    rest = "; ".join(kept)
    return f"{rest[0].upper()}{rest[1:]}." if rest else "What it did to the rest was not measured."


def _kept(label: str, score: Score | None) -> str:
    if score is None or score.value is None:
        return ""
    was = "" if score.base is None else f"{percent(score.base)}{NBSP}\N{RIGHTWARDS ARROW}{NBSP}"
    return f"{label} {was}{percent(score.value)}"


def _erased(ua: Score, value: float) -> tuple[str, str]:
    if ua.base is not None and 1 - ua.base < DREW_IT:
        return "unknown", "The base model rarely drew it, so there was little to erase"
    if value >= ERASED:
        if ua.low is not None and ua.low >= ERASED_LOW:
            return "good", "Hardly recognised any more"
        return "mixed", "Hardly recognised any more, though on too few pictures to be sure"
    if value >= MOSTLY:
        return "mixed", "Much less recognised, but not gone"
    if value >= PARTLY:
        return "bad", "Only partly erased"
    return "bad", "Not erased"


def _retained(by: Mapping[str, Score]) -> tuple[str, str]:
    shares = []
    # a world of classes has no other domain, and its protocol no CRA
    for name in ("ira", *(m for m in ("cra",) if m in by)):
        score = by.get(name)
        if score is None or score.value is None or not score.base:
            return "unknown", "what it cost the rest was not fully measured"
        shares.append(score.value / score.base)
    if min(shares) >= KEPT:
        return "good", "with little or no loss in the rest"
    return ("mixed", "at some cost to the rest") if min(shares) >= SOME_LOSS else ("bad", "at a heavy cost to the rest")


def _state(card: Card) -> list[str]:
    return [] if card.status == "complete" else [f"The erasure did not finish; its card says: {card.status}."]


def _widths(by: Mapping[str, Score]) -> list[str]:
    found = []
    for name in ("ua", "ira", "cra"):
        s = by.get(name)
        if s is None or s.value is None:
            continue
        if s.low is None or s.high is None:
            found.append(f"{name.upper()} comes without an interval.")
        elif s.high - s.low > WIDE:
            wide = points(s.high - s.low)
            found.append(
                f"The interval of {name.upper()} is {wide} points wide: {s.n + s.errors} pictures do not allow more."
            )
    return found


def _errors(by: Mapping[str, Score]) -> list[str]:
    return [
        f"{s.errors} of the {name.upper()} pictures could not be scored; they never count in the edit's favour."
        for name, s in by.items()
        if s.errors and name in ("ua", "ira", "cra")
    ]


def _chance(ua: Score) -> list[str]:
    if ua.base is None:
        return ["The base model was not scored, so there is no before to compare with."]
    if ua.p is not None and ua.p >= CHANCE:
        return [f"The change in UA may be chance (p = {p_value(ua.p)})."]
    return []


def _degenerate(by: Mapping[str, Score]) -> list[str]:
    found = []
    for name, what in (("degenerate_target", "Degenerate target pictures"), ("degenerate", "Degenerate pictures")):
        s = by.get(name)
        if s and s.value is not None and s.base is not None and s.value - s.base >= DEGENERATE_RISE:
            found.append(f"{what} rose from {percent(s.base)} to {percent(s.value)}: in part this is damage.")
    # the target's own rise says it more exactly
    return found[:1]


def _hurt(run: Contents) -> list[str]:
    hurt = [n for n in run.neighbours if n.damage >= HURT]
    if not hurt:
        return [] if run.neighbours else ["Damage to the concept's neighbours was not measured."]
    names = listed([n.name for n in hurt], 4)
    noun = "neighbour" if len(hurt) == 1 else "neighbours"
    return [f"{len(hurt)} {noun} lost {100 * HURT:.0f} points or more: {names}."]
