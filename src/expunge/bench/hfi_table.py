"""The tables of HFI's bench: the comparison, the curves, and where what was asked for is reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .hfi import NEGATIVE, NOISE, RATINGS, Row

FALL, KEPT = 0.8, 0.95  # what was asked for


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown: the comparison, then the curves over ratings and over wrong answers."""

    def part(title: str, chosen: Sequence[Row]) -> list[str]:
        head = "| look | method | ratings | wrong answers | AUC | rate (base) | fall | kept / base | s |"
        return [f"**{title}**, simulated raters\n", head, "|---" * 9 + "|", *map(line, chosen), ""]

    usual = [r for r in rows if (r["ratings"], r["noise"]) == (RATINGS, NOISE)]
    curved = {r["look"] for r in rows if r not in usual}
    curves = [r for r in rows if r["method"] == "hfi" and r["look"] in curved]
    by_ratings = [r for r in curves if r["noise"] == NOISE]
    by_noise = [r for r in curves if r["ratings"] == RATINGS]
    return "\n".join(
        [
            *part(f"{RATINGS} ratings, {NOISE:.0%} wrong", usual),
            f"Asked for: a fall of {FALL:.0%} with {KEPT:.0%} kept. Reached by: "
            + "; ".join(f"{m} {reached([r for r in usual if r['method'] == m])}" for m in ("hfi", "words", NEGATIVE))
            + ".\n",
            *part("Over ratings", sorted(by_ratings, key=lambda r: (r["look"], r["ratings"]))),
            *part("Over wrong answers", sorted(by_noise, key=lambda r: (r["look"], r["noise"]))),
            *(f"{r['look']}, best words: {', '.join(r['words'])}\n" for r in usual if "words" in r),
            *(f"{r['look']}, {r['method']}, {r['ratings']} ratings: {r['refused']}\n" for r in rows if "refused" in r),
        ]
    )


def reached(rows: Sequence[Row]) -> str:
    """Return on how many of a method's looks both aims are reached, and which."""
    done = [r["look"] for r in rows if "refused" not in r and aims(r)]
    return f"{len(done)} of {len(rows)}" + (f" ({', '.join(done)})" if done else "")


def aims(r: Row) -> bool:
    """Tell whether a row's values reach both aims."""
    fall, kept = r["reduction"]["value"], r["kept"]["value"]
    return fall is not None and kept is not None and fall >= FALL and kept >= KEPT


def line(r: Row) -> str:
    """Return one line of a table."""

    def interval(x: Mapping[str, float | None] | None) -> str:
        if x is None or x["value"] is None:
            return "-"
        return f"{x['value']:.2f} [{x['low']:.2f}, {x['high']:.2f}]"

    head = [r["look"], r["method"], str(r["ratings"]), f"{r['noise']:.0%}"]
    if "refused" in r:
        return "| " + " | ".join([*head, "refused", *["-"] * 4]) + " |"
    rates = f"{r['rate']:.3f} ({r['rate_base']:.3f})"
    seconds = "-" if r.get("seconds") is None else f"{r['seconds']:.0f}"
    rest = [interval(r.get("auc")), rates, interval(r["reduction"]), interval(r["kept"]), seconds]
    return "| " + " | ".join([*head, *rest]) + " |"
