"""Seeding torch at no cost."""

from __future__ import annotations

import functools

import torch

__all__ = ["seed_all"]


def seed_all(seed: int) -> None:
    """``torch.manual_seed``, without its cost where there is only a CPU.

    It keeps the seed for devices that may be found later, and the stack of its caller with it: milliseconds each time.
    """
    if _has_devices():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@functools.cache
def _has_devices() -> bool:
    return torch.accelerator.is_available()
