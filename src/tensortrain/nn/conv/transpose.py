"""Transposed convolutions with a factorized kernel.

The kernel that is factorized has the layout of a convolution, ``(S, C / groups, *kernel)``, so that formats,
modes and ranks mean the same for both. torch stores the weight of a transposed convolution the other way
round, ``(C, S / groups, *kernel)``: ``swap_channels`` leads from one to the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from tensortrain.contract import ChainShape
from tensortrain.errors import ShapeError
from tensortrain.formats import FactorSpec, Rank
from tensortrain.nn.base import Implementation, Init, as_tuple
from tensortrain.nn.conv.layers import ConvLayer, Convolve, Size
from tensortrain.nn.conv.layout import in_torchs_layout, swap_channels
from tensortrain.nn.conv.options import ConvOptions
from tensortrain.nn.conv.plan import transposed_out_size
from tensortrain.nn.inputs import once, traceable
from tensortrain.nn.runner import Runner
from tensortrain.system.tracing import sizes_of

__all__ = ["ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "swap_channels"]


class _ConvTransposeNd(ConvLayer):
    torch_arguments = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "output_padding",
        "groups",
        "dilation",
        "padding_mode",
    )
    padding: tuple[int, ...]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        *,
        format: str = "tt",
        rank: Rank = 8,
        in_modes: Sequence[int] | None = None,
        out_modes: Sequence[int] | None = None,
        init: Init = "match",
        implementation: Implementation = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        n = self.n_axes
        if padding_mode != "zeros":
            raise ShapeError(
                f"a transposed convolution pads with zeros alone: found padding_mode={padding_mode!r}. Leave it out."
            )
        self.padding_mode = padding_mode
        self.padding = as_tuple(padding, n, "padding", least=0)
        self.output_padding = as_tuple(output_padding, n, "output_padding", least=0)
        _check_output_padding(self.output_padding, as_tuple(stride, n, "stride"), as_tuple(dilation, n, "dilation"))
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            dilation,
            groups,
            bias,
            format=format,
            rank=rank,
            in_modes=in_modes,
            out_modes=out_modes,
            init=init,
            implementation=implementation,
            device=device,
            dtype=dtype,
        )

    # -- parameters, to and from torch ---------------------------------------------------------------

    @property
    def _torch_fan_in(self) -> int:
        """What torch's initialisation takes for the fan-in, reading the weight as that of a convolution."""
        return self.out_channels // self.groups * math.prod(self.kernel_size)

    def _matching_sigma(self) -> float:
        return 1 / math.sqrt(3 * self._torch_fan_in)

    def reset_parameters(self, init: Init = "match", generator: torch.Generator | None = None) -> None:
        super().reset_parameters(init, generator)
        if self.bias is not None and not self.bias.is_meta:
            bound = 1 / math.sqrt(self._torch_fan_in)
            with torch.no_grad():
                self.bias.uniform_(-bound, bound, generator=generator)

    @classmethod
    def kernel_of(cls, layer: Any) -> Tensor:
        return swap_channels(super().kernel_of(layer), layer.groups)

    def dense_from(self, cores: Sequence[Tensor]) -> Tensor:
        return in_torchs_layout(swap_channels(self.format.to_dense(cores, self.spec), self.groups))

    # -- how it runs ---------------------------------------------------------------------------------

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        if output_size is None and not is_dynamo_compiling():
            way = self.runner.way
            y = None if way is None else way(self, input)
            if y is not None:
                return y
        return self._forward(input, output_size)

    @traceable
    @once
    def _forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        more = None if output_size is None else self._padding_for(input, output_size)
        return self._run(input, more)

    def conv_options(self, output_padding: tuple[int, ...] | None = None) -> ConvOptions:
        more = self.output_padding if output_padding is None else output_padding
        return ConvOptions(self.kernel_size, self.stride, self.padding, self.dilation, "zeros", more)

    def _padding_for(self, x: Tensor, output_size: Sequence[int]) -> tuple[int, ...]:
        """Output padding that gives this output size, with or without batch and channels in front."""
        self._check_input(x)
        n, sizes = self.n_axes, tuple(output_size)
        if len(sizes) not in (n, x.ndim):
            raise ShapeError(
                f"output_size must have a size per position axis, or per axis of the output: found {sizes} for an "
                f"input of {x.ndim} axes, expected {n} or {x.ndim} sizes. Pass the sizes of the positions."
            )
        positions = sizes_of(x)[-n:]
        least = self._positions(positions, (0,) * n)
        more = tuple(size - low for size, low in zip(sizes[-n:], least, strict=True))
        if not all(0 <= extra < stride for extra, stride in zip(more, self.stride, strict=True)):
            most = tuple(low + stride - 1 for low, stride in zip(least, self.stride, strict=True))
            raise ShapeError(
                f"output_size must be one that this layer can give: found {sizes[-n:]}, expected {least} to {most} for "
                f"positions {positions}. Choose a size in between."
            )
        return more

    def _positions(self, spatial: Sequence[int], output_padding: tuple[int, ...]) -> tuple[int, ...]:
        axes = zip(spatial, self.kernel_size, self.stride, self.padding, self.dilation, output_padding, strict=True)
        return tuple(transposed_out_size(*axis) for axis in axes)

    def _out_spatial(self, spatial: Sequence[int]) -> tuple[int, ...]:
        return tuple(max(0, size) for size in self._positions(spatial, self.output_padding))

    # A chain runs over the channels at the input positions, of which there are fewer by the strides, and makes
    # r_0 maps per output channel; one transposed filter per map adds them up.

    @property
    def _n_filters(self) -> int | None:
        return self.format.n_filters(self._group_spec)

    def _make_runner(self) -> Runner:
        chain, r0 = self.format.channel_chain(self._group_spec), self._n_filters
        if chain is None or r0 is None:
            return Runner(chain)
        outs, ins = chain.out_modes, chain.in_modes
        return Runner(ChainShape((r0 * outs[0], *outs[1:]), (ins[0] // r0, *ins[1:]), chain.ranks))

    def _chain_rows(self, batch: int, spatial: tuple[int, ...]) -> int:
        if self._n_filters is None:
            return super()._chain_rows(batch, spatial)
        return max(1, batch * math.prod(spatial))

    def _work(self, spec: FactorSpec, ins: int, outs: int) -> list[tuple[int, int]]:
        n_filters = self._n_filters
        if n_filters is None:
            return super()._work(spec, ins, outs)  # counts filters at the outputs: too many, by the strides
        maps = spec.weight.out_features * n_filters * ins
        return [(2 * maps * math.prod(self.kernel_size), maps + spec.weight.out_features * outs), (0, 2 * maps)]

    def _convolve_group(self, x: Tensor, cores: list[Tensor], convolve: Convolve) -> Tensor:
        fmt, spec, plan = self.format, self._group_spec, self._channel_plan(x)
        if self._n_filters is None:
            return fmt.convolve(x, cores, spec, _on_convolution_kernels(convolve), plan)
        assert plan is not None
        filters, channel = fmt.split_spatial(cores, spec)
        n_filters = sizes_of(filters)[0]
        channel = [_filters_to_outputs(channel[0], n_filters), *channel[1:]]
        b, positions, outputs = x.shape[0], x.shape[2:], spec.weight.out_features
        y = plan.execute(x.flatten(2).transpose(1, 2), channel)  # b p (r_0 s)
        maps = y.unflatten(2, (n_filters, outputs)).permute(0, 3, 2, 1)  # b s r_0 p
        y = convolve(maps.reshape(b * outputs, n_filters, *positions), filters)
        return y.reshape(b, outputs, *y.shape[2:])

    def _more_repr(self) -> list[str]:
        return [f"output_padding={self.output_padding}"] if max(self.output_padding) > 0 else []


class ConvTranspose1d(_ConvTransposeNd):
    """``torch.nn.ConvTranspose1d`` with a factorized kernel; see ``ConvTranspose2d``."""

    n_axes = 1
    dense_type = nn.ConvTranspose1d


class ConvTranspose2d(_ConvTransposeNd):
    r"""``torch.nn.ConvTranspose2d`` with the kernel as a product of small cores.

    Args:
        in_channels .. padding_mode: As ``torch.nn.ConvTranspose2d``.
        format, rank, in_modes, out_modes: As ``Conv2d``; ``in_modes`` multiply to the input channels of one group.
        implementation: ``"dense"`` rebuilds the kernel and calls torch's transposed convolution, ``"factorized"``
            runs core by core, ``"auto"`` takes what is predicted faster.

    Shapes: input ``(b, C, H, W)`` or ``(C, H, W)``; output as ``torch.nn.ConvTranspose2d``, or of the
    ``output_size`` that ``forward`` is given.

    Raises:
        ShapeError: Options that torch's layer refuses, modes that do not fit.

    Cost: core by core, the channel chain at the input positions and O(H W k S r_0) flops for the filters.
    Source: the kernel of Garipov et al., arXiv:1611.03214, applied by the adjoint of the convolution.

    Example:
        >>> layer = ConvTranspose2d(64, 32, 4, stride=2, padding=1, in_modes=(8, 8), out_modes=(4, 8), rank=8)
        >>> layer(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 32, 16, 16])
    """

    n_axes = 2
    dense_type = nn.ConvTranspose2d


class ConvTranspose3d(_ConvTransposeNd):
    """``torch.nn.ConvTranspose3d`` with a factorized kernel; see ``ConvTranspose2d``."""

    n_axes = 3
    dense_type = nn.ConvTranspose3d


def _on_convolution_kernels(convolve: Convolve) -> Convolve:
    """The same for kernels laid out as those of a convolution."""

    def run(x: Tensor, kernel: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
        return convolve(x, swap_channels(kernel, groups), bias, groups)

    return run


def _filters_to_outputs(first: Tensor, n_filters: int) -> Tensor:
    """The first channel core with the filters as slowest output instead of slowest input index."""
    r, i, _, s = sizes_of(first)
    core = first.reshape(r, i, n_filters, -1, s).transpose(1, 2)
    return core.reshape(r, n_filters * i, -1, s)


def _check_output_padding(more: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> None:
    if not all(m < max(s, d) for m, s, d in zip(more, stride, dilation, strict=True)):
        raise ShapeError(
            f"output_padding must be smaller than stride or dilation: found {more}, expected below "
            f"{tuple(map(max, stride, dilation))}. Pass forward the output_size that is wanted."
        )
