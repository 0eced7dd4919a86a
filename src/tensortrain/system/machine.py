"""What is known of this machine from one process to the next: small JSON files, one for each device."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["cache_folder", "device_key", "known_file", "read_json", "write_json"]


def device_key(device: torch.device) -> str:
    """The device, its threads and torch's release, in words: what is measured holds for these."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return f"{device.type}: {hardware}, torch {torch.__version__}"


@cache
def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def known_file(name: str, key: str) -> Path:
    """Where something known of a device is kept, under ``$XDG_CACHE_HOME/tensortrain``."""
    return cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/tensortrain``: what can be found out or made again."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "tensortrain"


def read_json(path: Path) -> Any:
    """What lies there; ``None`` where nothing can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None


def write_json(path: Path, data: Any) -> None:
    """Replace a file, whole or not at all. One that cannot be written costs a measurement at the next start."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(json.dumps(data, indent=1))
                file.flush()
                os.fsync(file.fileno())  # else a crash of the machine may leave the new name with nothing behind it
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
    except OSError:
        pass
