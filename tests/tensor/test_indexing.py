"""Indexing and setting agree with NumPy on whatever index."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensortrain.errors import KindError, ModeIndexError, ShapeError
from tensortrain.tensor import TensorTrain, randn, tt_svd
from tensortrain.testing import rel_error


@st.composite
def indexed(draw):
    """A shape and an index for it."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    points = draw(st.sampled_from([(2,), (3,), (2, 2), (1,)]))
    entries = []
    for n in shape:
        kind = draw(st.sampled_from(["all", "int", "slice", "list", "mask", "none"]))
        if kind == "none":
            entries.append(None)
            kind = "all"
        if kind == "all":
            entries.append(slice(None))
        elif kind == "int":
            entries.append(draw(st.integers(-n, n - 1)))
        elif kind == "slice":
            ends = st.one_of(st.none(), st.integers(-n - 1, n + 1))
            entries.append(slice(draw(ends), draw(ends), draw(st.sampled_from([None, 1, 2, -1, -2, 3]))))
        elif kind == "list":
            size = int(np.prod(points))
            flat = draw(st.lists(st.integers(-n, n - 1), min_size=size, max_size=size))
            entries.append(np.array(flat).reshape(points))
        else:
            entries.append(np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n))))
    cut = draw(st.integers(0, len(entries)))
    if draw(st.booleans()):
        entries = [*entries[:cut], ...]
    return shape, tuple(entries)


@settings(max_examples=300, deadline=None)
@given(case=indexed())
def test_getting_agrees_with_numpy(case):
    shape, key = case
    x = randn(shape, (2,) * (len(shape) - 1), dtype=torch.float64)
    dense = x.to_dense().numpy()
    try:
        expected = dense[key]
    except IndexError:
        with pytest.raises((ShapeError, ModeIndexError)):
            x[key]
        return
    found = x[key]
    full = found if isinstance(found, torch.Tensor) else found.to_dense()
    assert tuple(full.shape) == expected.shape
    assert rel_error(full, torch.from_numpy(np.array(expected))) <= 1e-13


@settings(max_examples=200, deadline=None)
@given(case=indexed(), seed=st.integers(0, 100))
def test_setting_agrees_with_numpy(case, seed):
    shape, key = case
    if any(entry is None for entry in key):
        return
    x = randn(shape, (2,) * (len(shape) - 1), dtype=torch.float64)
    dense = x.to_dense().numpy().copy()
    before = dense.copy()
    try:
        region = dense[key].shape
    except IndexError:
        return
    value = np.random.default_rng(seed).normal(size=region)
    lists = sum(isinstance(entry, np.ndarray) for entry in key)
    ints = sum(isinstance(entry, int) for entry in key)
    try:
        found = x.at[key].set(torch.from_numpy(value))
    except KindError:
        assert lists >= 1  # some lists beside slices
        assert lists + ints < len(shape)
        return
    dense[key] = value
    assert rel_error(found.to_dense(), torch.from_numpy(dense)) <= 1e-12
    assert np.array_equal(x.to_dense().numpy(), before)


def test_setting_takes_numbers_trains_and_what_broadcasts(generator):
    x = randn((3, 4, 5), 2, generator=generator)
    dense = x.to_dense()
    small = randn((2, 5), 2, generator=generator)
    for key, value, exact in (
        ((0, 1, 2), 3.0, 3.0),
        ((slice(None), 1), 0.0, 0.0),
        ((1, slice(0, 2)), small, small.to_dense()),
        ((1, slice(0, 2)), torch.arange(5.0), torch.arange(5.0)),
        ((..., 2), -1.5, -1.5),
        ((Ellipsis,), 2.0, 2.0),
    ):
        expected = dense.clone()
        expected[key] = exact
        assert rel_error(x.at[key].set(value).to_dense(), expected) <= 1e-13
        expected = dense.clone()
        expected[key] += exact
        assert rel_error(x.at[key].add(value).to_dense(), expected) <= 1e-13
    assert x.at[:, 1].set(0.0).ranks == (1, 3, 3, 1)
    with pytest.raises(ShapeError, match=r"value has shape \(3,\), expected \(2, 5\)"):
        x.at[1, :2].set(torch.ones(3))
    with pytest.raises(ShapeError):
        x.at[1, :2].set(randn((5, 2), 1, generator=generator))


def test_of_equal_points_the_last_wins(generator):
    x = randn((3, 4), 2, generator=generator)
    found = x.at[[0, 1, 0], [2, 2, 2]].set(torch.tensor([1.0, 2.0, 3.0])).to_dense()
    assert found[0, 2].item() == pytest.approx(3.0)
    assert found[1, 2].item() == pytest.approx(2.0)


def test_points(generator):
    x = randn((3, 4, 5, 2), 3, generator=generator)
    where = torch.stack([torch.randint(-n, n, (7, 6), generator=generator) for n in x.shape], dim=-1)
    assert rel_error(x.points(where), x.to_dense()[where.unbind(-1)]) <= 1e-14
    assert x.points(where[:0]).shape == (0, 6)
    with pytest.raises(ShapeError, match=r"expected \(.., 4\)"):
        x.points(where[..., :3])
    with pytest.raises(ModeIndexError):
        x.points(where + 3)


def test_many_points_are_differentiable(generator):
    x = randn((3, 4, 2), 2, generator=generator)
    cores = [core.detach().requires_grad_() for core in x.cores]
    where = torch.tensor([[0, 1, 1], [2, 3, 0], [0, 1, 1]])
    assert torch.autograd.gradcheck(lambda *c: TensorTrain(c).points(where), cores)
    assert torch.autograd.gradcheck(lambda *c: TensorTrain(c)[[0, 1], :, [1, 0]].to_dense(), cores)
    assert torch.autograd.gradcheck(lambda *c: TensorTrain(c).at[0, :, 1].set(2.0).to_dense(), cores)


def test_setting_is_differentiable_in_the_value(generator):
    x = randn((3, 4), 2, generator=generator)
    value = torch.randn(4, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: x.at[1].set(v).to_dense(), value)


def test_setting_keeps_what_tt_svd_finds(generator):
    x = tt_svd(torch.zeros(4, 4, 4)).value
    assert x.at[1, 2, 3].set(5.0).round().ranks == (1, 1, 1, 1)


def test_a_list_of_two_axes_sets_points_of_a_vector():
    x = randn((3,), 1, dtype=torch.float64)
    found = x.at[np.array([[0, 2], [2, 0]])].set(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64))
    assert found.to_dense().tolist() == [4.0, x.to_dense()[1].item(), 3.0]
