"""What is in a model, and what could be gained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.compression.choose.cost import dense_cost
from tensortrain.compression.choose.load import load_of
from tensortrain.compression.opened import opened_for_a_while
from tensortrain.compression.survey.calibrate import calibrate
from tensortrain.compression.survey.layers import (
    FoundLayer,
    LeftAlone,
    check_finite,
    check_module,
    count_params,
    find_layers,
)
from tensortrain.compression.survey.moments import Calibration

__all__ = ["Inspection", "LayerRow", "inspect"]

_QUANTILES = (0.9, 0.99)


@dataclass(frozen=True)
class LayerRow:
    """One layer: what it is and how fast its singular values fall.

    ``rank_90`` and ``rank_99`` are the ranks that hold 90 and 99 % of the weight's energy (squared Frobenius
    norm); ``gain_99`` is how many times smaller the layer would be as a low-rank one with the latter.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    params: int
    share: float
    flops: int | None
    full_rank: int
    rank_90: int
    rank_99: int
    gain_99: float


@dataclass(frozen=True)
class Inspection:
    """Rows for the layers that can be factorized; prints as a table."""

    rows: tuple[LayerRow, ...]
    left_alone: tuple[LeftAlone, ...]
    params: int

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {
            "params": self.params,
            "layers": [asdict(row) for row in self.rows],
            "left_alone": [asdict(layer) for layer in self.left_alone],
        }

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows] + [5])
        head = (
            f"{'layer':<{width}}  {'kind':<10} {'shape':<20} {'params':>12} {'share':>6} {'flops':>14} "
            f"{'rank':>5} {'90 %':>5} {'99 %':>5} {'gain':>6}"
        )
        lines = [head, "-" * len(head)]
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            flops = "" if row.flops is None else f"{row.flops:,}"
            lines.append(
                f"{row.name:<{width}}  {row.kind:<10} {shape:<20} {row.params:>12,} {row.share:>6.1%} {flops:>14} "
                f"{row.full_rank:>5} {row.rank_90:>5} {row.rank_99:>5} {row.gain_99:>5.1f}x"
            )
        lines.append(f"{self.params:,} parameters, {sum(row.params for row in self.rows):,} in these layers")
        lines += [f"left alone: {layer}" for layer in self.left_alone]
        return "\n".join(lines)


def inspect(model: nn.Module, example_inputs: Any = None) -> Inspection:
    """List the layers of a model that can be factorized, with their spectra in a nutshell.

    Args:
        model: Any module; nothing is changed.
        example_inputs: A batch; with it, flops per example are known.

    Raises:
        NonFiniteError: A weight holds NaN or Inf.

    Cost: one eigenvalue problem of the smaller side per layer, one forward pass.
    """
    check_module(model)
    total = count_params(model)  # with what weights are computed from, which opened layers are without
    with opened_for_a_while(model) as opened:
        found = _inspect(opened.model, total, example_inputs)
    return replace(found, left_alone=opened.left_alone(found.left_alone))


def _inspect(model: nn.Module, total: int, example_inputs: Any) -> Inspection:
    layers, left = find_layers(model)
    calibration = None
    if example_inputs is not None:
        calibration = calibrate(model, layers, [example_inputs], n_batches=1, grams=False)
    rows = tuple(_row(layer, total, calibration) for layer in layers)
    return Inspection(rows, tuple(left), total)


def _row(layer: FoundLayer, total: int, calibration: Calibration | None) -> LayerRow:
    energy = _energies(layer)
    held = energy.cumsum(0)
    ranks = [min(int((held < q * energy.sum()).sum()) + 1, energy.numel()) for q in _QUANTILES]
    weight = layer.weight
    sides = weight.out_features // weight.groups + weight.fan_in if weight.kind == "conv" else sum(weight.dense_shape)
    low_rank = weight.groups * ranks[1] * sides
    return LayerRow(
        name=layer.name,
        kind=layer.kind,
        shape=weight.dense_shape,
        params=layer.n_params,
        share=layer.n_params / max(1, total),
        flops=dense_cost(layer, load_of(layer, calibration, None)).flops if calibration else None,
        full_rank=energy.numel(),
        rank_90=ranks[0],
        rank_99=ranks[1],
        gain_99=weight.n_params / max(1, low_rank),
    )


def _energies(layer: FoundLayer) -> Tensor:
    """Squared singular values of the weight as a matrix (of a grouped kernel: mean over groups), descending."""
    check_finite(layer.name, layer.kernel)
    matrix = layer.kernel.double().flatten(1)
    blocks = torch.stack(matrix.chunk(layer.weight.groups)) if layer.weight.groups > 1 else matrix[None]
    small = blocks.mT @ blocks if blocks.shape[1] >= blocks.shape[2] else blocks @ blocks.mT
    return torch.linalg.eigvalsh(small).mean(dim=0).flip(0).clamp_min(0)
