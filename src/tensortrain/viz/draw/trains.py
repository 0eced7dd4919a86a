"""Diagrams of trains."""

from __future__ import annotations

from tensortrain.tensor import TensorTrain, TTMatrix
from tensortrain.viz.draw.layout import chain
from tensortrain.viz.draw.notation import Diagram, sizes_text

__all__ = ["train_diagram"]


def train_diagram(x: TensorTrain | TTMatrix, name: str = "") -> Diagram:
    """A train with its modes down, a matrix with rows up and columns down; orthonormal cores point to the center."""
    if isinstance(x, TTMatrix):
        drawn = chain(x.ranks, up=x.out_modes, down=x.in_modes, shapes=_shapes(x))
        sizes = f"{sizes_text(x.out_modes)} × {sizes_text(x.in_modes)}"
    else:
        drawn = chain(x.ranks, down=x.shape, shapes=_shapes(x))
        sizes = sizes_text(x.shape)
    batch = f", a batch of {sizes_text(x.batch_shape)}" if x.batch_shape else ""
    return drawn.named(f"{name or type(x).__name__} {sizes}{batch}, {x.n_params:,} numbers")


def _shapes(x: TensorTrain | TTMatrix) -> list[str]:
    lo, hi = x.center
    shapes = ["left" if k < lo else "right" if k > hi else "core" for k in range(x.order)]
    if lo == hi:
        shapes[lo] = "center"
    return shapes
