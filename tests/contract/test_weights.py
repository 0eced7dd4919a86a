"""Weights of a network made in one call are those made product by product, and so are their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tensortrain.contract.hops import ConvNetwork
from tensortrain.contract.weights import Wanted, made_weights, recipe_of
from tensortrain.system.native import library, python_only
from tensortrain.testing import rel_error

# Legs of cores with a bond of three, one that is shared by all, groups, and a core that is only sorted.
NETWORKS: dict[str, tuple[ConvNetwork, tuple[Wanted, ...]]] = {}


def _network(name: str, cores: tuple[str, ...], sizes: dict[str, int], *wanted: tuple[tuple[int, ...], str]) -> None:
    network = ConvNetwork(tuple(tuple(legs) for legs in cores), (), (), (), tuple(sizes.items()))
    made = []
    for which, legs in wanted:
        made.append(Wanted(which, tuple(legs), tuple(sizes[leg] for leg in legs)))
    NETWORKS[name] = network, tuple(made)


_network("chain", ("oxb", "bpiyc", "cjq"), {"o": 3, "x": 3, "b": 4, "p": 2, "i": 5, "y": 2, "c": 3, "j": 2, "q": 4},
         ((0, 1, 2), "opqijxy"))  # fmt: skip
_network("shared bond", ("or", "ir", "xr", "yr"), {"o": 6, "i": 5, "x": 3, "y": 2, "r": 4}, ((0, 1, 2, 3), "oixy"))
_network("ring", ("aob", "bic", "cxa"), {"a": 2, "b": 3, "c": 2, "o": 8, "i": 6, "x": 3}, ((0, 1, 2), "iox"))
_network("groups", ("gai", "gbax", "gob"), {"g": 2, "a": 3, "b": 2, "i": 5, "o": 4, "x": 3}, ((0, 1, 2), "goix"))
_network("several", ("ai", "bax", "ob"), {"a": 3, "b": 4, "i": 7, "o": 16, "x": 9}, ((0, 1), "bix"), ((2,), "bo"))
_network("one core", ("ixo",), {"i": 4, "x": 3, "o": 5}, ((0,), "oix"))
_network("large", ("ar", "rbs", "sc"), {"a": 130, "r": 20, "b": 40, "s": 16, "c": 33}, ((0, 1, 2), "cab"))


@pytest.fixture(autouse=True)
def _kernels_and_dtype(default_dtype: torch.dtype) -> None:
    if library() is None:
        pytest.skip("the kernels are not built")
    torch.set_default_dtype(default_dtype)
    return


def cores_of(network: ConvNetwork, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    known = dict(network.sizes)
    return [torch.randn([known[leg] for leg in legs], dtype=dtype, requires_grad=True) for legs in network.cores]


def by_kernels(name: str, cores: Any) -> tuple[Tensor, ...]:
    network, wanted = NETWORKS[name]
    return made_weights(network.cores, network.sizes, wanted, cores)


def recorded(name: str, cores: Any) -> tuple[Tensor, ...]:
    with python_only():
        return by_kernels(name, cores)


def gradients(weights: tuple[Tensor, ...], cores: Any, **options: Any) -> tuple[Tensor, ...]:
    total = sum((weight * torch.linspace(-1, 2, weight.numel(), dtype=weight.dtype).reshape(weight.shape)).sum()
                for weight in weights)  # fmt: skip
    return torch.autograd.grad(total, cores, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_and_gradients(name: str, dtype: torch.dtype) -> None:
    network, wanted = NETWORKS[name]
    assert recipe_of(network.cores, network.sizes, wanted) is not None
    cores, tolerance = cores_of(network, dtype), 1e-12 if dtype == torch.float64 else 1e-5
    found, exact = by_kernels(name, cores), recorded(name, cores)
    for one, other in zip(found, exact, strict=True):
        assert rel_error(one, other) <= tolerance
        assert one.stride() == torch.empty(one.shape).stride()
        assert type(one.grad_fn).__name__ != type(other.grad_fn).__name__  # the kernels made it
    for one, other in zip(gradients(found, cores), gradients(exact, cores), strict=True):
        assert rel_error(one, other) <= tolerance


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "large"])
def test_second_derivatives(name: str) -> None:
    cores = cores_of(NETWORKS[name][0])

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        return by_kernels(name, given)

    assert torch.autograd.gradcheck(run, cores, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, cores)


@pytest.mark.parametrize("name", NETWORKS)
def test_cores_in_any_layout_and_shape_some_of_them_frozen(name: str) -> None:
    network, _ = NETWORKS[name]
    cores = cores_of(network)
    other = [core.detach().movedim(0, -1).contiguous().movedim(-1, 0) for core in cores]
    other[0] = other[0].flatten()
    for core in other[1:]:
        core.requires_grad_()
    other = [core.requires_grad_(k > 0 or len(cores) == 1) for k, core in enumerate(other)]
    kept = [k for k, core in enumerate(other) if core.requires_grad]
    found = gradients(by_kernels(name, other), [other[k] for k in kept])
    exact = gradients(recorded(name, cores), [cores[k] for k in kept])
    for one, another in zip(found, exact, strict=True):
        torch.testing.assert_close(one.reshape(another.shape), another)


def test_a_weight_that_nobody_uses() -> None:
    network, _ = NETWORKS["several"]
    cores = cores_of(network)
    first, second = by_kernels("several", cores)
    found = torch.autograd.grad(second.square().sum(), cores, allow_unused=True)
    torch.testing.assert_close(found[2], 2 * cores[2].detach())
    assert all(one is None or one.abs().max() == 0 for one in found[:2])
    del first


def test_what_must_be_seen_is_recorded() -> None:
    network, wanted = NETWORKS["chain"]
    cores = cores_of(network)
    exact = recorded("chain", cores)[0]
    many = torch.func.vmap(lambda *some: by_kernels("chain", some)[0])(*(torch.stack([core, core]) for core in cores))
    torch.testing.assert_close(many[1], exact)
    with torch.no_grad():
        torch.testing.assert_close(by_kernels("chain", [core.to(torch.complex128) for core in cores])[0].real, exact)
    _, tangent = torch.func.jvp(
        lambda *some: by_kernels("chain", some)[0], tuple(cores), tuple(map(torch.ones_like, cores))
    )
    assert tangent.shape == exact.shape
    assert made_weights(network.cores, network.sizes, wanted, [core.to("meta") for core in cores])[0].is_meta
