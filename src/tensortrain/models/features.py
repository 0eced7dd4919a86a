r"""Maps from a number to a short vector, by which a train meets data.

=============  =======================================  ====
name           vector of x in [0, 1]                    size
=============  =======================================  ====
``"trig"``     cos(pi x / 2), sin(pi x / 2)             2
``"linear"``   1 - x, x                                 2
``"poly"``     1, x                                     2
``"fourier"``  1, cos(j pi x), sin(j pi x), j = 1, 2    5
``"one-hot"``  (1, 0) for x = 0 and (0, 1) for x = 1    2
=============  =======================================  ====
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from tensortrain.errors import DataError, ShapeError
from tensortrain.models.checks import check_choice, check_finite
from tensortrain.system.tracing import can_look

_PANELS, _NODES = 32, 8  # of a mean over [0, 1]: exact to rounding for smooth maps

__all__ = ["FEATURE_MAPS", "FeatureMap", "constant_of"]


def _trig(x: Tensor) -> Tensor:
    angle = x * (math.pi / 2)
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def _linear(x: Tensor) -> Tensor:
    return torch.stack((1 - x, x), dim=-1)


def _poly(x: Tensor) -> Tensor:
    return torch.stack((torch.ones_like(x), x), dim=-1)


def _fourier(x: Tensor) -> Tensor:
    angles = [j * math.pi * x for j in (1, 2)]
    waves = [wave for angle in angles for wave in (angle.cos(), angle.sin())]
    return torch.stack((torch.ones_like(x), *waves), dim=-1)


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "trig": _trig,
    "linear": _linear,
    "poly": _poly,
    "fourier": _fourier,
    "one-hot": _linear,
}


class FeatureMap(nn.Module):
    """One of the named maps, or a module ``(b, n) -> (b, n, m)``; gives ``(n, b, m)``, one site after the other.

    Args:
        kind: A name of ``FEATURE_MAPS``, or the module.

    Attributes:
        size: ``m``.
    """

    def __init__(self, kind: str | nn.Module) -> None:
        super().__init__()
        if not isinstance(kind, nn.Module):
            check_choice(kind, tuple(FEATURE_MAPS), "feature_map")
        self.kind = kind if isinstance(kind, str) else "module"
        self.module = kind if isinstance(kind, nn.Module) else None
        self.size = self._size()

    def forward(self, x: Tensor) -> Tensor:
        """Vectors ``(n, b, m)`` of numbers ``(b, n)``."""
        if self.module is not None:
            return self.module(x).transpose(0, 1).contiguous()
        return FEATURE_MAPS[self.kind](x.T.contiguous())  # the last axis is added: contiguous site by site

    def check(self, x: Tensor) -> None:
        """Refuse numbers that the map is not made for.

        Raises:
            DataError: Some are not finite, or outside [0, 1].
        """
        if not can_look(x) or x.numel() == 0:
            return
        check_finite(x)
        if self.module is not None:
            return
        low, high = (float(v) for v in torch.aminmax(x))
        if low < 0 or high > 1:
            raise DataError(
                f"features must lie in [0, 1]: x has numbers from {low:.4g} to {high:.4g}. Scale them, such as "
                "(x - x.min()) / (x.max() - x.min()), or pass a module as feature_map."
            )
        if self.kind == "one-hot" and not bool(((x == 0) | (x == 1)).all()):
            raise DataError("features of a one-hot map must be 0 or 1: x has others. Round them, or take 'linear'.")

    def mean(self) -> Tensor:
        """The mean vector ``(m,)`` over [0, 1], of bits over 0 and 1; a module may have a ``mean()`` of its own."""
        if self.kind == "one-hot":
            return torch.full((2,), 0.5)
        own = getattr(self.module, "mean", None)
        if callable(own):
            found: Tensor = own()
            return found
        nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(_NODES))
        panels = torch.arange(_PANELS, dtype=torch.float64)[:, None]
        points = ((panels + (nodes + 1) / 2) / _PANELS).reshape(-1, 1)
        weights = weights.repeat(_PANELS) / (2 * _PANELS)
        if self.module is not None:
            example = next(iter(self.module.parameters()), points)
            points, weights = points.to(example.device, example.dtype), weights.to(example.device)
        vectors = self(points)[0]
        return weights.to(vectors.dtype) @ vectors

    def _size(self) -> int:
        if self.module is None:
            return int(FEATURE_MAPS[self.kind](torch.zeros(1, 1)).shape[-1])
        with torch.no_grad():
            example = next(iter(self.module.parameters()), torch.zeros(()))
            found = self.module(torch.zeros(1, 1, dtype=example.dtype, device=example.device))
        if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[:2] != (1, 1):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ShapeError(
                f"a feature map must take (b, n) to (b, n, m): the module gave {shape} for (1, 1). Add an axis "
                "at the end."
            )
        return int(found.shape[-1])


def constant_of(features: FeatureMap, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """Coefficients ``(m,)`` of the combination of features that is nearest to 1 on [0, 1].

    A train whose slices are these times the identity leaves a state as it is, whatever the data.
    """
    grid = torch.linspace(0, 1, 65)[None]
    if features.module is not None:
        example = next(iter(features.module.parameters()), grid)
        grid = grid.to(example.device, example.dtype)
    with torch.no_grad():
        values = features(grid)[:, 0].double().cpu()  # 65 m
    found = torch.linalg.lstsq(values, torch.ones(65, 1, dtype=torch.float64), driver="gelsd").solution[:, 0]
    return found.to(dtype).to(device)
