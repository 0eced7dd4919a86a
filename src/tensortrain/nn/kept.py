"""Linear layers and embeddings of compiled programs at inference: one operation does what layers do that are called.

A compiled program has no place for what lies between its calls, so that it would merge the cores in each of them. The
operation is given the cores and what is told of the layer. It takes the short way that an earlier call has left; where
there is none, or the cores have changed, it runs a layer that stands in for the one of the program.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from tensortrain.formats import FactorSpec
from tensortrain.system.native import library
from tensortrain.system.native.load import loaded

from .cores import are_plain, list_cores
from .keeping import EndsWithCore, can_keep, makes_known
from .runner import Runner

if TYPE_CHECKING:
    from .base import FactorizedLayer

__all__ = [
    "are_served",
    "forget_kept_ways",
    "kept_bytes",
    "multiply_by_kept_weights",
    "rows_of_kept_tables",
    "runs_by_kept",
    "told_spec",
    "what_stands_in",
]

Kind = TypeVar("Kind", bound=type)
_PLAIN = (Tensor, nn.Parameter)
_KINDS: dict[str, Any] = {}  # by kind of weight
_RUNNERS: dict[int, dict[str, Runner]] = {}  # by address of the first core, and what is told of the layer


def what_stands_in(kind: str) -> Any:
    """Decorator of the class of layers that stand in for those with this kind of weight."""

    def note(layer: Kind) -> Kind:
        _KINDS[kind] = layer
        return layer

    return note


# -- in the program -----------------------------------------------------------------------------------


def told_spec(spec: FactorSpec) -> str:
    """A spec as a traced program can hand it on."""
    return json.dumps(spec.to_dict())


def runs_by_kept(layer: FactorizedLayer, others: Sequence[Tensor]) -> bool:
    """Whether a program that is traced runs the layer by the operations below: where no gradients are wanted.

    What is exported is for other machines and processes, and for weights that come later.

    Args:
        layer: With plain cores, or the answer is no.
        others: Input and bias, which must have the dtype of the cores; none for an input of ids.
    """
    if torch.is_grad_enabled() or not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    if layer.stand_ins is not None or torch.is_autocast_enabled("cpu") or not are_plain(layer.cores):
        return False
    return are_served(others, list_cores(layer.cores)) and can_keep()


def are_served(tensors: Sequence[Tensor], cores: Sequence[Tensor]) -> bool:
    """Whether the operations take these beside cores, which have to be there from call to call."""
    for core in cores:
        if type(core) is not nn.Parameter:
            return False
    for one in (*tensors, *cores):  # subclasses see every operation
        if one.device.type != "cpu" or one.dtype != cores[0].dtype or type(one) not in _PLAIN:
            return False
    return True


def multiply_by_kept_weights(layer: FactorizedLayer, x: Tensor) -> Tensor:
    """The product with ``(..., N)`` and the bias, without gradients."""
    n_out, cores = layer.spec.weight.out_features, list_cores(layer.cores)
    y: Tensor = torch.ops.tensortrain.multiply_by_kept_weights(x, layer.bias, cores, n_out, _told(layer))
    return y  # typed


def rows_of_kept_tables(layer: FactorizedLayer, ids: Tensor) -> Tensor:
    """The rows that the cores make, without gradients."""
    n_out, cores = layer.spec.weight.out_features, list_cores(layer.cores)
    rows: Tensor = torch.ops.tensortrain.rows_of_kept_tables(ids, cores, n_out, _told(layer))
    return rows


def _told(layer: FactorizedLayer) -> str:
    return f"{layer.implementation}|{layer.dense_limit_bytes}|{layer.may_time_plans}|{layer._told_spec}"


@makes_known
def _make_known(kernels: Any) -> None:
    kernels.know_way_runner(_ran)
    torch.library.register_fake("tensortrain::multiply_by_kept_weights", _product_alone)
    torch.library.register_fake("tensortrain::rows_of_kept_tables", _rows_alone)


def _product_alone(x: Tensor, bias: Tensor | None, cores: Sequence[Tensor], n_out: int, told: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], n_out))  # any number of rows


def _rows_alone(ids: Tensor, cores: Sequence[Tensor], n_out: int, told: str) -> Tensor:
    return cores[0].new_empty((*ids.shape, n_out))


# -- while it runs ------------------------------------------------------------------------------------


def _ran(told: str, input: Tensor, bias: Tensor | None, cores: Sequence[Tensor]) -> Tensor:
    """What the layer gives; the short way to it is left for the next call."""
    layer: Any = copy.copy(_bare_layer(told))
    layer.runner = _runner_of(told, cores[0], layer)
    layer._parameters = {**layer._parameters, "bias": bias}
    layer._modules = {"cores": nn.ParameterList(cores)}
    with torch.no_grad():
        output: Tensor = layer.forward(input)
    kernels, way = library(), layer.runner.way
    if kernels is not None and cores[0]._cdata in _RUNNERS:
        if isinstance(way, kernels.ShortWay):
            kernels.keep_short_way(cores[0], told, way)
        elif isinstance(way, kernels.RowsWay):
            kernels.keep_rows_way(cores[0], told, way)
    return output


@lru_cache(maxsize=256)
def _bare_layer(told: str) -> Any:
    """The layer that stands in, without cores."""
    implementation, limit, may_time, spec_told = told.split("|", 3)
    spec = FactorSpec.from_dict(json.loads(spec_told))
    sizes, how = (spec.weight.in_features, spec.weight.out_features), {"init": None, "device": "meta"}
    layer = _KINDS[spec.weight.kind](*sizes, **spec.keywords(), implementation=implementation, **how)
    layer.dense_limit_bytes, layer.may_time_plans = int(limit), may_time == "True"
    return layer


def _runner_of(told: str, core: Tensor, layer: FactorizedLayer) -> Runner:
    """The runner that goes with the core."""
    address = core._cdata
    if _ENDS.begin(core):
        _RUNNERS[address] = {}
    known = _RUNNERS[address]
    if told not in known:
        known[told] = layer._make_runner()
    return known[told]


def forget_kept_ways(cores: Sequence[Tensor]) -> None:
    """Let go of what was kept of these cores."""
    _ENDS.forget(cores)


def kept_bytes(cores: Sequence[Tensor]) -> int:
    """Bytes of what is kept of these cores."""
    known = _RUNNERS.get(cores[0]._cdata, {}) if _RUNNERS and len(cores) else {}
    return sum(runner.cache.nbytes for runner in known.values())


def _end(address: int) -> None:
    kernels = loaded()
    if kernels is not None:
        kernels.forget_kept_ways(address)
    for runner in _RUNNERS.pop(address, {}).values():
        runner.forget()


_ENDS = EndsWithCore(_end)
