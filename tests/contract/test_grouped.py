"""Products grouped by their right sides."""

import pytest
import torch

from tensortrain.contract.grouped import can_group, grouped_product


def operands(counts, dtype=torch.float64):
    states = torch.randn(sum(counts), 3, 4, dtype=dtype, requires_grad=True)
    table = torch.randn(len(counts), 4, 5, dtype=dtype, requires_grad=True)
    return states, table


def gathered(states, table, counts):
    digits = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return torch.bmm(states, table[digits])


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("counts", [(2, 3), (0, 4, 0, 1), (5,), (0, 0), (1, 1, 1)])
def test_the_same_as_one_slice_for_every_state(counts, dtype):
    states, table = operands(counts, dtype)
    found, expected = grouped_product(states, table, counts), gathered(states, table, counts)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(grouped_product(states, table, counts), expected, rtol=1e-13, atol=1e-13)
    seed = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, (states, table), seed),
        torch.autograd.grad(expected, (states, table), seed),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_first_and_second_derivatives():
    counts = (2, 0, 1)
    assert torch.autograd.gradcheck(lambda s, t: grouped_product(s, t, counts), operands(counts))
    assert torch.autograd.gradgradcheck(lambda s, t: grouped_product(s, t, counts), operands(counts))


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_side_frozen(frozen):
    counts = (2, 1)
    pair = operands(counts)
    pair[frozen].requires_grad_(False)
    grouped_product(*pair, counts).square().sum().backward()
    assert pair[frozen].grad is None
    again = [one.detach().clone().requires_grad_(one.requires_grad) for one in pair]
    gathered(*again, counts).square().sum().backward()
    torch.testing.assert_close(pair[1 - frozen].grad, again[1 - frozen].grad, rtol=1e-12, atol=1e-12)


def test_many_gradients_at_once():
    counts = (2, 0, 1)
    pair = operands(counts)
    found = grouped_product(*pair, counts)
    seeds = torch.randn(3, *found.shape, dtype=found.dtype)
    together = torch.autograd.grad(found, pair, seeds, is_grads_batched=True, retain_graph=True)
    for k, seed in enumerate(seeds):
        for one, other in zip(together, torch.autograd.grad(found, pair, seed, retain_graph=True), strict=True):
            torch.testing.assert_close(one[k], other, rtol=1e-12, atol=1e-12)


def test_strided_operands():
    counts = (2, 2)
    states, table = operands(counts)
    turned = states.detach().transpose(1, 2).contiguous().transpose(1, 2)
    other = table.detach().transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(grouped_product(turned, other, counts), gathered(states, table, counts).detach())


def test_what_looks_on_sees_ordinary_products():
    assert can_group()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not can_group()
    with torch.autograd.forward_ad.dual_level():
        assert not can_group()
    seen = []
    torch.func.grad(lambda t: (seen.append(can_group()), t.sum())[1])(torch.ones(2))
    assert seen == [False]


def test_many_rows_under_transforms(monkeypatch):
    """Enough ids that they are grouped where they can be."""
    from tensortrain.contract import Chain, chain_lookup, chain_to_dense, lookup

    chain = Chain((4, 4, 4), (5, 5, 5), (1, 8, 8, 1))
    monkeypatch.setattr(lookup, "_pays_to_group", lambda *args: True)
    monkeypatch.setattr(lookup, "lookup_groups", lambda *args: ((0, 1), (1, 2), (2, 3)))
    cores = [torch.randn(shape, dtype=torch.float64) for shape in chain.core_shapes]
    ids = torch.randint(125, (300,))

    def total(*cores):
        return chain_lookup(ids, cores, chain.in_modes).square().sum()

    leaves = [core.clone().requires_grad_() for core in cores]
    expected = torch.autograd.grad(chain_to_dense(leaves).T[ids].square().sum(), leaves)
    for found in (torch.func.grad(total, argnums=(0, 1, 2))(*cores), torch.autograd.grad(total(*leaves), leaves)):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = chain_lookup(ids, [core.float() for core in cores], chain.in_modes)
    torch.testing.assert_close(rows.double(), chain_to_dense(cores).T[ids], rtol=0.1, atol=0.5)
