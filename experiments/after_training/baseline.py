"""The rival: input-whitened SVD with equal shares, as SVD-LLM (arXiv:2403.07378) without its later steps.

Every linear map keeps the same share of its parameters. A map W whose inputs have the second moment H = L L^T is cut
to the best rank-r matrix in the norm |D L|: W' = [W L]_r L^{-1}. Convolutions are matrices on their patches.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.compression import count_params
from tensortrain.compression.opened import open_layers
from tensortrain.nn import is_transformers_conv1d

__all__ = ["Rival", "whitened_svd"]

Run = Callable[[nn.Module, Any], Any]
_SMALLEST_SIDE = 16  # a map to fewer outputs stays whole: a head for three classes has no rank to give


@dataclass(frozen=True)
class Rival:
    """A model whose weights are of low rank, written out in full: what it computes counts here, not its speed.

    Attributes:
        model: A copy of the model.
        n_params: What it would hold with every cut map as two factors.
        ranks: Of the maps that were cut, by name.
    """

    model: nn.Module
    n_params: int
    ranks: dict[str, int]


def whitened_svd(
    model: nn.Module,
    data: Iterable[Any],
    limit: int,
    *,
    run: Run,
    n_batches: int = 16,
    whole: Sequence[str] = (),
    tables: bool = False,
    damping: float = 1e-4,
) -> Rival:
    """Cut every linear map to the same share of its parameters, so that the whole model has ``limit`` of them.

    Args:
        run: ``(model, batch)``: how a batch is put through.
        whole: Names of maps that stay as they are.
        tables: Embeddings give their share too, their rows weighed by how often they occur; else they stay whole.
        damping: Added to the second moments, as a share of their mean diagonal.

    Raises:
        ValueError: The budget cannot be met with the rest left whole.
    """
    opened = open_layers(copy.deepcopy(model).eval())  # the maps of recurrent layers stand as linear ones inside
    maps = _maps(opened.model, whole, tables)
    total = count_params(model)
    ranks = _equal_ranks({name: _matrix(layer).shape for name, layer in maps.items()}, total, limit)
    moments = _moments(opened.model, maps, itertools.islice(data, n_batches), run)
    with torch.no_grad():
        for name, layer in maps.items():
            if ranks.get(name) is not None:
                _set_matrix(layer, _cut(_matrix(layer), moments[name], ranks[name], damping, rows=_is_table(layer)))
    return Rival(opened.model, total - sum(_saved(maps[name], rank) for name, rank in ranks.items()), ranks)


def _maps(model: nn.Module, whole: Sequence[str], tables: bool) -> dict[str, nn.Module]:
    """Linear maps by name, a shared one once; a head that shares its weight with a table goes where the table goes."""
    layers = {name: layer for name, layer in model.named_modules() if _is_map(layer) or _is_table(layer)}
    of_tables = {layer.weight.data_ptr() for layer in layers.values() if _is_table(layer)}
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, layer in layers.items():
        is_of_table = layer.weight.data_ptr() in of_tables
        large = min(_matrix(layer).shape) >= _SMALLEST_SIDE
        if name not in whole and large and (tables or not is_of_table):
            found[layer.weight.data_ptr()] = (name, layer)  # of a tied pair the head: it is whitened by its inputs
    return dict(found.values())


def _is_map(layer: nn.Module) -> bool:
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return layer.groups == 1
    return isinstance(layer, nn.Linear) or is_transformers_conv1d(layer)


def _is_table(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding)


def _matrix(layer: Any) -> Tensor:
    """Outputs x inputs (of a patch); a table as ids x width."""
    weight: Tensor = layer.weight.detach()
    return weight.T if is_transformers_conv1d(layer) else weight.flatten(1)


def _set_matrix(layer: Any, matrix: Tensor) -> None:
    new = matrix.T if is_transformers_conv1d(layer) else matrix.reshape(layer.weight.shape)
    layer.weight.copy_(new.to(layer.weight.dtype))


def _equal_ranks(shapes: Mapping[str, torch.Size], total: int, limit: int) -> dict[str, int]:
    """The largest common share with which all fit, and what is left over by one more rank where it fits."""

    def ranks_at(share: float) -> dict[str, int]:
        return {name: max(1, int(share * m * n / (m + n))) for name, (m, n) in shapes.items()}

    def size(ranks: Mapping[str, int]) -> int:
        return total + sum(rank * sum(shapes[name]) - shapes[name].numel() for name, rank in ranks.items())

    if size(ranks_at(0)) > limit:
        raise ValueError(f"equal shares must fit: rank one leaves {size(ranks_at(0)):,} parameters, not {limit:,}.")
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if size(ranks_at(middle)) <= limit else (low, middle)
    ranks = ranks_at(low)
    for name in sorted(shapes, key=lambda name: -sum(shapes[name])):
        if size(ranks) + sum(shapes[name]) <= limit:
            ranks[name] += 1
    return ranks


def _saved(layer: nn.Module, rank: int) -> int:
    m, n = _matrix(layer).shape
    return m * n - rank * (m + n)


@torch.no_grad()
def _moments(model: nn.Module, maps: Mapping[str, nn.Module], batches: Iterable[Any], run: Run) -> dict[str, Tensor]:
    """Float64 second moments of the inputs of all maps; of a table how often each row occurs."""
    sums: dict[str, Tensor] = {}
    mask: list[Tensor | None] = [None]

    def hook(name: str) -> Callable[..., None]:
        def add(layer: nn.Module, args: tuple[Any, ...]) -> None:
            part = _occurrences(layer, args[0], mask[0]) if _is_table(layer) else _gram(layer, args[0], mask[0])
            sums[name] = sums[name] + part if name in sums else part

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in maps.items()]
    for batch in batches:
        mask[0] = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        run(model, batch)
    for handle in handles:
        handle.remove()
    return sums


def _gram(layer: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Conv1d):
        x, kernel = x.unsqueeze(-2), (1, *layer.kernel_size)
        patches = nn.functional.unfold(
            x, kernel, (1, *layer.dilation), (0, *_sides(layer.padding)), (1, *layer.stride)
        ).transpose(1, 2)
    elif isinstance(layer, nn.Conv2d):
        patches = nn.functional.unfold(
            x, layer.kernel_size, layer.dilation, _sides(layer.padding), layer.stride
        ).transpose(1, 2)
    else:
        patches = x if mask is None or mask.shape != x.shape[:-1] else x[mask.bool()]
    rows = patches.reshape(-1, patches.shape[-1]).double()
    return rows.T @ rows


def _sides(padding: str | tuple[int, ...]) -> tuple[int, ...]:
    assert not isinstance(padding, str)
    return padding


def _occurrences(layer: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    ids = ids if mask is None or mask.shape != ids.shape else ids[mask.bool()]
    return torch.bincount(ids.flatten(), minlength=layer.num_embeddings).double()


def _cut(matrix: Tensor, moment: Tensor, rank: int, damping: float, *, rows: bool) -> Tensor:
    """The best matrix of that rank in the norm of the moment: of its inputs, or of how often its rows occur."""
    w = matrix.double()
    if rows:
        weights = (moment + 1).sqrt()[:, None]  # what did not occur here may occur elsewhere
        return _low_rank(w * weights, rank) / weights
    scale = moment.diagonal().mean().clamp_min(1e-300)
    factor = torch.linalg.cholesky(moment + damping * scale * torch.eye(len(moment), dtype=moment.dtype))
    cut = _low_rank(w @ factor, rank)
    return torch.linalg.solve_triangular(factor, cut, upper=False, left=False)


def _low_rank(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]
