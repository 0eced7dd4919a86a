import numpy as np
import pytest
import torch

import tensortrain as tt
from tensortrain.errors import DTypeError, KindError, ShapeError
from tensortrain.manifold import Point, project
from tensortrain.testing import rel_error


@pytest.fixture
def pair(make):
    point = Point.of(make())
    return tuple(project(torch.randn(point.base.shape, dtype=point.base.dtype), at=point) for _ in range(2))


def test_algebra_agrees_with_dense(pair):
    v, w = pair
    a, b = v.to_dense(), w.to_dense()
    for found, exact in (
        (v + w, a + b),
        (v - w, a - b),
        (-v, -a),
        (2 * v, 2 * a),
        (v * torch.tensor(3.0), 3 * a),
        (np.float64(2.0) * v, 2 * a),
        (v / 4, a / 4),
        (2 * v - w / 3, 2 * a - b / 3),
    ):
        assert found.point is v.point
        assert rel_error(found.to_dense(), exact) <= 1e-13


def test_numbers_agree_with_dense(pair):
    v, w = pair
    a, b = v.to_dense().flatten(), w.to_dense().flatten()
    assert abs(v.inner(w) - torch.vdot(a, b)) <= 1e-13 * a.norm() * b.norm()
    assert rel_error(v.inner(v), v.norm() ** 2) <= 1e-13
    assert rel_error(v.norm(), a.norm()) <= 1e-13
    assert not v.norm().is_complex()
    assert rel_error(v.inner(w), tt.dot(v.value, w.value)) <= 1e-11
    if a.is_complex():
        assert rel_error((2j * v).inner(w), -2j * v.inner(w)) <= 1e-13


def test_value_has_twice_the_ranks(make):
    x = make()
    v = project(torch.randn(x.shape, dtype=x.dtype), at=x)
    assert type(v.value) is type(x)
    assert v.value.ranks == (1, *(2 * r for r in x.ranks[1:-1]), 1)
    assert (v.shape, v.dtype, v.device) == (x.shape, x.dtype, x.device)
    assert v.base is x
    assert "\n" not in repr(v) + repr(v.point)


def test_frozen(pair):
    with pytest.raises(AttributeError):
        pair[0].deltas = ()


def test_operands_may_hold_the_point_in_different_gauges(make, regauge):
    x = make()
    z, y = (torch.randn(x.shape, dtype=x.dtype) for _ in range(2))
    v = project(z, at=x)
    for other in (x, x.orthogonalize(0), regauge(x)):
        w = project(y, at=other)
        assert rel_error((v + w).to_dense(), v.to_dense() + w.to_dense()) <= 1e-11
        exact = torch.vdot(v.to_dense().flatten(), w.to_dense().flatten())
        assert abs(v.inner(w) - exact) <= 1e-11 * v.norm() * w.norm()


def test_other_points_are_refused(make):
    x = make()
    v = project(x, at=x)
    for other in (make(), x * (1 + 1e-9)):
        w = project(x, at=other)
        for operation in (v.__add__, v.__sub__, v.inner):
            with pytest.raises(ShapeError, match="tangent at one point"):
                operation(w)


def test_bad_operands(generator):
    x = tt.randn((3, 4), 2, generator=generator)
    v = project(x, at=x)
    with pytest.raises(KindError, match="right one has TensorTrain"):
        v + x
    with pytest.raises(KindError, match="right one has int"):
        v + 1
    with pytest.raises(KindError, match="scaled by a number"):
        v * v
    with pytest.raises(DTypeError, match="the factor is complex"):
        v * 2j
    with pytest.raises(DTypeError):
        v + project(x.to(torch.float32), at=x.to(torch.float32))
