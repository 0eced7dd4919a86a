import pytest
import torch
from torch import nn

import tensortrain as tt
from tensortrain.errors import KindError
from tensortrain.manifold import TTParameter
from tensortrain.numerics.manifold.parameter import is_train, trains_of


def test_value_is_the_train_and_is_connected(make):
    x = make()
    parameter = TTParameter(x)
    assert type(parameter.value) is type(x)
    assert torch.equal(parameter().to_dense(), x.to_dense())
    parameter.value.norm().backward()
    assert all(core.grad is not None for core in parameter.cores)
    assert all(mine is not theirs for mine, theirs in zip(parameter.cores, x.cores, strict=True))
    assert "ranks" in repr(parameter)


def test_state_dict(make):
    first, second = TTParameter(make()), TTParameter(make())
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.value.to_dense(), first.value.to_dense())


def test_only_trains_are_held():
    with pytest.raises(KindError, match="train has Tensor"):
        TTParameter(torch.ones(3))


def test_finds_the_trains_of_a_model():
    shared = tt.nn.Linear(12, 20, rank=2)
    model = nn.Sequential(
        shared,
        nn.Linear(20, 12),
        shared,
        tt.nn.Linear(20, 12, format="low_rank", rank=2),
        TTParameter(tt.randn((3, 4), 2)),
        tt.nn.Embedding(30, 8, rank=2),
    )
    found = list(trains_of(model))
    assert [[id(core) for core in cores] for cores in found] == [
        [id(core) for core in model[k].cores] for k in (0, 4, 5)
    ]
    assert [len(cores) for cores in trains_of(shared.cores)] == [len(shared.cores)]


def test_what_is_no_train():
    def parameters(*shapes):
        return [nn.Parameter(torch.ones(shape)) for shape in shapes]

    assert is_train(parameters((1, 3, 2), (2, 4, 1)))
    assert not is_train([])
    assert not is_train(parameters((2, 3, 2), (2, 4, 1)))
    assert not is_train(parameters((1, 3, 2), (3, 4, 1)))
    assert not is_train(parameters((1, 3, 2), (2, 4, 2)))
    assert not is_train(parameters((1, 3, 2), (2, 4, 5, 1)))
    assert not is_train(parameters((3, 2), (2, 3)))
    assert not is_train([torch.ones(1, 3, 1)])
