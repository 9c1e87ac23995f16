"""Captions, tokenizer and text encoder of the `emoji` world."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .training import Ema, cosine, loop
from .world import BACKGROUNDS, STYLES, TEMPLATES, Entry

WINDOW = 24  # tokens; the longest caption has 17
VOCABULARY = 2048
WIDTH = 192

# (template's index, probability) for a picture on white and on a colour
ON_WHITE = ((0, 0.55), (2, 0.15), (4, 0.1), (5, 0.05), (6, 0.15))
ON_COLOUR = ((1, 0.6), (3, 0.3), (7, 0.1))


def caption(entry: Entry, style: int, background: int, rng: random.Random) -> str:
    """Return a random caption of a picture; the background is named whenever it is not white."""
    forms = ON_COLOUR if background else ON_WHITE
    template = TEMPLATES[rng.choices([i for i, _ in forms], [p for _, p in forms])[0]]
    word = rng.choice(entry["synonyms"]) if entry["synonyms"] and rng.random() < 0.1 else entry["name"]
    return template.format(o=word, s=list(STYLES)[style], b=list(BACKGROUNDS)[background])


def tokenizer(entries: Sequence[Entry]) -> CLIPTokenizer:
    """Train a byte-pair encoding on the world's words, in CLIP's form (lower case, `</w>` ends a word).

    The same words give the same ids: a resumed training, and the export of its checkpoint, make it anew.
    """
    words = [w for e in entries for w in (e["name"], *e["synonyms"])]
    corpus = [
        t.format(o=w, s=s, b=b).lower() for w in words for t in TEMPLATES for s in STYLES for b in list(BACKGROUNDS)[:1]
    ]
    corpus += [f"on a {b} background" for b in BACKGROUNDS for _ in range(2000)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    ends = sorted({word[-1] + "</w>" for line in set(corpus) for word, _ in bpe.pre_tokenizer.pre_tokenize_str(line)})
    trainer = trainers.BpeTrainer(
        # the trainer itself numbers the ends of words in a random order, by which it then breaks ties between merges
        special_tokens=ends,
        vocab_size=VOCABULARY - 2,
        min_frequency=2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) for m in learned["merges"]]
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges)]
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys(tokens))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=WINDOW)


def encoder(words: CLIPTokenizer) -> CLIPTextModel:
    """Build the untrained text encoder."""
    torch.default_generator.manual_seed(1)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            intermediate_size=512,
            num_attention_heads=6,
            num_hidden_layers=3,
            max_position_embeddings=WINDOW,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
            pad_token_id=len(words) - 1,
            projection_dim=128,
        )
    )


def pretrain(
    work: Path,
    reader: CLIPTextModel,
    words: CLIPTokenizer,
    entries: Sequence[Entry],
    steps: int = 600,
    name: str = "text",
) -> None:
    """Teach the text encoder what captions say before any picture is drawn: object, style and background.

    The end of a caption and the padding behind it must hold all three, as a trained CLIP's do: a denoiser that starts
    on a random encoder spends its first thousands of steps on finding out (docs/dev/log.md).
    """
    torch.default_generator.manual_seed(4)
    sizes = [len(entries), len(STYLES) + 1, len(BACKGROUNDS)]  # the last style: none is named
    device = reader.device
    head = nn.Linear(WIDTH, sum(sizes)).to(device)
    optimizer = torch.optim.AdamW([*reader.parameters(), *head.parameters()], 1e-3, betas=(0.9, 0.99))
    ema = Ema(reader, decay=0.99)

    def update(step: int, rng: torch.Generator) -> Tensor:
        dice = random.Random(step)
        o, s, b = (torch.randint(k, (64,), generator=rng) for k in (len(entries), len(STYLES), len(BACKGROUNDS)))
        b *= torch.rand(64, generator=rng) < 0.5
        captions = [caption(entries[i], j, k, dice) for i, j, k in zip(o.tolist(), s.tolist(), b.tolist(), strict=True)]
        named = torch.tensor([list(STYLES)[j] in c for c, j in zip(captions, s.tolist(), strict=True)])
        ids = tokens(words, captions).to(device)
        after = torch.arange(WINDOW, device=device)[None] >= (ids == words.eos_token_id).int().argmax(1)[:, None]
        scores = head(reader(ids).last_hidden_state)[after].split(sizes, 1)
        answers = (o, s.where(named, torch.tensor(len(STYLES))), b)
        many = after.sum(1)
        losses = [
            F.cross_entropy(x, y.to(device).repeat_interleave(many)) for x, y in zip(scores, answers, strict=True)
        ]
        return torch.stack(losses).sum()

    states = {"text": reader, "head": head, "ema": ema}
    loop(name, work, steps, states, optimizer, lambda i: cosine(i, steps, warmup=50), update, after=ema.update)
    ema.copy_to_modules()


def tokens(words: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Return token ids (n, WINDOW), padded and cut."""
    batch = words(list(captions), padding="max_length", max_length=WINDOW, truncation=True, return_tensors="pt")
    ids: Tensor = batch.input_ids
    return ids
