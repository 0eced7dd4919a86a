"""What is dense becomes cores without a type: tensors, matrices with modes, streams."""

from __future__ import annotations

import pytest
import torch

from tensortrain.cores.algebra import contract
from tensortrain.cores.decompose import decompose
from tensortrain.cores.dense import cores_of_dense
from tensortrain.cores.regroup import paired_to_dense
from tensortrain.errors import ShapeError
from tensortrain.testing import rel_error


def test_a_matrix_has_its_modes_joined(generator):
    w = torch.randn(6, 20, dtype=torch.float64, generator=generator)
    done = cores_of_dense(w, out_modes=(2, 3), in_modes=(4, 5))
    assert [core.shape[-2] for core in done.cores] == [8, 15]
    assert rel_error(paired_to_dense(contract(done.cores), (2, 3), (4, 5)), w) <= done.bound <= done.eps


def test_a_stream_is_as_good_as_the_tensor(generator):
    x = torch.randn(6, 5, 4, dtype=torch.float64, generator=generator)
    done = cores_of_dense(iter(x.split(2)), shape=x.shape, eps=0.3)
    assert done.info["n_pieces"] == 3
    assert rel_error(contract(done.cores), x) <= done.bound <= 0.3


def test_what_is_zero_has_rank_one_and_no_sweep():
    done = decompose(torch.zeros(2, 3, 4, 5), n_batch=1)
    assert (done.ranks, done.bound, done.sweep) == ((1, 1, 1, 1), 0.0, None)
    assert done.info["rel_error_bounds"].tolist() == [0.0, 0.0]


def test_one_mode_tuple_is_not_enough():
    with pytest.raises(ShapeError, match="in_modes has None"):
        cores_of_dense(torch.ones(4, 4), out_modes=(2, 2))
