"""Trains as parameters of modules, and where to find them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from tensortrain.tensor import TensorTrain, TTMatrix
from tensortrain.tensor.base import CoreChain, checked_chain

__all__ = ["TTParameter", "as_train", "is_train", "trains_of"]


class TTParameter(nn.Module):
    """A TensorTrain or TTMatrix whose cores are parameters.

    Args:
        train: Starting value; its cores are copied.

    Attributes:
        cores: The parameters, shaped as the cores of ``train``.

    Example:
        >>> import tensortrain as tt
        >>> w = tt.manifold.TTParameter(tt.randn((4, 5, 6), 2))
        >>> w.value.shape, len(list(w.parameters()))
        ((4, 5, 6), 3)
    """

    def __init__(self, train: TensorTrain | TTMatrix) -> None:
        super().__init__()
        checked_chain("a TTParameter", train, "train")
        self.cores = nn.ParameterList(nn.Parameter(core.detach().clone()) for core in train.cores)

    @property
    def value(self) -> Any:
        """The train of the present cores, connected to them for autograd."""
        return as_train(list(self.cores))

    def forward(self) -> Any:
        """The same as ``value``."""
        return self.value

    def extra_repr(self) -> str:
        return repr(self.value)


def as_train(cores: Sequence[Tensor]) -> CoreChain:
    """Cores of order 3 as a TensorTrain, of order 4 as a TTMatrix."""
    return (TensorTrain if cores[0].ndim == 3 else TTMatrix)(tuple(cores))


def is_train(cores: Sequence[Any]) -> bool:
    """Whether parameters are the cores of one train: all ``(r, n, s)`` or all ``(r, i, j, s)``, matching ranks."""
    if not cores or not all(isinstance(core, nn.Parameter) for core in cores):
        return False
    if cores[0].ndim not in (3, 4) or any(core.ndim != cores[0].ndim for core in cores):
        return False
    ranks = [1, *(core.shape[-1] for core in cores)]
    return ranks[-1] == 1 and all(core.shape[0] == r for core, r in zip(cores, ranks, strict=False))


def trains_of(module: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The cores of every module that keeps a train in a ``ParameterList`` named ``cores``, or is such a list."""
    lists = [module, *(getattr(part, "cores", None) for part in module.modules())]
    for cores in lists:
        if isinstance(cores, nn.ParameterList) and is_train(list(cores)):
            yield list(cores)
