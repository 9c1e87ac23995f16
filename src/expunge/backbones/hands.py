"""Several pictures of a small network drawn at once, each by a thread of its own.

Cores that share the operations of a small network wait for one another hundreds of times a step: two of them draw 64
pictures of `emoji` in 20 to 28 seconds, by how waiting is done, and in 18 where each draws pictures of its own
(docs/dev/log.md, eighth session). Pictures are those that one thread draws, bit for bit.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

SMALL = 32 * 32  # cells of a latent up to which a network is small
TOGETHER = 16  # pictures a thread has in work


def split(count: int, batch: int, latent: Sequence[int], device: torch.device) -> tuple[int, int]:
    """Return how many pictures are drawn at once, and by how many threads.

    Args:
        count: pictures wanted.
        batch: pictures at once that were asked for.
        latent: channels, height, width.
        device: of the network.
    """
    cores = torch.get_num_threads()
    if device.type != "cpu" or latent[1] * latent[2] > SMALL or cores == 1:
        return batch, 1
    size = max(1, min(TOGETHER, batch, -(-count // cores)))
    return size, max(1, min(cores, -(-count // size)))


def remembers(parts: Sequence[nn.Module]) -> bool:
    """Tell whether hooks sit on some networks: what they keep from call to call belongs to one thread."""
    every = chain.from_iterable(part.modules() for part in parts)
    return any(m._forward_hooks or m._forward_pre_hooks for m in every)


def twin(pipe: Any, turn: threading.Lock) -> Any:
    """Return a pipeline of the same networks with a scheduler of its own; only one at a time reads prompts."""
    other = copy.copy(pipe)
    # past diffusers' registry, which both share
    vars(other)["scheduler"] = copy.deepcopy(pipe.scheduler)
    read = pipe.encode_prompt

    def encode(*args: Any, **options: Any) -> Any:
        with turn:
            return read(*args, **options)

    vars(other)["encode_prompt"] = encode
    return other


def each(draw: Callable[[Any, int], Tensor], pipe: Any, starts: Sequence[int], threads: int) -> Iterator[Tensor]:
    """Yield `draw(pipeline, start)` of every start in order.

    Args:
        draw: what draws pictures with a pipeline.
        pipe: the pipeline; `threads` of its like share its networks.
        starts: what `draw` is called with.
        threads: how many draw at once. One draws with the pipeline itself.
    """
    if threads == 1:
        yield from (draw(pipe, i) for i in starts)
        return
    free, turn, cores = SimpleQueue[Any](), threading.Lock(), torch.get_num_threads()
    for _ in range(threads):
        free.put(twin(pipe, turn))

    def one(i: int) -> Tensor:
        mine = free.get()
        try:
            return draw(mine, i)
        finally:
            free.put(mine)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(cores // threads,)) as pool:
            yield from pool.map(one, starts)
    finally:
        torch.set_num_threads(cores)
