"""One training of several processes: the same numbers at the start, the mean of the gradients at every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tensortrain.system.processes import gathered, n_processes, own_rank, summed_

__all__ = ["mean_buffers_", "mean_gradients_", "same_numbers_"]


@torch.no_grad()
def same_numbers_(model: nn.Module) -> None:
    """Give a model the numbers that the first process's has."""
    if n_processes() == 1:
        return
    for tensor in (*model.parameters(), *model.buffers()):
        first = tensor.detach().clone() if own_rank() == 0 else torch.zeros_like(tensor)
        tensor.copy_(summed_(first.contiguous()))


@torch.no_grad()
def mean_buffers_(model: nn.Module) -> None:
    """Give the buffers of a model, such as the statistics of batch norms, their mean over the processes."""
    n = n_processes()
    for buffer in model.buffers():
        if n > 1 and buffer.is_floating_point():
            buffer.copy_(summed_(buffer.detach().clone().contiguous()) / n)


@torch.no_grad()
def mean_gradients_(params: Sequence[Tensor], *, counts: bool) -> None:
    """The mean of gradients over those processes where they count."""
    if n_processes() == 1:
        return
    n = max(1, sum(gathered(counts)))
    for parameter in params:
        own = parameter.grad if counts and parameter.grad is not None else torch.zeros_like(parameter)
        parameter.grad = summed_(own.contiguous()) / n
