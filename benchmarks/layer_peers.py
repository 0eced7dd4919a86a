"""One linear layer in every library: the same modes, ranks, cores and bias, and every way the library offers to run it.

All take ``x (b, N)`` and give ``y (b, M)``. Cores are filled in before anything is timed.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import tensortrain as tt

__all__ = ["DENSE", "OURS", "PEER_NAMES", "Way", "dense_way", "our_way", "peer_ways"]

DENSE, OURS = "nn.Linear", "tensortrain"


@dataclass(frozen=True)
class Way:
    """One way of one library.

    Attributes:
        forward: From ``x (b, N)`` to ``y (b, M)``.
        cores: The parameters besides the bias.
        in_our_layout: From core ``k`` of the library to ``(r, i, j, s)``; None where the weight is dense.
        enter: Switches global settings that this way needs; called before each call, not timed.
    """

    library: str
    label: str
    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    cores: Sequence[Tensor]
    bias: Tensor
    in_our_layout: Callable[[Tensor, int], Tensor] | None = None
    enter: Callable[[], None] | None = None

    @property
    def name(self) -> str:
        return f"{self.library} {self.label}".strip()


def dense_way(weight: Tensor, bias: Tensor) -> Way:
    """``torch.nn.Linear`` with this weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta").to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return Way(DENSE, "", layer, layer, (layer.weight,), layer.bias)


def our_way(layer: tt.nn.Linear) -> Way:
    """The public layer as it is."""
    assert layer.bias is not None
    return Way(OURS, "", layer, layer, list(layer.cores), layer.bias, _as_it_is)


def peer_ways(layer: tt.nn.Linear, peers: str = "all") -> tuple[list[Way], dict[str, str]]:
    """The ways of the peers asked for ("all", "none" or names with commas), and why some libraries are missing."""
    names = {"all": PEER_NAMES, "none": ()}.get(peers, tuple(peers.split(",")))
    found: list[Way] = []
    absent = {}
    for name in names:
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # tednet prints
                warnings.simplefilter("ignore")
                ways = _PEERS[name](layer)
            for way in ways:
                _fill_in(way, layer)
            found += ways
        except ImportError as error:
            absent[name] = f"not installed ({error}): see README.md"
    return found, absent


def _fill_in(way: Way, layer: tt.nn.Linear) -> None:
    assert way.in_our_layout is not None
    assert layer.bias is not None
    with torch.no_grad():
        for k, (theirs, ours) in enumerate(zip(way.cores, layer.cores, strict=True)):
            view = way.in_our_layout(theirs, k)
            assert view.data_ptr() == theirs.data_ptr(), "cores must be filled in through a view"
            view.copy_(ours)
        way.bias.copy_(layer.bias.reshape(way.bias.shape))


def _as_it_is(core: Tensor, k: int) -> Tensor:
    return core


def _torchtt(layer: tt.nn.Linear) -> list[Way]:
    import torchtt.nn

    module = torchtt.nn.LinearLayerTT(list(layer.in_modes), list(layer.out_modes), list(layer.ranks))
    scripted = torch.jit.script(module)
    return [_torchtt_way(label, run, module) for label, run in (("", module), ("scripted", scripted))]


def _torchtt_way(label: str, run: nn.Module, module: Any) -> Way:
    modes = tuple(module.size_in)

    def forward(x: Tensor) -> Tensor:
        y: Tensor = run(x.reshape(x.shape[0], *modes))
        return y.reshape(x.shape[0], -1)

    return Way("torchTT", label, run, forward, list(module.cores), module.bias, _as_it_is)


def _tednet(layer: tt.nn.Linear) -> list[Way]:
    from tednet.tnn.tensor_train import TTLinear

    module: Any = TTLinear(layer.in_modes, layer.out_modes, layer.ranks[1:-1])
    nodes = [getattr(module, f"node{k}") for k in range(len(layer.in_modes))]

    def in_our_layout(node: Tensor, k: int) -> Tensor:
        if node.ndim == 4:
            return node.permute(2, 1, 0, 3)  # j i r s
        return node.permute(1, 0, 2)[None] if k == 0 else node.permute(2, 1, 0)[..., None]  # j i s; j i r

    return [Way("tednet", "", module, module, nodes, module.bias, in_our_layout)]


def _tensorly_torch(layer: tt.nn.Linear) -> list[Way]:
    import tltorch

    def built(implementation: str) -> Any:
        return tltorch.FactorizedLinear(
            tuple(layer.in_modes),
            tuple(layer.out_modes),
            bias=True,
            factorization="blocktt",
            rank=list(layer.ranks),
            implementation=implementation,
        )

    settings = {
        ("factorized", "left to right"): _einsum_settings(torch_paths=False, plugin=False),
        ("factorized", "torch's opt_einsum"): _einsum_settings(torch_paths=True, plugin=False),
        ("factorized", "opt_einsum plugin"): _einsum_settings(torch_paths=True, plugin=True),
        ("reconstructed", ""): _einsum_settings(torch_paths=True, plugin=False),
        ("reconstructed", "opt_einsum plugin"): _einsum_settings(torch_paths=True, plugin=True),
    }
    modules = {implementation: built(implementation) for implementation in ("factorized", "reconstructed")}
    return [
        Way(
            "TensorLy-Torch",
            ", ".join(filter(None, (implementation, paths))),
            modules[implementation],
            modules[implementation],
            list(modules[implementation].weight.factors),
            modules[implementation].bias,
            _as_it_is,
            enter,
        )
        for (implementation, paths), enter in settings.items()
    ]


def _einsum_settings(*, torch_paths: bool, plugin: bool) -> Callable[[], None]:
    """Whether ``torch.einsum`` looks for a path itself, and whether tensorly's plugin keeps one per shape."""
    from tensorly import plugins

    def enter() -> None:
        torch.backends.opt_einsum.enabled = torch_paths and torch.backends.opt_einsum.is_available()
        if plugin:
            plugins.use_opt_einsum()
        else:
            plugins.use_default_einsum()

    return enter


_PEERS: dict[str, Callable[[tt.nn.Linear], list[Way]]] = {
    "torchTT": _torchtt,
    "tednet": _tednet,
    "TensorLy-Torch": _tensorly_torch,
}
PEER_NAMES = tuple(_PEERS)
