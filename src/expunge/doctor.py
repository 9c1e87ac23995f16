"""What this machine and this installation have, and what they lack."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import __version__
from .storage import cache_root

PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "torchmetrics", "pydantic", "typer", "jinja2")


def examine() -> dict[str, Any]:
    """Return versions, devices, memory, disk, cache, shipped weights and missing extras, as plain data."""
    folder = cache_root()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    return {
        "expunge": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cores": os.cpu_count(),
        "memory_gb": _memory(),
        "devices": _devices(),
        "disk_free_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "cache": {
            "path": str(folder),
            "used_mb": round(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6, 1),
            "disk_free_gb": round(shutil.disk_usage(there).free / 1e9, 1),
        },
        "weights": weights(),
        "missing_extras": _missing(),
    }


def weights() -> dict[str, dict[str, str]]:
    """Return the SHA-256 of every shipped weight file, by world."""
    found: dict[str, dict[str, str]] = {}
    zoo = Path(__file__).parent / "zoo"
    for file in sorted(zoo.glob("*/**/*.safetensors")):
        world, *rest = file.relative_to(zoo).parts
        found.setdefault(world, {})["/".join(rest)] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """Return the examination as lines to read."""
    lacking = [n for n, v in found["packages"].items() if v is None]
    extras = [f"[{extra}] lacks {', '.join(names)}" for extra, names in found["missing_extras"].items()]
    shipped = [f"{w}/{f}  sha256 {h[:16]}" for w, files in found["weights"].items() for f, h in files.items()]
    return [
        f"expunge {found['expunge']}, Python {found['python']}, {found['platform']}",
        "packages: " + ", ".join(f"{n} {v}" for n, v in found["packages"].items() if v),
        *([f"missing:  {', '.join(lacking)}: install expunge again"] if lacking else []),
        f"machine:  {found['cores']} cores, {found['memory_gb']} GB memory, {found['disk_free_gb']} GB disk free here",
        f"devices:  {', '.join(found['devices']) or 'none: torch is missing'}",
        f"cache:    {found['cache']['path']}, {found['cache']['used_mb']} MB used",
        "weights:  " + ("\n          ".join(shipped) or "none: `expunge demo` will not run; install expunge again"),
        "extras:   " + ("; ".join(extras) or "all installed"),
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory() -> float | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)


def _devices() -> list[str]:
    if find_spec("torch") is None:
        return []
    import torch  # noqa: PLC0415 (may be missing, and is slow to import)

    cards = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return ["cpu", *cards, *(["mps"] if torch.backends.mps.is_available() else [])]


def _missing() -> dict[str, list[str]]:
    """Return extra -> packages of it that are not installed, as the installed package declares them."""
    try:
        declared = requires("expunge") or []
    except PackageNotFoundError:
        return {}
    missing: dict[str, list[str]] = {}
    for line in declared:
        name, _, marker = line.partition(";")
        if "extra ==" not in marker:
            continue
        extra = marker.split("extra ==")[1].strip(" '\")")
        package = name.split("[")[0].rstrip(" <>=!~.0123456789,()") or name
        if _version(package) is None and package != "expunge":
            missing.setdefault(extra, []).append(package)
    return missing
