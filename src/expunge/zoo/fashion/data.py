"""Stage `data`: read the published files, check them, and keep the pictures as one file of 32x32 bytes.

Fashion-MNIST comes as four IDX files (two of pictures, two of labels), packed or not; CIFAR-10 as six files of records,
a label and 3072 bytes each. Pictures of 28x28 get a margin of two black pixels.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ...errors import NeedsError
from ...storage import replacing
from .world import Source

SIDE = 32
PICTURES = "pictures.safetensors"
PARTS = ("train", "test")
IDX_BYTES = 0x08  # code of unsigned bytes in an IDX header
RECORD = 1 + 3 * SIDE * SIDE  # bytes of a CIFAR-10 record


class Pictures:
    """Pictures and labels of one part.

    Attributes:
        bytes: uint8 tensor (n, channels, 32, 32).
        labels: int64 tensor (n,).
    """

    def __init__(self, work: Path, part: str) -> None:
        path = work / PICTURES
        if not path.is_file():
            raise NeedsError(f"{path} is missing. Run the stage `data` first, with the same --work.")
        stored = load_file(path)
        self.bytes, self.labels = stored[f"{part}.pictures"], stored[f"{part}.labels"].long()

    def __len__(self) -> int:
        return len(self.labels)

    def floats(self, index: Tensor | slice) -> Tensor:
        """Return pictures of an index in [0, 1], (b, channels, 32, 32)."""
        return self.bytes[index].float() / 255


def build(work: Path, source: Source, folder: Path | None = None) -> None:
    """Read and check a source, and write `pictures.safetensors` to `work`.

    Raises:
        NeedsError: a file is missing or is not the published one.
    """
    folder = folder or source.folder
    content = {name: unpacked(folder, name, source) for name in source.files}
    records = all(name.endswith(".bin") for name in source.files)
    stored = cifar_parts(content, folder, source) if records else idx_parts(content, folder, source)
    for part in PARTS:
        counts = torch.bincount(stored[f"{part}.labels"].long(), minlength=len(source.classes))
        if len(set(counts.tolist())) != 1 or len(counts) != len(source.classes):
            raise damaged(folder, source, f"the {part} labels are not {len(source.classes)} classes of one size")
    with replacing(work / PICTURES) as temp:
        save_file(stored, temp)
    tqdm.write(f"{source.title}: " + ", ".join(f"{len(stored[f'{p}.labels'])} {p} pictures" for p in PARTS))


def unpacked(folder: Path, name: str, source: Source) -> bytes:
    """Return the content of a file or of its packed form, checked where its checksum is known.

    Raises:
        NeedsError: it is missing, or is not the published one.
    """
    plain, packed = folder / name, folder / f"{name}.gz"
    if not plain.is_file() and not packed.is_file():
        raise NeedsError(f"{source.title} is not at {folder}: {name} is missing. {source.obtain}")
    try:
        data = plain.read_bytes() if plain.is_file() else gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise damaged(folder, source, f"{name} cannot be read ({error})") from error
    found, wanted = hashlib.sha256(data).hexdigest(), source.files[name]
    if wanted and found != wanted:
        raise damaged(folder, source, f"the content of {name} has SHA-256 {found[:16]}..., not {wanted[:16]}...")
    return data


def idx_parts(content: dict[str, bytes], folder: Path, source: Source) -> dict[str, Tensor]:
    """Return pictures and labels of the four IDX files, with a margin."""
    margin = (SIDE - 28) // 2
    stored = {}
    for part, prefix in zip(PARTS, ("train", "t10k"), strict=True):
        for what, name in (("pictures", f"{prefix}-images-idx3-ubyte"), ("labels", f"{prefix}-labels-idx1-ubyte")):
            try:
                stored[f"{part}.{what}"] = idx(content[name])
            except ValueError as error:
                raise damaged(folder, source, f"{name} is no IDX file ({error})") from error
        stored[f"{part}.pictures"] = F.pad(stored[f"{part}.pictures"][:, None], (margin,) * 4)
    return stored


def idx(data: bytes) -> Tensor:
    """Return the array of an IDX file of unsigned bytes.

    Raises:
        ValueError: it is none, or is cut off.
    """
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != IDX_BYTES or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"it begins with {data[:4]!r}")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if len(body) != np.prod(shape):
        raise ValueError(f"{len(body)} bytes for an array of {'x'.join(map(str, shape))}")
    return torch.from_numpy(body.reshape(shape).copy())


def cifar_parts(content: dict[str, bytes], folder: Path, source: Source) -> dict[str, Tensor]:
    """Return pictures and labels of the six files of CIFAR-10's binary version."""
    stored = {}
    for part in PARTS:
        names = [n for n in source.files if n.startswith("test") == (part == "test")]
        for name in names:
            if not content[name] or len(content[name]) % RECORD:
                raise damaged(folder, source, f"{name} has {len(content[name])} bytes, no multiple of {RECORD}")
        rows = np.concatenate([np.frombuffer(content[n], np.uint8).reshape(-1, RECORD) for n in names])
        stored[f"{part}.labels"] = torch.from_numpy(rows[:, 0].copy())
        stored[f"{part}.pictures"] = torch.from_numpy(rows[:, 1:].reshape(-1, 3, SIDE, SIDE).copy())
    return stored


def damaged(folder: Path, source: Source, what: str) -> NeedsError:
    """Return the error about a file that is not the published one."""
    return NeedsError(f"{source.title} at {folder} is damaged or not the published one: {what}. {source.obtain}")
