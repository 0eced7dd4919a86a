import pytest
import torch

import tensortrain as tt
from tensortrain.errors import DTypeError, KindError, NonFiniteError, RankError, ShapeError
from tensortrain.manifold import Point, TangentVector, project, transport
from tensortrain.testing import is_left_orthogonal, rel_error


def tangent_basis(point):
    """Columns that span the tangent space, from the definition: derivatives of the map from cores to tensor."""
    cores = [core.clone().requires_grad_() for core in point.base.cores]
    tangents = []
    for k, core in enumerate(cores):
        for at in range(core.numel()):
            unit = torch.zeros(core.numel(), dtype=core.dtype)
            unit[at] = 1
            varied = [*cores[:k], unit.reshape(core.shape), *cores[k + 1 :]]
            tangents.append(type(point.base)(varied).to_dense().detach().flatten())
    return torch.stack(tangents, dim=1)


def test_agrees_with_the_definition(make):
    point = Point.of(make())
    z = torch.randn(point.base.shape, dtype=point.base.dtype)
    u, s, _ = torch.linalg.svd(tangent_basis(point), full_matrices=False)
    basis = u[:, s > 1e-10 * s[0]]
    assert basis.shape[1] == point.dimension
    exact = (basis @ (basis.mH @ z.flatten())).reshape(z.shape)
    assert rel_error(project(z, at=point).to_dense(), exact) <= 1e-12


def test_the_point_is_its_own_projection(make):
    x = make()
    for z in (x, x.to_dense()):
        v = project(z, at=x)
        assert rel_error(v.to_dense(), x.to_dense()) <= 1e-13
        assert v.base is x


def test_projecting_twice_changes_nothing(make):
    x, z = make(), make(3)
    once = project(z, at=x)
    for again in (project(once, at=x), project(once.value, at=x), project(once.to_dense(), at=x)):
        assert rel_error(again.to_dense(), once.to_dense()) <= 1e-13
    assert project(once, at=once.point) is once


def test_the_remainder_is_orthogonal(make):
    x = make()
    z, y = (torch.randn(x.shape, dtype=x.dtype) for _ in range(2))
    v, w = project(z, at=x).to_dense(), project(y, at=x).to_dense()
    assert abs(torch.vdot((z - v).flatten(), w.flatten())) <= 1e-12 * z.norm() * y.norm()
    assert v.norm() <= z.norm()


def test_a_train_projects_as_its_dense_tensor(make):
    x = make()
    for rank in (1, 3):
        z = make(rank)
        assert rel_error(project(z, at=x).to_dense(), project(z.to_dense(), at=x).to_dense()) <= 1e-13


def test_a_list_is_the_sum(make):
    x = make()
    point = Point.of(x)
    terms = [make(1) for _ in range(20)] + [make(2), make(1), make(2)]
    total = project(terms, at=point)
    singles = [project(term, at=point) for term in terms]
    assert rel_error(total.to_dense(), sum(single.to_dense() for single in singles)) <= 1e-13
    added = singles[0]
    for single in singles[1:]:
        added = added + single
    assert float((total - added).norm()) <= 1e-13 * float(total.norm())
    mixed = (terms[0], terms[-1].to_dense(), singles[3])
    expected = sum(project(term, at=point).to_dense() for term in mixed)
    assert rel_error(project(mixed, at=point).to_dense(), expected) <= 1e-13


def test_an_empty_sum_is_zero(make):
    assert float(project([], at=make()).norm()) == 0.0


def test_many_trains_are_never_put_into_one(monkeypatch, generator):
    def refuse(*args):
        raise AssertionError("a block-diagonal train was formed")

    x = tt.randn((2,) * 10, 4, generator=generator)
    terms = [tt.randn((2,) * 10, 1, generator=generator) for _ in range(500)]
    monkeypatch.setattr("tensortrain.tensor.base.add_cores", refuse)
    assert max(project(terms, at=x).value.ranks) == 8


def test_cores_are_in_the_gauge(make):
    v = project(torch.randn(make().shape, dtype=make().dtype), at=make())
    for u, right, delta in zip(v.point.left, v.point.right, v.deltas, strict=False):
        assert is_left_orthogonal(u)
        assert is_left_orthogonal(right.movedim(0, -1))
        assert float((u.flatten(0, 1).mH @ delta.flatten(0, 1)).abs().max()) <= 1e-14 * float(v.norm())


def test_nothing_depends_on_the_gauge(make, regauge):
    x, z = make(), make(3)
    v = project(z, at=x)
    for other in (*(x.orthogonalize(k) for k in range(x.order)), regauge(x)):
        assert rel_error(project(regauge(z), at=other).to_dense(), v.to_dense()) <= 1e-11


