"""Why a layer is left alone: what it is, what hangs on it, or where its weight lies; one reason in words for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from tensortrain import nn as factorized
from tensortrain.compression.carry import cannot_carry, gradient_hooks, own_names
from tensortrain.compression.survey.tied import pairs_of
from tensortrain.nn import COUNTERPARTS, FactorizedLayer, counterpart
from tensortrain.system.aliases import Aliases
from tensortrain.system.storage import count_numbers, overlaps, repeats, span_of

__all__ = ["Survey", "why_not", "why_unknown"]

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SMALL, _SMALL_SHARE = 1000, 0.01  # fewer parameters than both say are not worth a line
_FORWARDS = {kind: kind.forward for kind in COUNTERPARTS}
Slot = tuple[int, str]  # id of a module, name of its parameter


@dataclass
class Survey:
    """What has to be known of a whole model before one of its layers can be judged.

    Attributes:
        modules: Each once, in order.
        names: By id, the first one.
        total: Numbers that the model's parameters hold.
        heads: Output layers by the ids of the embeddings whose tables they share.
        shared: For a parameter or buffer whose numbers others hold too, a name of one of those.
        held: For a layer that is held where it cannot be replaced, that place.
    """

    modules: list[nn.Module]
    names: dict[int, str]
    total: int
    shared: dict[Slot, str] = field(default_factory=dict)
    held: dict[int, str] = field(default_factory=dict)
    heads: dict[int, nn.Linear] = field(default_factory=dict)
    inner: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, model: nn.Module) -> Survey:
        named = list(model.named_modules())
        survey = cls(
            [module for _, module in named],
            {id(module): name for name, module in named},
            count_numbers(model.parameters()),
        )
        survey.inner = {id(part) for module in survey.modules for part in _inner(module)}
        survey._note_shared(survey._slots())
        survey.heads = pairs_of(survey.modules, survey._slots())
        return survey

    def add(self, aliases: Aliases) -> None:
        """Take in what the model holds outside its registered names."""
        for reference in aliases.references:
            kind = counterpart(reference.target)
            if kind is not None and not reference.place.can_hold(kind):
                self.held[id(reference.target)] = reference.path
        loose = [((0, path), tensor) for path, tensor in aliases.tensors if span_of(tensor) is not None]
        if loose:
            self.heads = pairs_of(self.modules, [*self._slots(), *loose])
            self._note_shared([*self._slots(), *loose])

    def why_held(self, module: nn.Module) -> str:
        """Why a layer cannot be replaced, seen from what else holds it or its numbers; ``""`` where it can."""
        if id(module) in self.held:
            return f"it is also held where it cannot be replaced: {self.held[id(module)]}"
        return self.why_tied(module)

    def why_tied(self, module: nn.Module) -> str:
        for name in module._parameters:
            other = self.shared.get((id(module), name))
            if other is not None and not (name == "weight" and self.is_paired(module)):
                return f"its {name} is tied: it shares memory with {other}"
        return ""

    def is_paired(self, module: nn.Module) -> bool:
        """Whether a weight is that of an embedding and of an output layer, which are changed together."""
        return id(module) in self.heads or any(module is head for head in self.heads.values())

    def looks_like_a_layer(self, module: nn.Module) -> bool:
        return id(module) not in self.inner and (
            counterpart(module) is not None or isinstance(module, tuple(COUNTERPARTS)) or _is_quantized(module)
        )

    def n_params(self, module: nn.Module) -> int:
        """Numbers of a module's own parameters and of what computes them."""
        parts = [module, *_inner(module)]
        return count_numbers(p for part in parts for p in part._parameters.values() if p is not None)

    def _slots(self) -> list[tuple[Slot, Tensor]]:
        return [
            ((id(module), name), tensor)
            for module in self.modules
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        ]

    def _note_shared(self, slots: Iterable[tuple[Slot, Tensor]]) -> None:
        for slot, other in overlaps(list(slots)):
            owner, name = other
            prefix = self.names[owner] if owner else ""
            self.shared.setdefault(slot, f"{prefix}.{name}" if prefix else name)


def why_not(module: nn.Module, survey: Survey) -> str:
    """Why something that looks like a layer cannot be factorized; ``""`` where it can."""
    if counterpart(module) is None:
        return _why_not_this_kind(module)
    checks: tuple[Callable[[Any], str], ...] = (_offloaded, _changed, _computed, _odd_weight, _odd_shape, _odd_bias)
    reason = next((reason for check in checks if (reason := check(module))), "")
    return reason or survey.why_tied(module) or cannot_carry(module) or _depthwise(module)


