"""A run of cores that the kernels merge where it shall lie is the one that operations of torch make."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tensortrain.contract import chain_to_dense, kernels, merge_cores
from tensortrain.contract.merge import merge_steps

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="the kernels are not built")


def random_run(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = random.Random(seed)
    order = draw.randint(2, 5)
    ends = (draw.choice([1, 3]), draw.choice([1, 2]))
    ranks = (ends[0], *(draw.choice([1, 3, 8, 21]) for _ in range(order - 1)), ends[1])
    cores = [
        torch.randn(ranks[k], draw.randint(1, 9), draw.randint(1, 9), ranks[k + 1], dtype=dtype) for k in range(order)
    ]
    if seed % 3 == 0:  # laid out otherwise
        cores = [core.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0) for core in cores]
    return [core.requires_grad_() for core in cores]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(16))
def test_a_run_and_its_gradients_are_those_of_torch(seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    cores = random_run(seed, dtype)
    merged = merge_cores(cores, [(0, len(cores))])[0]
    with kernels.python_only():
        expected = merge_cores(cores, [(0, len(cores))])[0]
    grad = torch.randn_like(expected)
    pairs = [(merged, expected)]
    found, wanted = torch.autograd.grad(merged, cores, grad), torch.autograd.grad(expected, cores, grad)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    for a, b in [*pairs, *zip(found, wanted, strict=True)]:
        assert float((a - b).detach().norm()) <= tolerance * float(b.detach().norm()) + 1e-12


def test_large_products_are_left_to_blas_and_are_the_same() -> None:
    torch.manual_seed(0)
    cores = [torch.randn(1, 12, 40, 33), torch.randn(33, 5, 41, 1)]
    cores = [core.double().requires_grad_() for core in cores]
    expected = torch.einsum("aijr,rklb->ikjl", *cores).reshape(60, 1640)
    found, grad = chain_to_dense(cores), torch.randn(60, 1640, dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, cores, grad), torch.autograd.grad(expected, cores, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_and_many_gradients_at_once() -> None:
    torch.manual_seed(0)
    cores = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((1, 2, 2, 2), (2, 2, 3, 1))]
    assert torch.autograd.gradcheck(lambda *given: chain_to_dense(given), cores)
    assert torch.autograd.gradgradcheck(lambda *given: chain_to_dense(given), cores)
    weight, grads = chain_to_dense(cores), torch.randn(3, 4, 6, dtype=torch.float64)
    at_once = torch.autograd.grad(weight, cores, grads, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(weight, cores, grad, retain_graph=True) for grad in grads]
    for k, found in enumerate(at_once):
        torch.testing.assert_close(found, torch.stack([one[k] for one in one_by_one]))


def test_transforms_see_every_product() -> None:
    cores = [torch.randn(1, 2, 3, 2), torch.randn(2, 2, 2, 1)]

    def written_out(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.einsum("aijr,rklb->ikjl", a, b).reshape(4, 6)

    found = torch.func.jacrev(lambda *given: chain_to_dense(given), argnums=(0, 1))(*cores)
    for one, exact in zip(found, torch.func.jacrev(written_out, argnums=(0, 1))(*cores), strict=True):
        torch.testing.assert_close(one, exact)
    firsts = torch.stack([cores[0], torch.randn(1, 2, 3, 2)])
    many = torch.func.vmap(lambda first: chain_to_dense([first, cores[1]]))(firsts)
    for one, first in zip(many, firsts, strict=True):
        torch.testing.assert_close(one, written_out(first, cores[1]))


def test_steps_are_those_of_the_order() -> None:
    assert merge_steps(((1, 4, 4, 2), (2, 4, 4, 2), (2, 4, 4, 1))) in ([0, 1, 2, 0, 2, 3], [1, 2, 3, 0, 1, 3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64], ids=str)
def test_dtypes_that_kernels_do_not_know_are_merged_by_torch(dtype: torch.dtype) -> None:
    cores = [torch.randn(1, 2, 3, 2).to(dtype).requires_grad_(), torch.randn(2, 2, 2, 1).to(dtype)]
    assert "_Merged" not in type(chain_to_dense(cores).grad_fn.next_functions[0][0]).__name__


@pytest.mark.parametrize("seed", [1, 4, 5, 6])
def test_frozen_cores_of_a_run_get_no_gradient(seed: int) -> None:
    torch.manual_seed(seed)
    cores = random_run(seed)
    grad = torch.randn_like(merge_cores(cores, [(0, len(cores))])[0].detach())
    wanted = torch.autograd.grad(merge_cores(cores, [(0, len(cores))])[0], cores, grad)
    for frozen in range(len(cores)):
        some = [core.detach().requires_grad_(k != frozen) for k, core in enumerate(cores)]
        merge_cores(some, [(0, len(cores))])[0].backward(grad)
        assert some[frozen].grad is None
        for k, (one, other) in enumerate(zip(some, wanted, strict=True)):
            if k != frozen:
                torch.testing.assert_close(one.grad, other, rtol=1e-13, atol=1e-13)
