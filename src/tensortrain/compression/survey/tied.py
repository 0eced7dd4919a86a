"""Tables that an output layer shares: one weight, decomposed once, that two layers go on sharing.

A row ``i`` of the table ``E`` is looked up with the frequency ``f_i`` and read by the head with a weight ``w_i``; its
change ``d_i`` costs ``f_i d_i^T F d_i + w_i d_i^T H d_i``, with ``F`` the second moment of the gradients at looked-up
rows and ``H`` that of the head's inputs. The nearest single product of a weight for rows and one for columns, by
partial traces, is what the decomposition is weighed by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.compression.survey.moments import LayerMoments

__all__ = ["Head", "Spread", "pairs_of", "together"]


@dataclass(frozen=True)
class Head:
    """An output layer whose weight is the table of an embedding, under all its names."""

    names: tuple[str, ...]
    module: nn.Linear


def pairs_of(modules: list[nn.Module], shared: dict[tuple[int, str], str]) -> dict[int, nn.Linear]:
    """Output layers by the ids of the embeddings whose tables they have, where nobody else has them too.

    Args:
        shared: Parameters and buffers whose numbers others hold, by the ids of their owners and their own names.
    """
    owners: dict[int, list[nn.Module]] = {}
    holders: dict[int, int] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
                if name == "weight" and type(module) in (nn.Embedding, nn.Linear):
                    owners.setdefault(id(parameter), []).append(module)
    found: dict[int, nn.Linear] = {}
    for key, pair in owners.items():
        if len(pair) != 2 or holders[key] != 2:
            continue
        table, head = sorted(pair, key=lambda module: type(module) is nn.Linear)
        if type(table) is nn.Embedding and type(head) is nn.Linear and not _has_more(head, shared):
            found[id(table)] = head
    return found


def _has_more(head: nn.Linear, shared: dict[tuple[int, str], str]) -> bool:
    return head.bias is not None and (id(head), "bias") in shared


@dataclass
class Spread:
    """How far the chances of every class are from certain: the mean of ``p (1 - p)`` over rows of logits.

    That is what a change of a class's logit costs, in nats, and never zero: how often a class came says less.
    """

    total: Tensor | None = field(default=None)

    def hook(self) -> Callable[..., None]:
        """For the head's outputs."""

        def take(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                p = output.detach().reshape(-1, output.shape[-1]).float().softmax(dim=-1)
                rows = (p * (1 - p)).double().sum(dim=0)
                self.total = rows if self.total is None else self.total + rows

        return take


def together(table: LayerMoments, head: LayerMoments, spread: Tensor | None) -> None:
    """Weigh a table by what is known of it and of the head that shares it.

    Args:
        spread: Of the head's classes, see :class:`Spread`; its gradients alone where None.
    """
    looked_up, read = table.gram, head.gram
    if looked_up is None or read is None or table.output_gram is None or head.output_gram is None:
        return
    weights = head.output_gram if head.output_gram.ndim == 1 else head.output_gram.diagonal()
    if spread is not None and float(spread.sum()) > 0:
        weights = spread.to(weights) * (weights.sum() / spread.sum())
    columns, inputs = _full(table.output_gram), _full(read)
    rows = looked_up * columns.trace() + weights * inputs.trace()
    total = float(rows.sum())
    if total > 0 and bool(torch.isfinite(rows).all()):
        table.gram = rows / total
        table.output_gram = looked_up.sum() * columns + weights.sum() * inputs


def _full(moment: Tensor) -> Tensor:
    return torch.diag(moment) if moment.ndim == 1 else moment
