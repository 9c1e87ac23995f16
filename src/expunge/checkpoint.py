"""A nested state in one safetensors file: tensors as tensors, everything else as JSON in the file's metadata.

One file, because two cannot be replaced at once: a process killed between them would leave halves of different states.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import BadRun
from .storage import replacing


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a state: dicts, lists, tuples, tensors, numbers, strings, None. The former file stays until it is whole.

    Raises:
        TypeError: the state holds something else (a bug of whoever registered it).
        StorageError: the disk is full.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_pack(state, tensors, set()), allow_nan=False)
    with replacing(path) as temp:
        save_file(tensors, temp, metadata={"tree": tree})


def load(path: Path) -> dict[str, Any]:
    """Read a state, tensors on the CPU.

    Raises:
        BadRun: the file is broken.
    """
    with reading(path) as part:
        state = part()
    if not isinstance(state, dict):
        raise BadRun(f"the checkpoint {path} holds no state. Remove its folder and start again.")
    return state


@contextmanager
def reading(path: Path) -> Iterator[Callable[..., Any]]:
    """Give `part(*keys)`, which reads what lies under some keys of a state, one inside the other; None for no such key.

    All parts are of one state, also while a run replaces the file, and only what is asked for is read.

    Raises:
        BadRun: the file is broken.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tree = json.loads((file.metadata() or {})["tree"])

            def part(*keys: str) -> Any:
                found = tree
                for key in keys:
                    found = dict(found["dict"]).get(key)
                    if found is None:
                        return None
                return _unpack(found, file.get_tensor)

            yield part
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BadRun(f"the checkpoint {path} cannot be read: {error}. Remove its folder and start again.") from error


def size(state: Any) -> int:
    """Return the bytes of every tensor in a nested state."""
    return sum(t.numel() * t.element_size() for t in _leaves(state))


def finite(state: Any) -> bool:
    """Tell whether every floating tensor in a nested state is free of NaN and infinity."""
    return all(bool(t.isfinite().all()) for t in _leaves(state) if t.is_floating_point())


def _leaves(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in a nested state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)


def _pack(value: Any, tensors: dict[str, Tensor], taken: set[int]) -> Any:
    """Return `value` as JSON data; tensors move to `tensors`, their addresses to `taken`, and leave their name."""
    match value:
        case Tensor():
            name = f"t{len(tensors)}"
            tensors[name] = _own(value, taken)
            return {"tensor": name}
        case dict():
            # as pairs, because Adam's keys are numbers and JSON would turn them into strings
            return {"dict": [[_pack(k, tensors, taken), _pack(v, tensors, taken)] for k, v in value.items()]}
        case tuple():
            return {"tuple": [_pack(v, tensors, taken) for v in value]}
        case list():
            return {"list": [_pack(v, tensors, taken) for v in value]}
        case float() if not math.isfinite(value):
            return {"float": str(value)}
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(
        f"a state cannot hold {type(value).__name__}: tensors, numbers, strings and containers of them only"
    )


def _unpack(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    match kind:
        case "tensor":
            return tensor(inner)
        case "dict":
            return {_unpack(k, tensor): _unpack(v, tensor) for k, v in inner}
        case "tuple":
            return tuple(_unpack(v, tensor) for v in inner)
        case "list":
            return [_unpack(v, tensor) for v in inner]
        case "float":
            return float(inner)
    raise ValueError(f"unknown mark {kind!r}")


def _own(value: Tensor, taken: set[int]) -> Tensor:
    """Return `value` on the CPU, copied if it shares memory, which safetensors refuses."""
    plain = value.detach().to("cpu").contiguous()
    memory = plain.untyped_storage()
    partial = memory.nbytes() != plain.numel() * plain.element_size()
    if partial or memory.data_ptr() in taken:
        plain = plain.clone()
    taken.add(plain.untyped_storage().data_ptr())
    return plain
