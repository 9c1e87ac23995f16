"""CLIP text encoders: their layers, groups of their weights, and soft tokens.

A soft token is a placeholder in prompts that is read as given vectors. The vocabulary and the embedding matrix stay as
they are. A copy of the tokenizer knows the placeholders; where a text encoder meets their ids, a hook puts the vectors
in. diffusers' naming of multi-vector tokens is kept ("<x>", "<x>_1", "<x>_2", ...), so that its pipelines spell a
placeholder out wherever they encode a prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConceptError
from ..kernel.model import Text, Vectors
from ..kernel.student import Rule

# text encoder -> its tokenizer, by diffusers' component names
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}

# group of weights -> parts of the parameters' names; "{last}" is the last layer that a prompt's tokens pass through
GROUPS: dict[str, tuple[str, ...]] = {
    "all": ("",),
    "attention": (".self_attn.",),
    "mlp": (".mlp.",),
    "mlp-attention": (".mlp.", ".self_attn."),
    "mlp-final-attention": (".mlp.", ".layers.{last}.self_attn."),
}


class ClipText(Text):
    """The one or two text encoders of a pipeline.

    Attributes:
        held: vectors of the placeholders that prompts may hold now.
    """

    first = 1  # the start token sees no other

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        there = pipe.components
        self.encoders: dict[str, Any] = {n: there[n] for n in TOKENIZERS if there.get(n) is not None}
        unread = int("text_encoder_2" in there)  # SDXL's tokens leave before the last layer
        self.layers = {n: layers(e)[: -unread or None] for n, e in self.encoders.items()}
        self.groups = {g: {e: rule(g, len(r)) for e, r in self.layers.items()} for g in GROUPS}
        self.students = {}
        self.held: list[Tensor] = []

    @property
    def widths(self) -> dict[str, int]:
        """Return the width of a token's vector, by text encoder."""
        return {name: encoder.get_input_embeddings().embedding_dim for name, encoder in self.encoders.items()}

    @property
    def trained(self) -> bool:
        """Tell whether a soft token or a weight requires a gradient."""
        return bool(self.students) or any(v.requires_grad for v in self.held)

    def embedding(self, words: str = "") -> dict[str, Tensor]:
        """Return the vectors (n, d) of the tokens of some words, of the whole vocabulary for none, by text encoder."""
        found = {}
        for name, encoder in self.encoders.items():
            matrix = encoder.get_input_embeddings().weight.detach()
            ids = self.pipe.components[TOKENIZERS[name]](words, add_special_tokens=False).input_ids
            found[name] = matrix[ids] if words else matrix
        return found

    def spelled(self, prompt: str) -> str:
        """Return a prompt with every placeholder spelled out, one word a vector."""
        if not self.held:
            return prompt
        text: str = self.pipe.maybe_convert_prompt(prompt, self.pipe.tokenizer)
        return text

    @property
    def vocabularies(self) -> dict[str, str]:
        """Return the parameter that holds the vocabulary's vectors (v, d), by text encoder."""
        return {
            name: next(n for n, p in encoder.named_parameters() if p is encoder.get_input_embeddings().weight)
            for name, encoder in self.encoders.items()
        }

    def ids(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return which rows of the vocabulary prompts are read by, (b, n), padding included, by text encoder."""
        spelled = [self.spelled(p) for p in prompts]
        return {
            name: self.pipe.components[TOKENIZERS[name]](
                spelled, padding="max_length", truncation=True, verbose=False, return_tensors="pt"
            ).input_ids
            for name in self.encoders
        }

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens each prompt is made of, start and end among them."""
        tokenizer = self.pipe.components[TOKENIZERS[next(iter(self.encoders))]]
        spelled = [self.spelled(p) for p in prompts]
        return [len(ids) for ids in tokenizer(spelled, verbose=False).input_ids] if spelled else []

    @contextmanager
    def tokens(self, soft: Mapping[str, Vectors]) -> Iterator[None]:
        """Let prompts hold placeholders that are read as these vectors; see `Text.tokens`."""
        before = list(self.held)
        with ExitStack() as stack:
            for name, encoder in self.encoders.items():
                own = {word: vectors[name] for word, vectors in soft.items()}
                stack.enter_context(self._placed(name, encoder, own))
            self.held += [v for vectors in soft.values() for v in vectors.values()]
            try:
                yield
            finally:
                self.held = before

    @contextmanager
    def _placed(self, name: str, encoder: nn.Module, own: Mapping[str, Tensor]) -> Iterator[None]:
        """Hold placeholders in one text encoder and its tokenizer."""
        plain = self.pipe.components[TOKENIZERS[name]]
        extended = copy.deepcopy(plain)
        first = len(plain)
        for word, vectors in own.items():
            parts = [word, *(f"{word}_{i}" for i in range(1, len(vectors)))]
            size = len(extended)
            extended.add_tokens(parts)
            # a part that is known already gets its old id
            if extended.convert_tokens_to_ids(parts) != list(range(size, size + len(parts))):
                raise ConceptError(f"the placeholder {word!r} is a word of the text encoder's vocabulary: use another.")
        splice = Splice(encoder, first, tuple(own.values()))
        setattr(self.pipe, TOKENIZERS[name], extended)
        try:
            yield
        finally:
            setattr(self.pipe, TOKENIZERS[name], plain)
            splice.close()


def layers(encoder: nn.Module) -> list[nn.Module]:
    """Return the residual layers of a CLIP text encoder, first to last."""
    (stack,) = (m for name, m in encoder.named_modules() if name.endswith("encoder.layers"))
    return list(stack.children())


def rule(group: str, depth: int) -> Rule:
    """Return the rule of a group on the parameters' names of an encoder with so many layers."""
    parts = [part.format(last=depth - 1) for part in GROUPS[group]]
    return lambda name: any(part in f".{name}" for part in parts)


class Splice:
    """Puts vectors where a text encoder reads ids from `first` on.

    Args:
        encoder: the text encoder.
        first: id of the first vector's token; a text encoder may have rows for such ids, which are not read then.
        vectors: of each placeholder, (k, d), in the order of the ids.
    """

    def __init__(self, encoder: Any, first: int, vectors: tuple[Tensor, ...]) -> None:
        self.first, self.vectors = first, vectors
        self.count = sum(len(v) for v in vectors)
        self.stand_in = 1 if encoder.config.eos_token_id == 0 else 0
        self.places: Tensor | None = None
        self.rows = torch.empty(0, dtype=torch.long)
        self.handles = (
            encoder.register_forward_pre_hook(self.hide, with_kwargs=True),
            encoder.get_input_embeddings().register_forward_hook(self.show),
        )

    def hide(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Remember where the placeholders are, and let the encoder see an ordinary token there.

        Old configurations (SDXL's own) find the end of a prompt as its largest id, which a placeholder's would be.
        """
        ids: Tensor = args[0] if args else kwargs["input_ids"]
        self.places = (ids >= self.first) & (ids < self.first + self.count)
        self.rows = ids[self.places] - self.first
        ordinary = ids.masked_fill(self.places, self.stand_in)
        return ((ordinary, *args[1:]), kwargs) if args else ((), kwargs | {"input_ids": ordinary})

    def show(self, _: nn.Module, __: tuple[Any, ...], out: Tensor) -> Tensor:
        """Put the vectors in."""
        places, self.places = self.places, None
        if places is None or not len(self.rows):
            return out
        vectors = torch.cat([v.to(out) for v in self.vectors])
        return out.index_put((places,), vectors[self.rows.to(vectors.device)])

    def close(self) -> None:
        """Leave the text encoder as it was."""
        for handle in self.handles:
            handle.remove()
