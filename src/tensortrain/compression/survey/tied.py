"""Tables that an output layer shares: one weight, decomposed once, that two layers go on sharing.

A row ``i`` of the table ``E`` is looked up with the frequency ``f_i`` and read by the head with a weight ``w_i``; its
change ``d_i`` costs ``f_i d_i^T F d_i + w_i d_i^T H d_i``, with ``F`` the second moment of the gradients at looked-up
rows and ``H`` that of the head's inputs. The nearest single product of a weight for rows and one for columns, by
partial traces, is what the decomposition is weighed by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.compression.survey.moments import LayerMoments
from tensortrain.system.storage import overlaps

__all__ = ["Head", "Spread", "pairs_of", "together"]


_ROWS = 256  # of logits at once


@dataclass(frozen=True)
class Head:
    """An output layer whose weight is the table of an embedding, under all its names."""

    names: tuple[str, ...]
    module: nn.Linear


Slot = tuple[int, str]  # the id of an owner, and its own name for a parameter or buffer


def pairs_of(modules: Sequence[nn.Module], slots: Sequence[tuple[Slot, Tensor]]) -> dict[int, nn.Linear]:
    """Output layers by the ids of the embeddings whose tables they have, where nobody else has numbers of these too.

    Args:
        slots: All parameters and buffers.
    """
    owners: dict[int, list[nn.Module]] = {}
    for module in modules:
        weight = module._parameters.get("weight")
        if type(module) in (nn.Embedding, nn.Linear) and weight is not None:
            owners.setdefault(id(weight), []).append(module)
    found: dict[int, nn.Linear] = {}
    for pair in (listed for listed in owners.values() if len(listed) == 2):
        table, head = sorted(pair, key=lambda module: type(module) is nn.Linear)
        if type(table) is nn.Embedding and type(head) is nn.Linear and _is_theirs_alone(table, head, slots):
            found[id(table)] = head
    return found


def _is_theirs_alone(table: nn.Embedding, head: nn.Linear, slots: Sequence[tuple[Slot, Tensor]]) -> bool:
    """Whether nobody else holds numbers of the weight, or of the head's bias."""
    own: list[tuple[Slot, Tensor]] = [((id(head), name), p) for name, p in head._parameters.items() if p is not None]
    theirs = {(id(table), "weight"), *(slot for slot, _ in own)}
    shared = overlaps([*own, *((slot, tensor) for slot, tensor in slots if slot not in theirs)])
    return not any(one in theirs for one, _ in shared)


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
                for some in output.detach().reshape(-1, output.shape[-1]).split(_ROWS):
                    p = some.float().softmax(dim=-1)
                    rows = p.mul(1 - p).sum(dim=0, dtype=torch.float64)
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