def test_transport_projects_at_the_new_point(make):
    x, y, z = make(), make(1), make(2)
    v = project(z, at=x)
    carried = transport(v, to=y)
    assert carried.base is y
    assert rel_error(carried.to_dense(), project(v.to_dense(), at=y).to_dense()) <= 1e-13
    assert rel_error(project(v, at=y).to_dense(), carried.to_dense()) <= 1e-15


def test_is_linear_and_carries_the_gradient_of_z(generator):
    x = Point.of(tt.randn((3, 4, 2), 2, generator=generator, dtype=torch.complex128))
    z = torch.randn(3, 4, 2, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: project(z, at=x).deltas, (z,))
    y = tt.randn((3, 4, 2), 2, generator=generator, dtype=torch.complex128)
    cores = [core.requires_grad_() for core in y.cores]
    assert torch.autograd.gradcheck(lambda *cores: project(tt.TensorTrain(cores), at=x).norm(), cores)


def test_parameters_may_move_on_afterwards(generator):
    x = tt.TensorTrain([core.requires_grad_() for core in tt.randn((3, 4, 2), 2, generator=generator).cores])
    v = project(x, at=x)
    before = v.base.to_dense().clone()
    with torch.no_grad():
        x.cores[0].mul_(2)
    assert torch.equal(v.base.to_dense(), before)


def test_single_precision(generator):
    x = tt.randn((3, 4, 5), 2, generator=generator)
    z = torch.randn(3, 4, 5)
    exact = project(z, at=x)
    v = project(z.float(), at=x.to(torch.float32))
    assert v.dtype == torch.float32
    assert rel_error(v.to_dense(), exact.to_dense()) <= 1e-5


def test_long_trains_neither_overflow_nor_vanish(generator):
    for size in (4.0, 0.25):
        unit = tt.randn((2,) * 600, 2, generator=generator).normalize()
        point = Point.of(tt.TensorTrain([core * size for core in unit.cores]))  # of norm 4**600 or 4**-600
        v = project(unit, at=point)
        assert float(v.norm()) == pytest.approx(1.0, rel=1e-10)
        assert max(float(delta.norm()) for delta in v.deltas[:-1]) <= 1e-10


@pytest.mark.parametrize("factor", [1.0, 1e-3])
def test_points_of_lower_rank_are_refused(generator, factor):
    x = tt.randn((3, 4, 5, 3), 2, generator=generator)
    twice = x + factor * x
    with pytest.raises(RankError, match="bond 1 has rank 4"):
        Point.of(twice)
    with pytest.raises(RankError, match="numerical rank 2"):
        project(x, at=twice)
    assert project(x, at=twice.round()).value.ranks == (1, 4, 4, 4, 1)
    with pytest.raises(RankError, match="numerical rank 0"):
        project(x, at=tt.zeros((3, 4, 5, 3)))
    with pytest.raises(RankError):  # more than the modes can use
        project(x, at=tt.randn((3, 4, 5, 3), (5, 5, 5)))


def test_order_one_has_no_ranks_to_lose():
    assert project(torch.ones(5), at=tt.zeros((5,))).to_dense().tolist() == [1.0] * 5


def test_bad_input(generator):
    x = tt.randn((3, 4, 5), 2, generator=generator)
    with pytest.raises(ShapeError, match=r"z has \(3, 4\), expected \(3, 4, 5\)"):
        project(torch.ones(3, 4), at=x)
    with pytest.raises(ShapeError, match="must have the modes of the point"):
        project(tt.ones((3, 4, 6)), at=x)
    with pytest.raises(KindError, match="z has TTMatrix"):
        project([x, tt.eye((3, 4, 5))], at=x)
    with pytest.raises(KindError, match="riemannian_grad"):
        project(lambda y: y.norm(), at=x)
    with pytest.raises(DTypeError, match="complex128"):
        project(x.to(torch.complex128), at=x)
    with pytest.raises(DTypeError, match="bfloat16"):
        project(x, at=x.to(torch.bfloat16))
    with pytest.raises(KindError, match="found Tensor"):
        project(x, at=x.to_dense())
    with pytest.raises(NonFiniteError, match=r"cores\[0\] has NaN"):
        project(x, at=x * float("nan"))
    batch = tt.TensorTrain([torch.stack((core, core)) for core in x.cores])
    with pytest.raises(ShapeError, match="expected no batch axis"):
        project(x, at=batch)
    with pytest.raises(ShapeError, match="as a list"):
        project(batch, at=x)
    with pytest.raises(KindError, match="v has TensorTrain"):
        transport(x, to=x)
    assert isinstance(project(x, at=x), TangentVector)
