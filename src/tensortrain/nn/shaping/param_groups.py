"""Learning rates per core, for optimizers of Adam's kind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from tensortrain.errors import RankError
from tensortrain.formats import FactorSpec, get_format
from tensortrain.nn.base import FactorizedLayer
from tensortrain.nn.shaping.orthogonal import OrthogonalCores

__all__ = ["core_lr_factors", "param_groups"]


def param_groups(model: nn.Module, lr: float, **options: Any) -> list[dict[str, Any]]:
    r"""Parameter groups in which every core learns at the rate that its shape asks for.

    Adam moves each entry by about its learning rate, whatever the gradient, so what a step does to the output grows
    with the fan-in of the core. With ``lr`` right for the dense layer, core k takes

        ``lr_k = lr * (d_in / f_in_k) / n_cores``

    where ``f_in`` is ``n_k r_{k-1}`` for a train, ``d_in`` and ``r`` for the two cores of a low-rank weight, and
    ``d_in`` is the fan-in of the dense weight. Cores count from the first one, which is the paper's order of
    contraction, whatever order a plan takes. An embedding's input is one-hot, so its modes count 1: the factor is
    ``1 / (r_{k-1} n_cores)``. All other parameters, biases among them, learn at ``lr``.

    Args:
        model: Every parameter comes out exactly once, shared ones with the first layer that has them.
        lr: Learning rate of a dense layer.
        **options: Put into every group, such as ``weight_decay``.

    Returns:
        list: Groups ``{"params": [..], "lr": .., **options}``, that of ``lr`` first where there is one.

    Raises:
        RankError: ``lr`` is not a positive number.
        KindError: A layer's format does not tell the fan-ins of its cores.

    Source: Qiu et al., ICML 2024, arXiv:2406.06248, section 3. SGD takes other rates.

    Example:
        >>> layer = tensortrain.nn.Linear(64, 64, bias=False, in_modes=(8, 8), out_modes=(8, 8), rank=4)
        >>> [group["lr"] for group in param_groups(layer, 1.0)]
        [4.0, 1.0]
        >>> optimizer = torch.optim.AdamW(param_groups(layer, 1e-3, weight_decay=0.01))
    """
    if not 0 < lr < math.inf:
        raise RankError(f"a learning rate must be a positive number: found lr={lr!r}. Pass for example 1e-3.")
    factors: dict[int, float] = {}
    for layer in model.modules():
        if isinstance(layer, FactorizedLayer):
            for parameter, factor in _core_factors(layer):
                factors.setdefault(id(parameter), factor)
    by_rate: dict[float, list[nn.Parameter]] = {lr: []}
    for parameter in model.parameters():  # each one once
        by_rate.setdefault(lr * factors.get(id(parameter), 1.0), []).append(parameter)
    return [{"params": params, "lr": rate, **options} for rate, params in by_rate.items() if params]


def core_lr_factors(spec: FactorSpec) -> tuple[float, ...]:
    """Per core, what a dense layer's learning rate is multiplied by.

    Raises:
        KindError: The format does not tell the fan-ins of its cores.
    """
    fans = get_format(spec.format).fan_ins(spec.one_group())
    d_in = 1 if spec.weight.kind == "embedding" else spec.weight.fan_in
    return tuple(d_in / f_in / len(fans) for f_in in fans)


def _core_factors(layer: FactorizedLayer) -> Iterator[tuple[nn.Parameter, float]]:
    for k, factor in enumerate(core_lr_factors(layer.spec)):
        parameters = layer.cores.free(k) if isinstance(layer.cores, OrthogonalCores) else (layer.cores[k],)
        for parameter in parameters:
            yield parameter, factor  # type: ignore[misc]
