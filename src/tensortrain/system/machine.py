"""The machine, and what was measured on it: small JSON files, one for each device, which later processes read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tensortrain.system.files import write_text_atomic

try:
    import resource
except ImportError:  # as on Windows
    resource = None  # type: ignore[assignment]

__all__ = ["Watch", "cache_folder", "cpu_name", "device_key", "known_file", "memory_bytes", "read_json", "write_json"]


def device_key(device: torch.device) -> str:
    """The device, its threads and torch's release, in words: what is measured holds for these."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return f"{device.type}: {hardware}, torch {torch.__version__}"


@cache
def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def memory_bytes() -> int:
    """Memory of the machine, or of the part of it that this process may use; 1 GiB where the system does not tell."""
    found = []
    with contextlib.suppress(AttributeError, ValueError, OSError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        with contextlib.suppress(ValueError, OSError):
            found.append(int(Path("/sys/fs/cgroup", limit).read_text()))
    return min((size for size in found if size > 0), default=2**30)


class Watch:
    """Tells whether other programs took the processor from this process since the watch was made.

    Example:
        >>> watch = Watch()
        >>> watch.is_alone()
        True
    """

    def __init__(self) -> None:
        self._began, self._before = time.perf_counter(), _times_interrupted()
        self._used_before = _seconds_used()

    def is_alone(self) -> bool:
        """Whether this process has had its processors to itself so far."""
        seconds = time.perf_counter() - self._began
        # An idle machine interrupts a few times a second for its own sake.
        if _times_interrupted() - self._before > 10 + _USUAL_PER_S * seconds:
            return False
        # Who waits for others at a barrier is not interrupted.
        return seconds < _FEWEST_S or self._others(seconds) < _OTHERS_AT_MOST

    def _others(self, seconds: float) -> float:
        """Processors that others kept from this process's threads, on average; 0 where the system does not tell."""
        if not self._used_before or not (now := _seconds_used()):
            return 0.0
        by_all, by_this = (after - before for after, before in zip(now, self._used_before, strict=True))
        theirs = (by_all - by_this) / seconds
        return theirs if theirs + torch.get_num_threads() > (os.cpu_count() or 1) else 0.0


_USUAL_PER_S = 25
_FEWEST_S = 0.5  # the system counts hundredths of a second
_OTHERS_AT_MOST = 0.15


def _times_interrupted() -> int:
    """How often the system has taken the processor from this process; 0 where it does not count."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _seconds_used() -> tuple[float, float] | None:
    """Seconds that the processors have worked so far, for everybody and for this process; where Linux tells."""
    try:
        with open("/proc/stat", encoding="ascii") as stat:
            user, nice, system, _idle, _waiting, *rest = (int(word) for word in stat.readline().split()[1:9])
        ticks = user + nice + system + sum(rest)  # interrupts, and what the host took away
        return ticks / os.sysconf("SC_CLK_TCK"), time.process_time()
    except (OSError, ValueError, AttributeError):
        return None


def known_file(name: str, key: str) -> Path:
    """Where something known of a device is kept, under ``$XDG_CACHE_HOME/tensortrain``."""
    return cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def cache_folder(name: str = "") -> Path:
    """``$XDG_CACHE_HOME/tensortrain``, or a folder in it: what can be found out or made again."""
    # Unlike Path.home(), expanduser does not fail for a user without a home.
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "tensortrain" / name


def read_json(path: Path) -> Any:
    """What lies there; ``None`` where nothing can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None


def write_json(path: Path, data: Any) -> None:
    """Replace a file, whole or not at all. One that cannot be written costs a measurement at the next start."""
    with contextlib.suppress(OSError):
        write_text_atomic(path, json.dumps(data))
