"""Hops of a convolution in traced programs: chosen by prediction alone, and found by name, as a compiler wants them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensortrain.contract import CostModel
from tensortrain.contract.hops import Load, hop_candidates
from tensortrain.formats import FactorSpec, get_format
from tensortrain.nn.conv.options import ConvOptions
from tensortrain.nn.conv.ways import HopsWay
from tensortrain.system.tracing import constant_when_traced, static_power_of_two

__all__ = ["dense_work", "kept_kernel_wins", "name_when_traced", "rounded", "run_hops"]

_MANY = 32  # examples, or positions along an axis, where a traced program takes any number


@dataclass(frozen=True)
class TracedHops:
    """Hops of one convolution.

    Args:
        way: The hops.
        options: Of the convolution.
        uses_dense: Whether the dense kernel, rebuilt in every call, is predicted to be faster.
    """

    way: HopsWay
    options: ConvOptions
    uses_dense: bool

    def __call__(self, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """Convolve, differentiably."""
        prepared = self.way.prepare(None, cores, self.options)  # type: ignore[arg-type]
        return self.way.run(x, prepared, bias, self.options, None)  # type: ignore[arg-type]


_KNOWN: dict[str, TracedHops] = {}


def rounded(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes as powers of two, where they are fixed in the program; else they are taken for 32."""
    return tuple(static_power_of_two(size) or _MANY for size in sizes)


def dense_work(spec: FactorSpec, load: Load, model: CostModel) -> tuple[int, float]:
    """Flops and predicted seconds of a convolution through the dense kernel; in training it is built in every call."""
    weight, n_ins, n_outs = spec.weight, math.prod(load.ins), math.prod(load.outs)
    flops = 2 * load.batch * (n_ins if load.transposed else n_outs) * weight.n_params
    channels = load.batch, weight.groups, weight.in_features, weight.out_features // weight.groups
    kernel = math.prod(weight.kernel)
    seconds = model.convolution_s(flops, channels, kernel, n_ins, n_outs, itemsize=load.itemsize)
    if not load.training:
        return flops, seconds
    built = 2 * weight.n_params * max(spec.ranks), weight.n_params * load.itemsize
    return flops, 3 * (seconds + model.conv_s(*built))


def name_when_traced(
    spec: str,
    options: ConvOptions,
    batch: int,
    positions: tuple[tuple[int, ...], tuple[int, ...]],
    core: Tensor,
    allow_dense: bool,
) -> str:
    """How to run in a traced program: "dense", "" where the cores of the format are no network, or for ``run_hops``.

    Args:
        spec: See ``told_spec``.
        options: Of the convolution.
        batch: Examples.
        positions: Before and after, see ``rounded``.
        core: One of the cores.
        allow_dense: Whether the dense kernel may be built.
    """
    device_type = "cuda" if core.is_cuda else "cpu"
    return _name_of_hops(
        spec,
        _numbers(options),
        rounded((batch,))[0],
        positions[0],
        positions[1],
        core.element_size(),
        device_type,
        allow_dense,
    )


def kept_kernel_wins(
    spec: str, options: ConvOptions, batch: int, positions: tuple[tuple[int, ...], tuple[int, ...]], core: Tensor
) -> bool:
    """Whether at inference a dense kernel that is kept from call to call is predicted to be faster than hops.

    Arguments as ``name_when_traced``.
    """
    return _kept_kernel_wins(
        spec, _numbers(options), rounded((batch,))[0], positions[0], positions[1], core.element_size()
    )


def run_hops(name: str, x: Tensor, bias: Tensor | None, *cores: Tensor) -> Tensor:
    """Convolve ``(b, C, *positions)``, differentiably; every call merges its cores.

    One step of the program for the compiler's first pass, which would guard each number of a plan that it looks at.
    """
    return _KNOWN[name](x, cores, bias)


def _numbers(options: ConvOptions) -> tuple[Any, ...]:
    return (
        options.kernel,
        options.stride,
        options.padding,
        options.dilation,
        options.padding_mode,
        options.output_padding,
    )


@constant_when_traced
def _kept_kernel_wins(
    spec: str, how: tuple[Any, ...], batch: int, ins: tuple[int, ...], outs: tuple[int, ...], itemsize: int
) -> bool:
    options, model, made = ConvOptions(*how), CostModel.reference("cpu"), FactorSpec.from_dict(json.loads(spec))
    load = _load(options, batch, (ins, outs), itemsize, training=False)
    found = _found(made, options, load, model)
    return found is not None and found.uses_dense


def _load(
    options: ConvOptions,
    batch: int,
    positions: tuple[tuple[int, ...], tuple[int, ...]],
    itemsize: int,
    *,
    training: bool,
) -> Load:
    still = frozenset(axis for axis in range(options.n_axes) if options.is_still(axis))
    return Load(batch, *positions, still, options.is_transposed, training=training, itemsize=itemsize)


@constant_when_traced  # plain arguments and a plain answer
def _name_of_hops(
    spec: str,
    how: tuple[Any, ...],
    batch: int,
    ins: tuple[int, ...],
    outs: tuple[int, ...],
    itemsize: int,
    device_type: str,
    allow_dense: bool,
) -> str:
    torch.compiler.allow_in_graph(run_hops)  # now that a compiler is there
    asked = repr((spec, how, batch, ins, outs, itemsize, device_type))
    name = f"hops_{hashlib.sha256(asked.encode()).hexdigest()[:24]}"
    if name not in _KNOWN:
        options = ConvOptions(*how)
        load = _load(options, batch, (ins, outs), itemsize, training=True)
        found = _found(FactorSpec.from_dict(json.loads(spec)), options, load, CostModel.reference(device_type))
        if found is None:
            return ""
        _KNOWN[name] = found
    return "dense" if allow_dense and _KNOWN[name].uses_dense else name


def _found(spec: FactorSpec, options: ConvOptions, load: Load, model: CostModel) -> TracedHops | None:
    network, groups = get_format(spec.format).conv_network(spec.one_group()), spec.weight.groups
    network = None if network is None else network.in_groups(groups)
    hops = None if network is None else next(iter(hop_candidates(network, load, model)), None)
    if network is None or hops is None:
        return None
    way = HopsWay(groups, 0, 0, 0.0, network, hops)
    is_last = way.can_be_last() and len(load.ins) < 3
    uses_dense = dense_work(spec, load, model)[1] < sum(hop.seconds for hop in hops)
    return TracedHops(way.in_layout("last" if is_last else "plain"), options, uses_dense)
