"""Layers whose weight is computed at every call (weight norm, spectral norm, pruning): the same with plain numbers.

The weight is computed once, as in eval mode. What computed it, and the parameters that it was computed from, stay with
the old layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tensortrain.compression.carry import gradient_hooks
from tensortrain.compression.survey.reasons import Survey
from tensortrain.compression.words import in_short
from tensortrain.nn.counterparts import counterpart_of_class
from tensortrain.nn.opening import composite_of_class
from tensortrain.system.storage import count_bytes, count_numbers

__all__ = ["ComputedLayer", "computed_layer", "is_computed", "plain_kind", "why_not_computed"]

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_OF_STATE_DICTS = ("_state_dict_hooks", "_load_state_dict_pre_hooks")


def plain_kind(layer: nn.Module) -> type[nn.Module]:
    """The class of a layer without what ``torch.nn.utils.parametrize`` makes of it."""
    return type_before_parametrizations(layer) if is_parametrized(layer) else type(layer)


def is_computed(layer: nn.Module) -> bool:
    """Whether a layer that could be compressed gets a tensor of its own from torch's ways to compute one."""
    kind = plain_kind(layer)
    if counterpart_of_class(kind) is None and composite_of_class(kind) is None:
        return False
    return is_parametrized(layer) or any(map(_is_computing, layer._forward_pre_hooks.values()))


@dataclass(frozen=True)
class ComputedLayer:
    """A layer whose weight is computed, and the same with plain numbers.

    Attributes:
        by: What computes, in words.
        n_beside, bytes_beside: Parameters that the old layer has more, and bytes of these and of buffers.
        put_back: Gives the old layer the hooks that compute, which both hold in one dictionary.
    """

    old: nn.Module
    plain: nn.Module
    by: str
    n_beside: int
    bytes_beside: int
    put_back: Callable[[], None]


def why_not_computed(layer: nn.Module, survey: Survey) -> str:
    """Why the weight of such a layer cannot be computed once and for all; ``""`` where it can."""
    parameters = list(layer.parameters())
    if any(p.is_meta for p in parameters):
        return "its weight lies on the meta device, which holds no numbers"
    if any(gradient_hooks(p) for p in parameters):
        return "hooks hang on the parameters that its weight is computed from"
    tied = next((why for part in layer.modules() if (why := survey.why_tied(part))), "")
    if tied:
        return tied
    try:
        first, second = (list(_values(layer)) for _ in range(2))
    except Exception as error:
        return f"its weight cannot be computed by itself ({in_short(error)})"
    same = all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(first, second, strict=True))
    return "" if same else "its weight is drawn anew whenever it is computed"


def computed_layer(layer: nn.Module) -> ComputedLayer:
    """The same layer with plain numbers; what users hung on it is on both.

    The hooks that compute are taken out of the old layer too, until ``put_back``.
    """
    plain = _without_parametrizations(layer)
    hooks = [
        getattr(layer, name) for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", *_OF_STATE_DICTS)
    ]
    before = [(registry, dict(registry)) for registry in hooks]
    words = ["a parametrization"] if is_parametrized(layer) else []
    computing = [(key, hook) for key, hook in layer._forward_pre_hooks.items() if _is_computing(hook)]
    for key, hook in sorted(computing, key=lambda pair: not isinstance(pair[1], BasePruningMethod)):
        _settle(plain, hook)  # what is pruned first: a norm may be computed from it
        layer._forward_pre_hooks.pop(key)
        words.append(_words(hook))
    if isinstance(plain, nn.RNNBase):
        plain._init_flat_weights()

    def put_back() -> None:
        for registry, content in before:
            registry.clear()
            registry.update(content)

    numbers, sizes = zip(*(_held(one) for one in (layer, plain)), strict=True)
    by = " and ".join(dict.fromkeys(words))
    return ComputedLayer(layer, plain, by, numbers[0] - numbers[1], sizes[0] - sizes[1], put_back)


def _held(layer: nn.Module) -> tuple[int, int]:
    """Numbers of a layer's parameters, and bytes of these and of its buffers."""
    return count_numbers(layer.parameters()), count_bytes((*layer.parameters(), *layer.buffers()))


def _without_parametrizations(layer: nn.Module) -> Any:
    """A layer of the plain class that shares everything with the old one but its dictionaries of tensors."""
    kind = plain_kind(layer)
    plain: Any = kind.__new__(kind)
    vars(plain).update(vars(layer))
    for name in _REGISTRIES:
        vars(plain)[name] = dict(getattr(layer, name))
    if is_parametrized(layer):
        parts = plain._modules.pop("parametrizations")
        for name, value in zip(parts, _parametrized(layer), strict=True):
            sources = list(parts[name].parameters())
            plain._parameters[name] = nn.Parameter(value, requires_grad=any(p.requires_grad for p in sources))
    return plain


def _settle(plain: nn.Module, hook: Any) -> None:
    """Compute once what a hook computes before every call, and keep it as a parameter."""
    name, value = _name(hook), _computed_by(plain, hook)
    sources = [key for key in (f"{name}_g", f"{name}_v", f"{name}_orig") if key in plain._parameters]
    trains = any(plain._parameters[key].requires_grad for key in sources)  # type: ignore[union-attr]
    for key in (*sources, f"{name}_u", f"{name}_v", f"{name}_mask"):
        plain._parameters.pop(key, None)
        plain._buffers.pop(key, None)
    vars(plain).pop(name, None)
    plain._parameters[name] = nn.Parameter(value, requires_grad=trains)
    for registry in (getattr(plain, key) for key in _OF_STATE_DICTS):
        for key, other in list(registry.items()):
            if getattr(_bound(other), "fn", None) is hook:
                registry.pop(key)


def _bound(hook: Any) -> Any:
    """What torch wraps when it registers a hook on loading."""
    return getattr(hook, "hook", hook)


def _is_computing(hook: object) -> bool:
    return isinstance(hook, (WeightNorm, SpectralNorm, BasePruningMethod))


def _name(hook: Any) -> str:
    name: str = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
    return name


def _words(hook: object) -> str:
    if isinstance(hook, BasePruningMethod):
        return "pruning"
    return "weight norm" if isinstance(hook, WeightNorm) else "spectral norm"


# -- the numbers ---------------------------------------------------------------------------------------------------


def _values(layer: nn.Module) -> Iterator[Tensor]:
    if is_parametrized(layer):
        yield from _parametrized(layer)
    for hook in layer._forward_pre_hooks.values():
        if _is_computing(hook):
            yield _computed_by(layer, hook)


def _parametrized(layer: Any) -> list[Tensor]:
    with torch.no_grad(), _as_in_eval(layer.parametrizations):
        return [getattr(layer, name).detach().clone() for name in layer.parametrizations]


@torch.no_grad()
def _computed_by(layer: nn.Module, hook: Any) -> Tensor:
    if isinstance(hook, SpectralNorm):
        value = hook.compute_weight(layer, do_power_iteration=False)
    elif isinstance(hook, WeightNorm):
        value = hook.compute_weight(layer)
    else:
        value = hook.apply_mask(layer)
    found: Tensor = value.detach().clone()
    return found


@contextmanager
def _as_in_eval(parts: nn.Module) -> Iterator[None]:
    """No running estimate is moved on and nothing is drawn."""
    before = [(part, part.training) for part in parts.modules()]
    try:
        parts.eval()
        yield
    finally:
        for part, training in before:
            part.training = training
