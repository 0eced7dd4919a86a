"""Float32 copies of low-precision weights to train: their small steps would be lost in 8 or 11 bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["float32_masters"]

_LOW = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def float32_masters(model: nn.Module) -> Iterator[torch.dtype | None]:
    """Hold trainable half and bfloat16 parameters as float32, in place, and cast them back at the end.

    Parameters stay the same objects, and those that share memory go on sharing it. Buffers beside them, such as
    running statistics, go along.

    Yields:
        dtype to run autocast in; None where nothing was changed.
    """
    found = _low_tensors(model)
    kept = [(tensor, tensor.dtype) for tensor in found]
    _cast([(tensor, torch.float32) for tensor in found])
    try:
        yield kept[0][1] if kept else None
    finally:
        _cast(kept)


def _low_tensors(model: nn.Module) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    for module in model.modules():
        own = [p for p in module._parameters.values() if p is not None and p.dtype in _LOW and p.requires_grad]
        if own:
            own += [b for b in module._buffers.values() if b is not None and b.dtype in _LOW]  # type: ignore[misc]
        found |= {id(tensor): tensor for tensor in own}
    return list(found.values())


def _cast(wanted: list[tuple[Tensor, torch.dtype]]) -> None:
    done: dict[tuple[object, ...], Tensor] = {}
    for tensor, dtype in wanted:
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if key not in done or not tensor.numel():
            done[key] = tensor.data.to(dtype)
        tensor.data = done[key]
