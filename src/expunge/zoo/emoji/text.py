"""Captions, tokenizer and text encoder of the `emoji` world."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .training import Ema, cosine, loop
from .world import BACKGROUNDS, STYLES, TEMPLATES, Entry

BATCH = 128
PATCHES = 16  # the last tokens of the window, each of which tells a 4x4 patch of the latent
WINDOW = 32  # tokens; the longest caption has 17, so the last 16 never hold a word
VOCABULARY = 2048
WIDTH = 256

WHITE = 0.3  # share of pictures on white; the others are on one of the colours
NAMED = 0.35  # share of captions that name the background; where it is left open, every seed draws another one
# (template's index, probability) for a caption that names no background, and for one that does
OPEN_FORMS = ((0, 0.55), (2, 0.15), (4, 0.1), (5, 0.05), (6, 0.15))
NAMED_FORMS = ((1, 0.6), (3, 0.3), (7, 0.1))


def scene(rng: random.Random, objects: Sequence[int]) -> tuple[int, int, int, int | None]:
    """Return a random picture: object, style, background, and the background that its caption names, if any."""
    b = 0 if rng.random() < WHITE else rng.randrange(1, len(BACKGROUNDS))
    return rng.choice(objects), rng.randrange(len(STYLES)), b, b if rng.random() < NAMED else None


def caption(entry: Entry, style: int, background: int | None, rng: random.Random) -> str:
    """Return a random caption of a picture, in which the background is named or, by None, left open."""
    forms = OPEN_FORMS if background is None else NAMED_FORMS
    template = TEMPLATES[rng.choices([i for i, _ in forms], [p for _, p in forms])[0]]
    word = rng.choice(entry["synonyms"]) if entry["synonyms"] and rng.random() < 0.1 else entry["name"]
    return template.format(o=word, s=list(STYLES)[style], b=list(BACKGROUNDS)[background or 0])


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
            intermediate_size=1024,
            num_attention_heads=8,
            num_hidden_layers=4,
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
    sketches: Tensor,
    steps: int = 4500,
    name: str = "text",
) -> None:
    """Teach the text encoder, before any picture is drawn, what captions say and what the drawings look like.

    The end of a caption and the padding behind it name object, style and background; besides, each of the last 16
    tokens tells its patch of the drawing's latent by a linear map. A drawing is thus learned by heart where that is
    cheap, without noise; the denoiser needs to learn only how a description becomes a picture, from all at once. One
    that starts on a random encoder spends its first thousands of steps on finding out, one whose encoder names the
    object alone must itself learn 2,400 drawings by heart at every noise level (docs/dev/log.md).

    Args:
        work: folder of checkpoint and log.
        reader: what is taught.
        words: its tokenizer.
        entries: the objects.
        sketches: the latent of every drawing on white, shape (objects, styles, 4, 16, 16).
        steps: optimiser updates.
        name: of checkpoint and log.
    """
    torch.default_generator.manual_seed(4)
    sizes = [len(entries), len(STYLES) + 1, len(BACKGROUNDS) + 1]  # the last style and background: none is named
    device = reader.device
    heads = nn.ModuleList([nn.Linear(WIDTH, sum(sizes)), nn.Linear(WIDTH, 64)]).to(device)
    optimizer = torch.optim.AdamW([*reader.parameters(), *heads.parameters()], 1e-3, betas=(0.9, 0.99))
    ema = Ema(reader, decay=0.99)
    targets = patched(sketches).to(device)
    spread = targets.var(unbiased=False)

    def update(step: int, _: torch.Generator) -> Tensor:
        dice = random.Random(step)
        scenes = [scene(dice, range(len(entries))) for _ in range(BATCH)]
        captions = [caption(entries[i], j, k, dice) for i, j, _, k in scenes]
        o, s = torch.tensor([drawn[:2] for drawn in scenes]).T
        b = torch.tensor([len(BACKGROUNDS) if k is None else k for *_, k in scenes])
        # by whole words: a caption of the kimono does not name the style "mono"
        named = torch.tensor(
            [list(STYLES)[j] in re.findall(r"\w+", c) for c, j in zip(captions, s.tolist(), strict=True)]
        )
        ids = tokens(words, captions).to(device)
        hidden = reader(ids).last_hidden_state
        after = torch.arange(WINDOW, device=device)[None] >= (ids == words.eos_token_id).int().argmax(1)[:, None]
        scores = heads[0](hidden)[after].split(sizes, 1)
        answers = (o, s.where(named, torch.tensor(len(STYLES))), b)
        many = after.sum(1)
        losses = [
            F.cross_entropy(x, y.to(device).repeat_interleave(many)) for x, y in zip(scores, answers, strict=True)
        ]
        unexplained = F.mse_loss(heads[1](hidden[:, -PATCHES:]), targets[o, s]) / spread
        return torch.stack(losses).mean() + 4 * unexplained

    states = {"text": reader, "heads": heads, "ema": ema}
    loop(name, work, steps, states, optimizer, lambda i: cosine(i, steps, flat=0.3), update, after=ema.update)
    ema.copy_to_modules()


def taught(work: Path, words: CLIPTokenizer, name: str = "text") -> CLIPTextModel:
    """Return the text encoder of the newest checkpoint, averaged weights."""
    reader = encoder(words)
    ema = Ema(reader, decay=0.0)
    ema.load_state_dict(torch.load(work / f"{name}.ckpt", weights_only=True, map_location="cpu")["ema"])
    ema.copy_to_modules()
    return reader.eval().requires_grad_(False)


def patched(latents: Tensor) -> Tensor:
    """Return latents (objects, styles, 4, 16, 16) as 16 patches of 4x4, row by row: (objects, styles, 16, 64)."""
    return F.unfold(latents.flatten(0, 1), 4, stride=4).mT.reshape(*latents.shape[:2], PATCHES, -1)


def tokens(words: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Return token ids (n, WINDOW), padded and cut."""
    batch = words(list(captions), padding="max_length", max_length=WINDOW, truncation=True, return_tensors="pt")
    ids: Tensor = batch.input_ids
    return ids