def why_unknown(module: nn.Module, survey: Survey) -> str:
    """Why the parameters of a module of another kind are not touched; ``""`` where it has none worth a line."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    if not own or id(module) in survey.inner or isinstance(module, FactorizedLayer):
        return ""
    n = survey.n_params(module)
    if _is_norm(module) or (n < _SMALL and n < _SMALL_SHARE * survey.total):
        return ""
    shown = ", ".join(f"{name} {_size(p)}" for name, p in list(own.items())[:4]) + (", .." if len(own) > 4 else "")
    by_hand = getattr(factorized, type(module).__name__, None) if _is_torchs(module) else None
    if by_hand is not None and hasattr(by_hand, "from_dense"):
        return f"no plan reaches its {shown}; tensortrain.nn.{type(module).__name__}.from_dense replaces it by hand"
    return f"no plan reaches its {shown}, which stand in no layer that has a factorized form"


def _why_not_this_kind(module: nn.Module) -> str:
    kind = type(module).__name__
    if is_parametrized(module):
        return "a parametrization computes one of its parameters"
    if isinstance(module, factorized.PartialLinear):
        return "directions of the attention heads beside it were taken out of it before"
    if _is_quantized(module):
        return f"it is quantized: {kind} keeps {_n_packed(module):,} packed numbers, and no parameters"
    if any(parameter is not None and is_lazy(parameter) for parameter in module._parameters.values()):
        return "its weight is not initialised yet; run the model once"
    return f"{kind} is a subclass that may have a forward of its own"


def _offloaded(module: Any) -> str:
    weight = module._parameters.get("weight")
    if not isinstance(weight, Tensor) or not weight.is_meta or is_lazy(weight):
        return ""
    hook = getattr(module, "_hf_hook", None)
    cause = f"offloaded by accelerate ({type(hook).__name__})" if hook is not None else "never loaded, or offloaded"
    return f"its weight lies on the meta device, which holds no numbers: {cause}. Load the model without offloading"


def _changed(module: Any) -> str:
    kind = type(module)
    if kind in _FORWARDS and kind.forward is not _FORWARDS[kind]:
        return f"the forward of all {kind.__name__} layers was replaced by one that a new layer would not have"
    if "forward" not in vars(module):
        return ""
    hook = getattr(module, "_hf_hook", None)
    return cannot_carry(module) if hook is None else f"accelerate's {type(hook).__name__} replaced its forward"


def _computed(module: Any) -> str:
    names = [name for name in ("weight", "bias") if name in own_names(module) and name not in module._parameters]
    if names:
        return f"its {names[0]} is computed by a parametrization (weight norm, pruning, a view of others), no parameter"
    weight = module._parameters["weight"]
    return "it has no weight" if weight is None else ""


def _odd_weight(module: Any) -> str:
    weight = module._parameters["weight"]
    if is_lazy(weight):
        return "its weight is not initialised yet; run the model once"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, not plain numbers"
    if weight.layout is not torch.strided or weight.is_quantized or weight.is_nested:
        return f"its weight is stored as {weight.layout}, not as a plain array".replace("torch.", "")
    if weight.dtype not in _FLOATS:
        return f"its weight has no ordinary floating-point data: {weight.dtype}".replace("torch.", "")
    if weight.numel() == 0:
        return "its weight is empty"
    if gradient_hooks(weight):
        return "a hook hangs on its weight itself, which several cores cannot take over"
    if span_of(weight) is None or repeats(weight):
        return "its weight repeats numbers in memory, or lies in memory of another kind"
    return ""


def _odd_shape(module: Any) -> str:
    kind: Any = counterpart(module)
    weight = module._parameters["weight"]
    expected = kind.weight_shape_of(module)
    fits = not isinstance(module, _ConvNd) or weight.shape[2:] == tuple(module.kernel_size)
    try:
        fits = fits and tuple(kind.kernel_of(module).shape) == expected.dense_shape
    except (RuntimeError, IndexError, ValueError):
        fits = False
    return "" if fits else f"its weight has shape {tuple(weight.shape)}, which is not that of its sizes"


def _odd_bias(module: Any) -> str:
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    if bias is None:
        return ""
    if is_lazy(bias) or type(bias) is not nn.Parameter or bias.layout is not torch.strided:
        return f"its bias is a {type(bias).__name__}, not plain numbers"
    if (bias.dtype, bias.device) != (weight.dtype, weight.device):
        return f"its bias is {bias.dtype} on {bias.device}, its weight {weight.dtype} on {weight.device}"
    outputs = counterpart(module).weight_shape_of(module).out_features  # type: ignore[union-attr]
    return "" if tuple(bias.shape) == (outputs,) else f"its bias has shape {tuple(bias.shape)}, expected ({outputs},)"


def _depthwise(module: Any) -> str:
    if isinstance(module, _ConvNd) and module.in_channels == module.groups > 1:
        return "depthwise: each group is a single filter, there is nothing to factorize"
    return ""


def _inner(module: nn.Module) -> list[nn.Module]:
    """Modules that are no layers of their own: the cores of a factorized one, what computes another's parameters."""
    if isinstance(module, FactorizedLayer):
        return list(module.cores.modules())
    if isinstance(getattr(module, "parametrizations", None), nn.ModuleDict):
        return list(module.parametrizations.modules())  # type: ignore[union-attr]
    if _is_quantized(module):
        return [part for part in module.modules() if part is not module]
    return [] if not isinstance(module, ParametrizationList) else list(module.modules())


def _is_quantized(module: nn.Module) -> bool:
    home = type(module).__module__
    return home.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")) and hasattr(module, "_packed_params")


def _n_packed(module: Any) -> int:
    try:
        return int(module.weight().numel())
    except Exception:  # packed by a library whose ways are its own
        return 0


def _is_norm(module: nn.Module) -> bool:
    flat = all(is_lazy(p) or p.ndim <= 1 for p in module._parameters.values() if p is not None)
    return flat and "norm" in type(module).__name__.lower()


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules")


def _size(parameter: Tensor) -> str:
    return "(not initialised)" if is_lazy(parameter) else str(tuple(parameter.shape))
