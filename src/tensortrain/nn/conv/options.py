"""What torch's convolutions are told besides the kernel, as plain data that can be cut down to some axes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor

__all__ = ["ConvOptions"]

_CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class ConvOptions:
    """Convolves with a kernel in torch's layout.

    Args:
        kernel: Size along every axis.
        stride, padding, dilation, padding_mode: As torch's layers take them, one number for every axis.
        output_padding: Of a transposed convolution; None for a direct one.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str = "zeros"
    output_padding: tuple[int, ...] | None = None

    @property
    def n_axes(self) -> int:
        """How many axes there are."""
        return len(self.kernel)

    @property
    def is_transposed(self) -> bool:
        """Whether outputs are spread from inputs."""
        return self.output_padding is not None

    @property
    def is_torchs_own(self) -> bool:
        """Whether it is one plain convolution of torch's, of an input that is not padded before."""
        return self.padding_mode == "zeros" and isinstance(self.padding, tuple)

    @property
    def function(self) -> Any:
        """torch's function."""
        return (_TRANSPOSED if self.is_transposed else _CONVOLVE)[self.n_axes]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
        """Convolve ``(b, C, *positions)``; a transposed convolution takes kernels ``(C, S / groups, *kernel)``."""
        padding: Any = self.padding
        if self.output_padding is not None:
            convolve = _TRANSPOSED[self.n_axes]
            y: Tensor = convolve(x, weight, bias, self.stride, padding, self.output_padding, groups, self.dilation)
            return y
        if self.padding_mode != "zeros":
            x = F.pad(x, self.pad_widths(), mode=self.padding_mode)
            padding = 0
        y = _CONVOLVE[self.n_axes](x, weight, bias, self.stride, padding, self.dilation, groups)
        return y  # noqa: RET504  # typed

    def pad_widths(self) -> list[int]:
        """Padding per side, last axis first, as ``torch.nn.functional.pad`` wants it."""
        widths: list[int] = []
        for axis in reversed(range(self.n_axes)):
            if isinstance(self.padding, tuple):
                widths += [self.padding[axis]] * 2
            else:
                total = self.dilation[axis] * (self.kernel[axis] - 1) if self.padding == "same" else 0
                widths += [total // 2, total - total // 2]
        return widths

    def along(self, axes: tuple[int, ...]) -> ConvOptions:
        """The part of it along some axes: along the others, nothing happens."""
        return self if axes == tuple(range(self.n_axes)) else _along(self, axes)

    def is_still(self, axis: int) -> bool:
        """Whether nothing but a product of channels happens along an axis."""
        padding = self.padding[axis] if isinstance(self.padding, tuple) else 0
        more = self.output_padding[axis] if self.output_padding is not None else 0
        return self.kernel[axis] == self.stride[axis] == 1 and padding == more == 0

    def as_plane(self) -> ConvOptions:
        """Those of the same convolution along the second of two axes, from one along a single axis."""
        padding = (0, *self.padding) if isinstance(self.padding, tuple) else self.padding
        more = None if self.output_padding is None else (0, *self.output_padding)
        return ConvOptions((1, *self.kernel), (1, *self.stride), padding, (1, *self.dilation), self.padding_mode, more)


@lru_cache(maxsize=1024)
def _along(options: ConvOptions, axes: tuple[int, ...]) -> ConvOptions:
    def part(values: tuple[int, ...], neutral: int) -> tuple[int, ...]:
        return tuple(value if axis in axes else neutral for axis, value in enumerate(values))

    padding, more = options.padding, options.output_padding
    return replace(
        options,
        kernel=part(options.kernel, 1),
        stride=part(options.stride, 1),
        padding=part(padding, 0) if isinstance(padding, tuple) else padding,
        dilation=part(options.dilation, 1),
        output_padding=None if more is None else part(more, 0),
    )
