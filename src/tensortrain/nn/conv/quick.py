"""The short way through a small convolution: what an earlier input of the same shape left ready, after few checks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tensortrain.contract.cache import n_optimizer_steps
from tensortrain.nn.conv.options import ConvOptions
from tensortrain.nn.conv.ways import DenseWay
from tensortrain.nn.cores import PLAIN_LISTS, are_plain
from tensortrain.system.native import library

if TYPE_CHECKING:
    from tensortrain.nn.conv.layers import ConvLayer
    from tensortrain.nn.conv.plan import ConvPlan

__all__ = ["forget_weights", "keep_quick", "keep_training", "quick"]

_MOST_KEPT = 64  # shapes of inputs that find something ready

_is_autocast = torch.is_autocast_enabled
_functorch_level = torch._C._functorch.maybe_current_level
_tracing_state = torch._C._get_tracing_state
_n_modes = torch._C._len_torch_dispatch_stack


class QuickCall:
    """One inference at one shape, valid while cores and settings of the layer stay as they are.

    Args:
        layer: Who asks; it is not held.
        x: The input that was just served.
        call: ``call(x, bias)``, by weights that follow from the cores.
        cores: Plain parameters, in order.
    """

    __slots__ = ("call", "dtype", "settings", "stamps", "steps")

    def __init__(self, layer: ConvLayer, x: Tensor, call: Callable[[Tensor, Any], Tensor], cores: Sequence[Tensor]):
        self.call, self.dtype, self.settings = call, x.dtype, _settings(layer)
        self.stamps = [(weakref.ref(core), core._version, core.data_ptr()) for core in cores]
        self.steps = n_optimizer_steps()

    def is_valid(self, layer: ConvLayer, x: Tensor) -> bool:
        """Whether nothing has changed that the call rests on."""
        cores = layer._modules["cores"]
        if (
            x.dtype is not self.dtype
            or "bias" not in layer._parameters
            or self.settings != _settings(layer)
            or self.steps != n_optimizer_steps()
        ):
            return False
        if not are_plain(cores):  # type: ignore[arg-type]
            return False
        stored = cores._parameters  # type: ignore[union-attr]
        if len(stored) != len(self.stamps):
            return False
        for (held, version, address), core in zip(self.stamps, stored.values(), strict=True):
            if held() is not core or core._version != version or core.data_ptr() != address:  # type: ignore[union-attr]
                return False
        return True


def _settings(layer: ConvLayer) -> tuple[Any, ...]:
    """What a user may set on a layer at any time, and what plans depend on."""
    return (
        layer.implementation,
        layer.dense_limit_bytes,
        layer.may_time_plans,
        layer.stand_ins is None,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    )


def keep_quick(layer: ConvLayer, x: Tensor, plan: ConvPlan, prepared: tuple[Tensor, ...], cores: list[Tensor]) -> None:
    """Let the next input of this shape take the short way: through the kernels where they are built.

    Args:
        layer: On the CPU; its cores are plain parameters.
        x: The input that was just served.
        plan: By which.
        prepared: What its way made of the cores.
        cores: In order.
    """
    way, options = plan.way, plan.options
    assert way is not None
    assert options is not None
    call, kernels, runner = way.ready(x, prepared, options), library(), layer.runner
    if call is None:
        return
    if kernels is None:
        if len(runner.quick_calls) >= _MOST_KEPT:
            runner.quick_calls.clear()
        runner.quick_calls[x.shape, x.is_contiguous()] = QuickCall(layer, x, call, cores)
        runner.way = quick
        return
    n_optimizer_steps()  # counted from now on
    short = _current_way(layer, kernels)
    if isinstance(way, DenseWay) and way.is_torchs_own(options):
        short.keep_dense(x, cores, prepared[0], *_numbers(layer, options))
    else:
        short.keep_call(x, cores, call)


def keep_training(layer: ConvLayer, x: Tensor, plan: ConvPlan) -> None:
    """Let the next input of this shape go one step forward in one call, where the kernels are built.

    Args:
        layer: On the CPU; its cores are plain parameters.
        x: The input that was just served.
        plan: By which.
    """
    way, options, kernels = plan.way, plan.options, library()
    assert way is not None
    assert options is not None
    recipe = way.recipe(options) if kernels is not None else None
    if recipe is None:
        return
    short = _current_way(layer, kernels)
    if isinstance(way, DenseWay) and way.is_torchs_own(options):
        short.train_dense(x, recipe, *_numbers(layer, options))
    else:
        short.train_call(x, recipe, way.by_weights(options))


def forget_weights(layer: ConvLayer) -> None:
    """Let go of all weights that follow from the cores, which are about to change."""
    runner, kernels = layer.runner, library()
    runner.cache.clear()
    runner.quick_calls.clear()
    if kernels is not None and isinstance(runner.way, kernels.ConvWay):
        runner.way.forget_weights()
    else:
        runner.way = None


def _current_way(layer: ConvLayer, kernels: Any) -> Any:
    """The kernels' short way, a new one where settings of the layer have changed."""
    settings = [layer.implementation, layer.dense_limit_bytes, layer.may_time_plans]
    if not isinstance(layer.runner.way, kernels.ConvWay) or layer.runner.way.options != settings:
        kernels.know_core_lists(*PLAIN_LISTS)
        layer.runner.way = kernels.ConvWay(settings)
    return layer.runner.way


def _numbers(layer: ConvLayer, options: ConvOptions) -> tuple[Any, ...]:
    return options.stride, options.padding, options.dilation, layer.groups


def quick(layer: ConvLayer, x: Any) -> Tensor | None:
    """The convolution by what lies ready for this shape; ``None`` where nothing does, or where somebody looks on."""
    calls = layer.runner.quick_calls
    if not calls or type(x) is not Tensor or torch.is_grad_enabled():
        return None
    found = calls.get((x.shape, x.is_contiguous()))
    if found is None or _tracing_state() is not None or _n_modes() or _functorch_level() is not None:
        return None
    if forward_ad._current_level >= 0 or _is_autocast("cpu") or _is_autocast("cuda") or x.layout is not torch.strided:
        return None
    if x.device.type != "cpu" or not found.is_valid(layer, x):
        return None
    layer.__dict__["_seen_spatial"] = tuple(x.shape[2:])
    y: Tensor = found.call(x, layer._parameters["bias"])
    return y
