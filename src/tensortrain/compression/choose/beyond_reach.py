"""What keeps a model from getting smaller: who holds the parameters that no plan reaches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tensortrain.compression.choose.budget import Budget
from tensortrain.compression.survey.layers import FoundLayer, LeftAlone, count_params, find_layers
from tensortrain.errors import BudgetError
from tensortrain.nn import counterpart
from tensortrain.system.storage import count_numbers

__all__ = ["nothing_to_compress", "unspent_note", "what_stands_in_the_way"]

_SHOWN, _REASONS_SHOWN = 3, 8
_SPENT = 0.95


def what_stands_in_the_way(
    model: nn.Module, layers: Sequence[FoundLayer], left: Sequence[LeftAlone] | None = None
) -> str:
    """Sentences for a message: which modules hold the most parameters that ``layers`` do not, and why.

    Returns:
        str: Begins with a space; empty where the layers hold all.
    """
    holders = _holders(model, layers)
    if not holders:
        return ""
    reasons = {one.name: one for one in (find_layers(model)[1] if left is None else left)}
    shown = ", ".join(dict.fromkeys(_shown(name, module, n, reasons) for n, name, module in holders[:_SHOWN]))
    more = f", and {len(holders) - _SHOWN} more" if len(holders) > _SHOWN else ""
    share = sum(n for n, _, _ in holders) / max(1, count_params(model))
    return f" Beyond reach are {share:.0%} of the parameters: {shown}{more}."


def nothing_to_compress(model: nn.Module, left: Sequence[LeftAlone]) -> BudgetError:
    """The error for a model without layers to compress: it says what the model holds and why each part was left."""
    shown = "".join(
        f"\n  left alone: {layer}" for layer in sorted(left, key=lambda one: -one.n_params)[:_REASONS_SHOWN]
    )
    more = f"\n  and {len(left) - _REASONS_SHOWN} more" if len(left) > _REASONS_SHOWN else ""
    return BudgetError(
        f"a model must have layers to compress: of its {count_params(model):,} parameters in "
        f"{sum(1 for _ in model.modules())} modules none stand in a layer that can be factorized. Check include= and "
        f"exclude=, or tensortrain.inspect(model).{shown}{more}"
    )


def unspent_note(
    budget: Budget, spent: int, *, full: int, slower: Sequence[str] = (), is_exact: bool = False
) -> str | None:
    """Why a plan leaves more than a twentieth of its budget; ``None`` where it does not.

    Args:
        spent: What the plan uses, in the budget's unit.
        full: What the model takes as it is.
        slower: Names of the layers whose larger forms were struck off as too slow.
        is_exact: Nothing is predicted to be lost.
    """
    if spent >= _SPENT * budget.limit:
        return None
    if spent >= full:
        why = "the model is that small as it is"
    elif is_exact:
        why = "with less the model is predicted to give what it gave"
    elif slower:
        why = f"larger forms of {len(slower)} layers (such as {slower[0]!r}) are predicted slower; see allow_slower"
    else:
        why = "the next larger form of any layer would exceed it"
    return f"The plan uses {spent:,} of the {budget.limit:,} {budget.measure} of its budget: {why}."


def _holders(model: nn.Module, layers: Sequence[FoundLayer]) -> list[tuple[int, str, nn.Module]]:
    """Modules with parameters of their own outside the layers, the heaviest first; ties count for the first."""
    counted = [p for layer in layers for p in layer.module._parameters.values() if p is not None]
    seen, n_before, holders = {id(p) for p in counted}, count_numbers(counted), []
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None and id(p) not in seen]
        if not own:
            continue
        seen |= {id(p) for p in own}
        counted += own
        n_now = count_numbers(counted)  # what shares memory with an earlier one is that one's
        if n_now > n_before:
            holders.append((n_now - n_before, name, module))
        n_before = n_now
    return sorted(holders, key=lambda holder: -holder[0])


def _shown(name: str, module: nn.Module, n: int, reasons: dict[str, LeftAlone]) -> str:
    known = reasons.get(name)
    why = "passed over by include= or exclude=" if known is None and counterpart(module) is not None else ""
    why = f"left alone: {known.reason}" if known is not None else why
    return f"{name!r} ({type(module).__name__}) with {n:,}" + (f" ({why})" if why else "")
