"""How dense kernels lie in memory, of direct convolutions and of transposed ones."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["in_torchs_layout", "swap_channels"]


def in_torchs_layout(weight: Tensor) -> Tensor:
    """A kernel with the strides that torch's own have, differentiably.

    Along an axis of size 1 every stride is contiguous. But a kernel of a single position, or of a single channel, with
    the strides of a channels-last one is taken for that: the input is copied, and the output comes channels last.
    """
    weight = weight.contiguous()
    is_ambiguous = weight.shape[1] == 1 or math.prod(weight.shape[2:]) == 1
    return weight.flatten().view(weight.shape) if is_ambiguous else weight


def swap_channels(weight: Tensor, groups: int = 1) -> Tensor:
    """Exchange the two channel axes of a kernel, group by group.

    Args:
        weight: ``(S, C / groups, *kernel)`` or ``(C, S / groups, *kernel)``.

    Returns:
        Tensor: The one from the other; a view where there is one group.

    Example:
        >>> swap_channels(torch.zeros(6, 2, 3, 3), groups=2).shape
        torch.Size([4, 3, 3, 3])
    """
    if groups == 1:
        return weight.transpose(0, 1)
    blocks = weight.unflatten(0, (groups, -1))  # g s c *kernel
    return blocks.transpose(1, 2).flatten(0, 1)
