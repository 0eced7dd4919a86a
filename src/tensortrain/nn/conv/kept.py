"""Convolutions of compiled programs at inference: by the dense kernel, kept from call to call as eager layers keep it.

A compiled program has no place for what lies between its calls, so that it would merge the cores in each of them. One
operation of the kernels does: it is given the cores, and merges them where they have changed since the last call.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tensortrain.formats import FactorSpec, get_format
from tensortrain.nn.conv.layout import in_torchs_layout, swap_channels
from tensortrain.nn.conv.options import ConvOptions
from tensortrain.nn.keeping import EndsWithCore, makes_known
from tensortrain.system.native.load import loaded

__all__ = ["convolve_by_kept_kernel", "forget_kept_kernel", "kept_kernel_bytes"]


@makes_known
def _make_known(kernels: Any) -> None:
    kernels.know_kernel_builder(_built)
    torch.library.register_fake("tensortrain::convolve_by_kept_kernel", _shape_alone)


def convolve_by_kept_kernel(
    x: Tensor, bias: Tensor | None, cores: Sequence[Tensor], options: ConvOptions, groups: int, told: str
) -> Tensor:
    """Convolve without gradients. The output has the layout that torch's convolution gives.

    Args:
        told: The spec, as text.
    """
    more = options.output_padding
    numbers = list(options.stride), list(options.padding), list(options.dilation)
    y: Tensor = torch.ops.tensortrain.convolve_by_kept_kernel(
        x, bias, list(cores), *numbers, more is not None, list(more or (0,) * options.n_axes), groups, told
    )
    return y  # typed


def forget_kept_kernel(cores: Sequence[Tensor]) -> None:
    """Let go of the kernel that was kept of these cores."""
    _ENDS.forget(cores)


def kept_kernel_bytes(cores: Sequence[Tensor]) -> int:
    """Bytes of the kernel that is kept of these cores."""
    kernels = loaded()
    found: int = kernels.kept_kernel_bytes(list(cores)) if kernels is not None and _ENDS else 0
    return found


def _built(told: str, is_transposed: bool, cores: Sequence[Tensor]) -> Tensor:
    """The kernel that cores make; it goes with the first of them."""
    forget_kept_kernel(cores)
    _ENDS.begin(cores[0])
    spec = FactorSpec.from_dict(json.loads(told))
    with torch.inference_mode(False), torch.no_grad():
        weight = get_format(spec.format).to_dense(list(cores), spec)
        return in_torchs_layout(swap_channels(weight, spec.weight.groups) if is_transposed else weight)


def _end(address: int) -> None:
    kernels = loaded()
    if kernels is not None:
        kernels.forget_kept_kernel(address)


_ENDS = EndsWithCore(_end)


def _shape_alone(
    x: Tensor,
    bias: Tensor | None,
    cores: Sequence[Tensor],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    is_transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    told: str,
) -> Tensor:
    weight = FactorSpec.from_dict(json.loads(told)).weight
    sides = weight.out_features, weight.in_features
    if is_transposed:
        sides = weight.in_features * groups, weight.out_features // groups
    kernel = x.new_empty((*sides, *weight.kernel))
    return torch.ops.aten.convolution(x, kernel, bias, stride, padding, dilation, is_transposed, output_padding, groups)
