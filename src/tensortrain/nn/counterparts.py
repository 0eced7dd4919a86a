"""Which factorized layer stands for a dense one: torch's own kinds, and those of libraries that are in use already."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.errors import KindError
from tensortrain.formats import WeightShape
from tensortrain.nn.conv.layers import Conv1d, Conv2d, Conv3d
from tensortrain.nn.conv.transpose import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from tensortrain.nn.embedding.bag import EmbeddingBag
from tensortrain.nn.embedding.layers import Embedding

from .base import FactorizedLayer, _copy_bias
from .linear import Linear

__all__ = ["COUNTERPARTS", "counterpart", "counterpart_of_class", "dense_twin", "is_transformers_conv1d"]

# The torch layers that have a factorized twin. Exact types only: a subclass may have a forward of its own.
COUNTERPARTS: dict[type[nn.Module], type[FactorizedLayer]] = {
    nn.Linear: Linear,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.ConvTranspose1d: ConvTranspose1d,
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.ConvTranspose3d: ConvTranspose3d,
    nn.Embedding: Embedding,
    nn.EmbeddingBag: EmbeddingBag,
}


def counterpart(layer: object) -> type[FactorizedLayer] | None:
    """The class that reads a dense layer and builds its factorized twin; ``None`` for other kinds."""
    return counterpart_of_class(type(layer))


def counterpart_of_class(kind: type) -> type[FactorizedLayer] | None:
    """The same for layers of a class."""
    return LinearFromConv1D if kind is _transformers_conv1d() else COUNTERPARTS.get(kind)


def is_transformers_conv1d(layer: object) -> bool:
    """Whether a layer is the ``Conv1D`` of transformers, as in GPT-2: a linear layer with the weight ``(in, out)``."""
    return type(layer) is _transformers_conv1d()


def dense_twin(layer: FactorizedLayer) -> Any:
    """The dense layer of a factorized one: of the kind that it was made from, where it knows it; else torch's."""
    if isinstance(layer, Linear) and layer.made_from == "Conv1D" and _transformers_conv1d() is not None:
        return LinearFromConv1D.back(layer)
    return layer.to_dense()


def _transformers_conv1d() -> Any:
    """The class, where transformers is imported; to import it for this takes longer than torch."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


class LinearFromConv1D(Linear):
    """Reads the ``Conv1D`` of transformers; what it builds are plain ``Linear`` layers."""

    @classmethod
    def weight_shape_of(cls, layer: Any) -> WeightShape:
        return WeightShape("linear", layer.nf, layer.nx)

    @classmethod
    def kernel_of(cls, layer: Any) -> Tensor:
        weight: Tensor = layer.weight
        return weight.detach().T

    @classmethod
    def arguments_of(cls, layer: Any) -> dict[str, Any]:
        return {"in_features": layer.nx, "out_features": layer.nf, "bias": True}

    @classmethod
    def _made(cls, **arguments: Any) -> Linear:  # type: ignore[override]
        layer = Linear(**arguments)
        layer.made_from = "Conv1D"
        return layer

    @classmethod
    def back(cls, layer: Linear) -> Any:
        """The ``Conv1D`` with the weight of a factorized layer that was made from one."""
        core = layer.cores[0]
        dense = _transformers_conv1d()(layer.out_features, layer.in_features).to(device=core.device, dtype=core.dtype)
        with torch.no_grad():
            dense.weight.copy_(layer.weight.T)
        dense.weight.requires_grad_(core.requires_grad)
        _copy_bias(layer, dense)
        return dense.train(layer.training)

    @classmethod
    def _check_dense_type(cls, dense: object) -> None:
        if not is_transformers_conv1d(dense):
            raise KindError(
                f"this reads a Conv1D of transformers: found {type(dense).__name__}. Use Linear.from_dense for a "
                "torch.nn.Linear."
            )
