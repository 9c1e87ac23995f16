"""A pretend accelerator: tensors on the CPU that refuse whatever CUDA would refuse, for machines that have none.

Its name is "meta", the one device besides the CPU that autograd knows in every build of torch. Tensors there hold
numbers here. What may mix with them on CUDA may here: numbers, CPU tensors without dimensions, CPU indices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "meta"
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
MADE_OF_NUMBERS = (torch.tensor, torch.as_tensor, Tensor.new_tensor)
ASKED_OF_MEMORY = (Tensor.tolist, Tensor.data_ptr, Tensor.is_meta.__get__)  # type: ignore[attr-defined]
BY_INDEX = (Tensor.__getitem__, Tensor.__setitem__)
SWAP = Tensor.data.__set__  # type: ignore[attr-defined]
NEEDS_CPU = (Tensor.numpy, Tensor.__array__)


class Far(Tensor):
    """A tensor of the pretend device; `near` has its numbers."""

    near: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        far = Tensor._make_wrapper_subclass(
            cls, near.size(), strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype,
            device=DEVICE,
        )  # fmt: skip
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"Far({self.near!r})"


def is_far(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE


def tensors(value: Any, found: list[Tensor]) -> list[Tensor]:
    """Add the tensors in nested lists, tuples and dictionaries; torch's own walk takes most of the time of a test."""
    for part in value.values() if isinstance(value, dict) else value:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, dict | list | tuple):
            tensors(part, found)
    return found


def mapped(value: Any, f: Any) -> Any:
    """Return the same with `f` of each tensor."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, dict):
        return {k: mapped(v, f) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(v, f) for v in value)
    return value


def listed(index: Any) -> Any:
    """Return an index with tensors for lists."""
    if isinstance(index, tuple):
        return tuple(map(listed, index))
    return torch.tensor(index) if isinstance(index, list) else index


def refuse(name: str, args: Any, kwargs: Any) -> None:
    """Raise where CUDA would: devices meet, or chance comes from a generator of the other one."""
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"{name}: a generator of the CPU draws on the pretend device")
    if name == "copy_" or "device" in kwargs:
        return
    first = args[0] if args else None
    seen = (args[2:], kwargs) if name in INDEXED and isinstance(first, Far) else (args, kwargs)
    near = [x for x in tensors(seen, []) if not isinstance(x, Far)]
    changed = name.endswith("_") and any(x is first for x in near)
    if changed or any(x.ndim for x in near):
        raise RuntimeError(f"{name}: tensors of the CPU and of the pretend device meet")


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the CPU; what comes out is on the device where it would be."""
    known = {id(x.near): x for x in tensors((args, kwargs), []) if isinstance(x, Far)}
    wanted = kwargs.get("device")
    if not known and not is_far(wanted):
        return func(*args, **kwargs)
    name = func.overloadpacket.__name__
    refuse(name, args, kwargs)
    if wanted is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args_here, kwargs_here = mapped((args, kwargs), lambda x: x.near if isinstance(x, Far) else x)
    out = func(*args_here, **kwargs_here)
    if name == "copy_":
        return args[0]
    if wanted is not None and not is_far(wanted):
        return mapped(out, lambda x: x.clone() if id(x) in known else x)
    return mapped(out, lambda x: known[id(x)] if id(x) in known else Far(x))


class Operations(TorchDispatchMode):
    """Sees the operations that have no far tensor among their arguments and may make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """Sees what torch does not do by operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in NEEDS_CPU and isinstance(args[0], Far):
            raise TypeError("can't convert a tensor of the pretend device to numpy. Use Tensor.cpu() first.")
        if func in ASKED_OF_MEMORY and isinstance(args[0], Far):
            return func(args[0].near)
        if func == SWAP and isinstance(args[0], Far):
            args[0].near = args[1].near
        if func in BY_INDEX and isinstance(args[0], Far):
            # torch makes indices of lists on the device itself, and there holds no numbers
            args = (args[0], listed(args[1]), *args[2:])
        if func in MADE_OF_NUMBERS and is_far(kwargs.get("device")):
            return func(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


@contextmanager
def accelerator() -> Iterator[str]:
    """Yield the name of a device that exists until the end."""
    swapping, autocast = torch.__future__.get_swap_module_params_on_conversion(), torch.autocast
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.autocast = lambda kind, *args, **kwargs: autocast("cpu" if kind == DEVICE else kind, *args, **kwargs)
    try:
        with Functions(), Operations():
            yield DEVICE
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapping)
        torch.autocast = autocast
