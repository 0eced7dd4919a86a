"""What a layer carries beside its weight: hooks, and whatever users hung on it. A new layer gets the same objects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tensortrain.formats import get_format
from tensortrain.nn import FactorizedLayer, TiedHead, counterpart, is_transformers_conv1d
from tensortrain.system.aliases import wraps_own_forward

__all__ = ["cannot_carry", "carry", "own_names"]

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_REGISTERED = ("_parameters", "_buffers", "_modules")
_SETTINGS = ("dense_limit_bytes", "may_time_plans", "made_from", "stand_ins")  # of a factorized layer, set on it
_OF_TORCH_ALONE = ("transposed", "output_padding", "nf", "nx")  # that models read of layers, and ours may lack

_own_names_of: dict[type[nn.Module], frozenset[str]] = {}


def cannot_carry(layer: nn.Module, *, to: type[nn.Module] | None = None) -> str:
    """Why what hangs on a layer cannot go to a new one; ``""`` where it can.

    Args:
        layer: Dense or factorized.
        to: Class of the new layer; that of the factorized twin when left out.
    """
    kind: Any = to or counterpart(layer)
    changed = [name for name in vars(layer) if _hides_ours(layer, name) and not _is_own(layer, name)]
    if "forward" in changed and wraps_own_forward(layer):
        changed.remove("forward")
    replaced = next(iter(changed), None)
    if replaced == "forward":
        return "its forward was replaced on the layer itself, by one that a new layer would not have"
    if replaced == "_compiled_call_impl":
        return "it was compiled by itself; compile the new model"
    if replaced is not None:
        return f"its {replaced} was replaced on the layer itself, by one that a new layer would not have"
    taken = set(dir(kind)) | (_twin_names(layer) if to is None else frozenset())
    clash = next((name for name in _hung(layer) if name in taken and not _is_data(layer, name)), None)
    if clash is not None:
        return f"it carries a {clash!r} of its own, which would hide that of the new layer"
    return ""


def carry(old: nn.Module, new: nn.Module) -> None:
    """Give a new layer the hooks of an old one and all that hangs on it: attributes, parameters, buffers, children.

    The objects stay the same, so that handles still remove hooks, and what others hold is what the layer holds.
    """
    move_hooks(old, new)
    hung = _hung(old)
    for registry in _REGISTERED:
        entries, target = getattr(old, registry), getattr(new, registry)
        target.update({name: entries[name] for name in hung if name in entries})
    new._non_persistent_buffers_set.update(name for name in hung if name in old._non_persistent_buffers_set)
    plain = {name: value for name, value in vars(old).items() if name in hung or name in _OF_TORCH_ALONE}
    vars(new).update({name: value for name, value in plain.items() if not hasattr(new, name) or _is_data(old, name)})
    if "forward" in vars(old):  # one that wraps the layer's own
        vars(new)["forward"] = vars(old)["forward"]
    _carry_marks(old, new)


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a new layer the hooks of an old one, in the dicts that their handles know."""
    for name in _HOOKS:
        if getattr(old, name, None):
            setattr(new, name, getattr(old, name))
    new._is_full_backward_hook = old._is_full_backward_hook


def own_names(layer: nn.Module) -> frozenset[str]:
    """The names that a layer of this kind has from its constructor: attributes, parameters, buffers, children."""
    kind = type(layer)
    if kind not in _own_names_of:
        _own_names_of[kind] = _names(_fresh(layer))
    return _own_names_of[kind]


def _carry_marks(old: nn.Module, new: nn.Module) -> None:
    """Attributes that were set on the parameters themselves, such as a learning rate or that they are initialised."""
    for name, parameter in new.named_parameters(recurse=False):
        source = old._parameters.get(name)
        if source is not None and source is not parameter:
            vars(parameter).update(vars(source))
    weight = _weight_of(old)
    targets = list(new.cores.parameters()) if isinstance(new, FactorizedLayer) else [_weight_of(new)]
    for target in targets:
        if weight is not None and target is not None:
            vars(target).update(vars(weight))


def _weight_of(layer: nn.Module) -> Any:
    if isinstance(layer, FactorizedLayer):
        return next(layer.cores.parameters(), None)
    return layer._parameters.get("weight")


def _hung(layer: nn.Module) -> list[str]:
    """Names on a layer that it does not have from its constructor."""
    own = own_names(layer)
    plain = [name for name in vars(layer) if not _hides_ours(layer, name)]
    registered = [name for registry in _REGISTERED for name in getattr(layer, registry)]
    passed_over = _OF_TORCH_ALONE if isinstance(layer, FactorizedLayer) else ()
    return [name for name in (*plain, *registered) if name not in own and name not in passed_over]


def _hides_ours(layer: nn.Module, name: str) -> bool:
    """Whether an attribute on the layer itself takes the place of something that its class has."""
    return hasattr(type(layer), name) and not _is_data(layer, name)


def _is_data(layer: nn.Module, name: str) -> bool:
    """Whether an attribute is plain data that bears the name of a method, as the ``type`` of YOLO's layers does."""
    value = vars(layer).get(name)
    return value is not None and not callable(value) and callable(getattr(nn.Module, name, None))


def _is_own(layer: nn.Module, name: str) -> bool:
    return name in own_names(layer) or (name in _SETTINGS and isinstance(layer, FactorizedLayer))


def _twin_names(layer: nn.Module) -> frozenset[str]:
    kind: Any = counterpart(layer)
    if kind not in _own_names_of:
        spec = get_format("low_rank").spec(kind.weight_shape_of(layer), rank=1)
        with _Undrawn():
            _own_names_of[kind] = _names(kind.like(layer, spec, device="meta"))
    return _own_names_of[kind]


class _Undrawn(TorchFunctionMode):
    """Constructors draw no normal numbers: on the meta device torch would load its compiler for that, some 70 MB."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "normal_":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _fresh(layer: Any) -> nn.Module:
    """A layer of the same kind without memory, as its constructor makes it."""
    if isinstance(layer, FactorizedLayer):
        with _Undrawn():
            return type(layer).like(layer, layer.spec, device="meta")
    with torch.device("meta"), _Undrawn():
        if isinstance(layer, TiedHead):
            return TiedHead(nn.Embedding(1, 1), bias=layer.bias is not None)
        if is_transformers_conv1d(layer):
            return type(layer)(layer.nf, layer.nx)
        kind: Any = counterpart(layer)
        fresh: nn.Module = type(layer)(**kind.arguments_of(layer))
        return fresh


def _names(layer: nn.Module) -> frozenset[str]:
    registered = (name for registry in _REGISTERED for name in getattr(layer, registry))
    return frozenset((*vars(layer), *registered))


def gradient_hooks(tensor: Tensor) -> bool:
    """Whether hooks hang on a parameter itself, which one new core of several could not take over."""
    return bool(tensor._backward_hooks) or bool(getattr(tensor, "_post_accumulate_grad_hooks", None))
