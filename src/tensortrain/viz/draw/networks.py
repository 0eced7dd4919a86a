"""Diagrams of formats, of layers, and of models that have such layers."""

from __future__ import annotations

import math

from torch import nn

from tensortrain.contract import ChainShape
from tensortrain.errors import KindError
from tensortrain.formats import FactorSpec, NetworkFormat, get_format
from tensortrain.nn.base import FactorizedLayer
from tensortrain.viz.draw.layout import chain, in_rows
from tensortrain.viz.draw.notation import Diagram, sizes_text, stacked

__all__ = ["layer_diagram", "module_diagram", "spec_diagram"]

_MOST_LAYERS = 12


def spec_diagram(spec: FactorSpec, name: str = "") -> Diagram:
    """The weight of a format, outputs up and inputs down; kernel positions count as inputs."""
    one = spec.one_group()
    format = get_format(spec.format)
    shape, network = format.chain(one), format.network(one) if isinstance(format, NetworkFormat) else None
    if shape is not None:
        drawn = _of_chain(shape, one)
    elif network is not None:
        drawn = in_rows(network.cores, network.out_legs, network.in_legs, dict(network.sizes))
    else:
        drawn = _two_maps(one)
    groups = f", {spec.weight.groups} groups" if spec.weight.groups > 1 else ""
    dense = sizes_text(spec.weight.dense_shape)
    words = f"{name or spec.format}: {dense}{groups}, {spec.n_params:,} of {spec.weight.n_params:,} numbers"
    return drawn.named(words)


def _of_chain(shape: ChainShape, spec: FactorSpec) -> Diagram:
    """Modes of size 1 that the chain has and the spec has not are not drawn; kernel positions stand apart."""
    positions = math.prod(spec.weight.kernel)
    up = [_words(m, spec.out_modes, shape.out_modes, 1) for m in shape.out_modes]
    down = [_words(n, spec.in_modes, shape.in_modes, positions) for n in shape.in_modes]
    return chain(shape.ranks, up=up, down=down)


def _words(size: int, own: tuple[int, ...], all_sizes: tuple[int, ...], positions: int) -> str | None:
    if size == 1 and all_sizes != own:
        return None
    has_positions = positions > 1 and size not in own and size % positions == 0 and size // positions in own
    return f"{size // positions}·{positions}" if has_positions else str(size)


def _two_maps(spec: FactorSpec) -> Diagram:
    """A map of channels, a small convolution, a map of channels."""
    sizes = {"i": spec.weight.in_features, "o": spec.weight.out_features, "a": spec.ranks[0], "b": spec.ranks[1]}
    kernel = {f"x{k}": n for k, n in enumerate(spec.weight.kernel)}
    return in_rows((("i", "a"), ("a", *kernel, "b"), ("b", "o")), ("o",), ("i", *kernel), {**sizes, **kernel})


def layer_diagram(layer: FactorizedLayer, name: str = "") -> Diagram:
    """The weight of a layer."""
    return spec_diagram(layer.spec, f"{name or type(layer).__name__}, {layer.spec.format}")


def module_diagram(module: nn.Module) -> Diagram:
    """Every factorized layer of a model, one below the other.

    Raises:
        KindError: It has none.
    """
    found = [(name, part) for name, part in module.named_modules() if isinstance(part, FactorizedLayer)]
    if not found:
        raise KindError(
            f"a picture needs cores: {type(module).__name__} has no factorized layer, expected one or more. Compress "
            "it first, or draw one of its parts."
        )
    return stacked([layer_diagram(layer, name) for name, layer in found[:_MOST_LAYERS]])
