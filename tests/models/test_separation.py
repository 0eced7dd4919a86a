"""Separation ranks and min-cuts: the table of arXiv:1710.09431 and all cuts of trees, exactly."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tensortrain.errors import DataError, KindError, ModeIndexError, RankError
from tensortrain.models import RecurrentArithmeticCircuit, min_cut_rank, separation_rank
from tensortrain.testing import ModelSuite

P = 2**31 - 1
RANKS = [  # T, M, R, and the ranks of one, two and three layers
    (2, 3, 3, 3, 3, 3),
    (4, 2, 2, 2, 4, 4),
    (4, 3, 2, 2, 6, 6),
    (4, 3, 3, 3, 9, 9),
    (4, 4, 3, 3, 12, 12),
    (6, 2, 2, 2, 8, 8),
    (6, 3, 2, 2, 8, 18),
    (6, 3, 3, 3, 27, 27),
    (6, 4, 3, 3, 30, 48),
    (6, 4, 4, 4, 64, 64),
    (8, 2, 2, 2, 10, 16),
    (8, 3, 2, 2, 10, 54),
    (8, 3, 3, 3, 45, 81),
    (8, 3, 4, 4, 81, 81),
]


class TestCircuit(ModelSuite):
    def make(self, dtype: torch.dtype) -> RecurrentArithmeticCircuit:
        return RecurrentArithmeticCircuit(3, 4, 2, n_outputs=2, dtype=dtype, generator=torch.Generator().manual_seed(0))

    def data(self, dtype: torch.dtype) -> Tensor:
        return torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)

    def exact(self, model: RecurrentArithmeticCircuit, data: Tensor) -> Tensor:
        rows = []
        for sequence in data.double():
            states = [start.detach().clone() for start in model.starts]
            for step in sequence:
                below = step
                for layer in range(2):
                    states[layer] = (model.inputs[layer].detach() @ below) * (
                        model.hidden[layer].detach() @ states[layer]
                    )
                    below = states[layer]
            rows.append(model.output.detach() @ states[-1])
        return torch.stack(rows)

    def learn(self, model: RecurrentArithmeticCircuit, **options: object) -> object:
        generator = torch.Generator().manual_seed(2)
        y = torch.tensor([0, 1, 1, 0, 1])
        return model.fit(self.data(torch.float64), y, n_sweeps=3, batch_size=2, generator=generator, **options)

    def bad(self, model: RecurrentArithmeticCircuit):
        x, y = self.data(torch.float32), torch.tensor([0, 1, 1, 0, 1])
        yield DataError, model.fit, (x, y + 1)
        yield DataError, model.fit, (x, y[:4])
        yield DataError, model.fit, (x[:0], y[:0])
        yield DataError, model.fit, (x * torch.inf, y)
        yield DataError, model.fit, (x, y), {"validation": (x[..., :2], y)}
        yield KindError, RecurrentArithmeticCircuit(3, 4).fit, (x, y)
        yield DataError, model, (self.data(torch.float32)[..., :2],)
        yield DataError, model, (self.data(torch.float32)[:, :0],)
        yield DataError, model.grid_tensor, (0,)


@pytest.mark.parametrize("row", RANKS, ids=str)
def test_memory_grows_with_depth(row: tuple[int, ...]) -> None:
    steps, features, width, *ranks = row
    for depth, seed in itertools.product((1, 2, 3), range(3)):
        grid = RecurrentArithmeticCircuit(features, width, depth).grid_tensor(
            steps, generator=torch.Generator().manual_seed(seed)
        )
        assert grid.shape == (features,) * steps
        found = separation_rank(grid, range(steps // 2), modulus=P)
        assert found == ranks[depth - 1]
        if depth == 1:
            assert found == min(width, features ** (steps // 2))
        if depth == 2:
            assert found >= math.comb(min(features, width) + steps // 2 - 1, steps // 2)


def test_ranks_of_floats_and_of_residues() -> None:
    x = torch.randn(3, 4, 2, dtype=torch.float64)
    assert separation_rank(x, (1,)) == 4
    assert separation_rank(torch.einsum("i,j,k->ijk", x[0, :, 0], x[1, :, 0], x[2, :, 0]), (0, 2)) == 1
    assert separation_rank(torch.zeros(2, 2, dtype=torch.int64), (0,), modulus=7) == 0
    assert separation_rank(torch.tensor([[1, 2], [3, 6]]), (0,), modulus=7) == 1
    assert separation_rank(torch.tensor([[1, 2], [3, 13]]), (0,), modulus=7) == 1  # 13 = 6 mod 7
    with pytest.raises(ModeIndexError, match="different modes"):
        separation_rank(x, (0, 0))
    with pytest.raises(DataError, match="whole numbers"):
        separation_rank(x, (0,), modulus=7)


def binary_tree(sizes: tuple[int, int, int, int]) -> tuple:
    """Eight sites of size m below nodes of r0, pairs of r1, fours of r2."""
    m, r0, r1, r2 = sizes
    level = [(r0, (m, k)) for k in range(8)]
    for bond in (r1, r2, 1):
        level = [(bond, level[k], level[k + 1]) for k in range(0, len(level), 2)]
    return level[0]


def grid_of(tree: tuple, generator: torch.Generator) -> Tensor:
    """A tensor of random residues in the form of the tree: axes are its bond and then its sites in order."""
    if isinstance(tree[1], int):
        return torch.eye(tree[0], dtype=torch.int64)
    children = [grid_of(child, generator) for child in tree[1:]]
    core = torch.randint(P, (tree[0], *[child.shape[0] for child in children]), generator=generator)
    for child in children:  # the first child's axis moves to the end as its sites
        total = torch.zeros(*core.shape[:1], *core.shape[2:], *child.shape[1:], dtype=torch.int64)
        for k in range(child.shape[0]):
            part = core[:, k].reshape(*core.shape[:1], *core.shape[2:], *[1] * (child.ndim - 1)) * child[k] % P
            total = (total + part) % P
        core = total
    return core


@pytest.mark.parametrize("sizes", [(2, 2, 2, 2), (3, 2, 3, 2), (2, 2, 3, 3), (3, 3, 2, 2)])
def test_trees_reach_their_min_cuts(sizes: tuple[int, int, int, int]) -> None:
    tree = binary_tree(sizes)
    grid = grid_of(tree, torch.Generator().manual_seed(0))[0]
    assert grid.shape == (sizes[0],) * 8
    cuts = [rows for n in range(1, 8) for rows in itertools.combinations(range(8), n) if 0 in rows]
    assert len(cuts) == 127
    for rows in cuts:
        assert separation_rank(grid, rows, modulus=P) == min_cut_rank(tree, rows), rows


def test_min_cuts_of_small_trees_by_trying_all() -> None:
    tree = (1, (2, (5, 0), (5, 1)), (7, (3, 2), (1, 3)), (4, 4))
    assert min_cut_rank(tree, (0, 1)) == 2
    assert min_cut_rank(tree, (2, 3)) == 3
    assert min_cut_rank(tree, (4,)) == 4
    assert min_cut_rank(tree, ()) == 1
    assert min_cut_rank(tree, (0, 1, 2, 3, 4)) == 1
    with pytest.raises(ModeIndexError, match="9"):
        min_cut_rank(tree, (9,))
    with pytest.raises(KindError, match="nested tuples"):
        min_cut_rank((1, [2, 0]), (0,))


def strings(half: int) -> tuple[Tensor, Tensor]:
    """All strings of two halves, and whether an odd number of places is 1 in both."""
    bits = torch.arange(2 ** (2 * half))[:, None] >> torch.arange(2 * half) & 1
    return torch.nn.functional.one_hot(bits, 2).float(), (bits[:, :half] * bits[:, half:]).sum(1) % 2


def test_two_layers_learn_what_overlaps() -> None:
    x, y = strings(3)
    model = RecurrentArithmeticCircuit(2, 5, 2, n_outputs=2, generator=torch.Generator().manual_seed(0))
    history = model.fit(x, y, n_sweeps=250, lr=2e-2, batch_size=32, generator=torch.Generator().manual_seed(0))
    assert history.accuracy[-1] == 1.0
    assert torch.equal(model(x).argmax(1), y)  # the scores themselves say the same


@pytest.mark.parametrize("depth,n_steps", [(1, 2000), (2, 300), (3, 2500)])
def test_long_products_stay_finite(depth: int, n_steps: int) -> None:
    model = RecurrentArithmeticCircuit(3, 4, depth, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = 3 * torch.rand(2, n_steps, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        state, exponent = model._last_state(x)
    assert bool(torch.isfinite(state).all())
    assert bool((exponent.abs() > 1024).all())  # beyond the range of doubles
    assert bool(torch.isfinite(model(x)).all())


def test_half_precision_and_meta() -> None:
    model = RecurrentArithmeticCircuit(3, 4, 2, n_outputs=2, dtype=torch.bfloat16)
    assert model(torch.rand(5, 6, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert RecurrentArithmeticCircuit(3, 4, 2, device="meta").output.device.type == "meta"


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(RankError, match="depth"):
        RecurrentArithmeticCircuit(2, 2, 0)


@pytest.mark.parametrize("modulus", [2, 7, P])
@pytest.mark.parametrize("rank", [0, 1, 31, 32, 33, 70])
def test_exact_ranks_of_large_matrices_are_those_of_their_factors(modulus: int, rank: int) -> None:
    """Triangles with ones on the diagonal have full rank modulo any prime, and so has a product of them."""
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.randint(0, 1000, (rank, n), generator=generator) for n in (90, 75))
    eye = torch.eye(rank, dtype=torch.int64)
    left = torch.cat((left.tril(-1)[:, :rank] + eye, left[:, rank:]), dim=1)
    right = torch.cat((right.tril(-1)[:, :rank] + eye, right[:, rank:]), dim=1)
    product = left.T @ right  # below 2**27
    rows = torch.randperm(90, generator=generator)
    assert separation_rank(product[rows], (0,), modulus=modulus) == rank
    assert separation_rank(product[rows].T, (0,), modulus=modulus) == rank


def test_grids_and_trees_that_are_none_are_refused() -> None:
    grid = torch.eye(4).reshape(2, 2, 2, 2)
    for bad in (lambda: separation_rank(grid * torch.nan, (0,)), lambda: separation_rank(grid.long(), (0,), modulus=9)):
        with pytest.raises(DataError):
            bad()
    assert separation_rank(grid.bfloat16(), (0, 1)) == 4
    for tree in ((1, (2, 0), (2, 0)), (1, (-2, 0), (2, 1))):
        with pytest.raises(KindError):
            min_cut_rank(tree, (0,))
