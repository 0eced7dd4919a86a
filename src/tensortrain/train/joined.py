"""One training of several processes: the same numbers at the start, the mean of the gradients at every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tensortrain.system.processes import gathered, n_processes, own_rank, sum_

__all__ = ["mean_buffers_", "mean_gradients_", "same_numbers_"]


@torch.no_grad()
def same_numbers_(model: nn.Module) -> None:
    """Give a model the numbers that the first process's has."""
    if n_processes() == 1:
        return
    for tensor in (*model.parameters(), *model.buffers()):
        first = tensor.detach().clone() if own_rank() == 0 else torch.zeros_like(tensor)
        tensor.copy_(_summed(first))


@torch.no_grad()
def mean_buffers_(model: nn.Module) -> None:
    """Give the buffers of a model, such as the statistics of batch norms, their mean over the processes."""
    n = n_processes()
    for buffer in model.buffers():
        if n > 1 and buffer.is_floating_point():
            buffer.copy_(_summed(buffer.detach().clone()) / n)


@torch.no_grad()
def mean_gradients_(params: Sequence[Tensor], *, counts: bool) -> None:
    """The mean of gradients over those processes where they count.

    Raises:
        ProcessError: Another process has failed; the gradients stay what they were.
    """
    if n_processes() == 1:
        return
    n = max(1, sum(gathered(counts)))
    own = [_own_gradient(parameter, counts).contiguous() for parameter in params]
    sum_(own)
    for parameter, total in zip(params, own, strict=True):
        parameter.grad = total / n


def _own_gradient(parameter: Tensor, counts: bool) -> Tensor:
    return parameter.grad if counts and parameter.grad is not None else torch.zeros_like(parameter)


def _summed(tensor: Tensor) -> Tensor:
    total = tensor.contiguous()
    sum_([total])
    return total
