"""Every error that Expunge raises on purpose.

    ExpungeError
    ├── ConceptError     the concept cannot be erased as asked (empty, unknown, contradicts itself)
    ├── NeedsError       the method needs something that was not given (images, a text encoder, ...)
    ├── Unsupported      this model cannot do that
    ├── EmptySelection   a name selects no weights
    ├── BadEdit          an edit file is broken, or belongs to another base
    ├── BadModel         a model is missing, incomplete, or stored in a refused format
    ├── BadRun           a run folder lacks something, or is in the way
    ├── BadStudy         a rating study lacks something, is in the way, or cannot take an answer
    ├── SettingError     a setting is unknown, malformed or out of range
    ├── Diverged         training produced NaN or infinity
    └── StorageError     a file could not be written; nothing half written is left behind

Each message says what happened, with which value, what is allowed, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ExpungeError(Exception):
    """Base of every error that a user can cause and mend."""


class ConceptError(ExpungeError):
    """The concept is empty, unknown to the model's world, or contradicts itself."""


class NeedsError(ExpungeError):
    """A method needs what neither the concept nor the model offers."""


class Unsupported(ExpungeError):
    """The model cannot do what was asked; the message gives the reason."""


class EmptySelection(ExpungeError):
    """A group or pattern selects nothing."""


class BadEdit(ExpungeError):
    """An edit cannot be read, or was made for another base model."""


class BadModel(ExpungeError):
    """A model cannot be found, read or trusted."""


class BadRun(ExpungeError):
    """A run folder is not what the command expects."""


class BadStudy(ExpungeError):
    """A rating study is not what the command expects, or an answer does not belong to it."""


class SettingError(ExpungeError):
    """A setting has an unknown name, a wrong type or an impossible value."""


class Diverged(ExpungeError):
    """A loss or a weight became NaN or infinite.

    Attributes:
        step: index of the first update that was not finite.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class StorageError(ExpungeError):
    """A file could not be written."""


class ExpungeWarning(UserWarning):
    """Base of every warning that the command line shows."""


class PromptCut(ExpungeWarning):
    """A prompt is longer than the text encoder's window; its end is not seen by the model."""


class WeakReward(ExpungeWarning):
    """A reward model is not surely better than chance at telling what people reject."""


class NotCached(ExpungeWarning):
    """Base pictures could not be kept, so the next audit has to draw them again."""


class KeepsAll(ExpungeWarning):
    """A concept's label is unknown to the model's world, so that nothing of the world is left out of what is kept."""


class KeepsNothing(ExpungeWarning):
    """People accept no prompt of a study, so that it gives nothing to retain."""


class Unseen(ExpungeWarning):
    """A method samples fewer trajectories than there are concepts, so that some are never looked at."""


class NearMiss(ExpungeWarning):
    """An anchor is no name of the model's world but nearly one, and is read as the words it is made of."""


def near(word: str, allowed: Iterable[str], n: int = 3) -> list[str]:
    """Return up to `n` allowed words that resemble `word`, the most similar first, ignoring case."""
    spelled: dict[str, str] = {}
    for a in allowed:
        spelled.setdefault(a.casefold(), a)
    folded = word.casefold()
    # a part of a name ("santa", "claus") is a near miss that edit distance does not see: a whole word of it is nearest
    inside = sorted((a for a in spelled if len(folded) >= 3 and folded in a), key=len)
    words = [a for a in inside if folded in a.split()]
    close = get_close_matches(folded, list(spelled), n=n, cutoff=0.6)
    return [spelled[a] for a in dict.fromkeys([*words, *close, *inside])][:n]


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the allowed word most like `word`, or "" when none is."""
    found = near(word, allowed, 1)
    return f" Did you mean {found[0]!r}?" if found else ""
