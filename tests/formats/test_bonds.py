"""Where the ranks are: the weight is linear in every index of a bond."""

import pytest
import torch

from tensortrain.formats import WeightShape, format_names, get_format

WEIGHTS = {
    "linear": WeightShape("linear", 12, 20),
    "conv": WeightShape("conv", 12, 8, (3, 3)),
    "grouped conv": WeightShape("conv", 12, 4, (3, 3), groups=2),
    "embedding": WeightShape("embedding", 12, 20),
}
CASES = [(name, kind) for name in format_names() for kind in WEIGHTS if kind.split()[-1] in get_format(name).kinds]


def kept(core, axis, index):
    """All but one index of an axis set to zero."""
    only = torch.zeros_like(core)
    only.movedim(axis, 0)[index] = core.movedim(axis, 0)[index]
    return only


@pytest.mark.parametrize(("name", "kind"), CASES, ids=[" ".join(case) for case in CASES])
def test_a_weight_is_the_sum_over_every_bond(name, kind):
    fmt = get_format(name)
    spec = fmt.spec(WEIGHTS[kind], rank=3).one_group()
    cores = [torch.randn(shape, dtype=torch.float64) for shape in spec.core_shapes]
    dense = fmt.to_dense(cores, spec)
    bonds = fmt.bonds(spec)
    for bond in bonds:
        assert len(bond) >= 2
        (rank,) = {cores[k].shape[axis] for k, axis in bond}
        for k, axis in bond:
            terms = []
            for index in range(rank):
                some = list(cores)
                some[k] = kept(cores[k], axis, index)
                terms.append(fmt.to_dense(some, spec))
            torch.testing.assert_close(sum(terms), dense, rtol=1e-10, atol=1e-10)
