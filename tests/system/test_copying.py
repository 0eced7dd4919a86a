"""A copy is a model of its own: with its own ties, its own closures, and nothing of the original's."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from small_models import TwoHeads, assert_unchanged, mlp, snapshot
from torch import Tensor, nn
from torch.nn.utils import prune

from tensortrain.compression.survey.layers import count_params
from tensortrain.system.copying import copy_model


def test_it_copies_as_deepcopy_does() -> None:
    model = TwoHeads(8)
    before = snapshot(model)
    copied, plain = copy_model(model), copy.deepcopy(model)
    assert copied.blocks[1] is copied.first
    assert [name for name, _ in copied.named_modules()] == [name for name, _ in plain.named_modules()]
    for (name, a), (_, b), (_, c) in zip(
        copied.named_parameters(), plain.named_parameters(), model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert a.data_ptr() != c.data_ptr()
    assert_unchanged(model, before)


def test_memory_that_was_shared_is_shared_again() -> None:
    model = nn.ModuleDict({"e": nn.Embedding(20, 8), "h": nn.Linear(8, 20, bias=False)})
    model["h"].weight.data = model["e"].weight.data
    model["h"].weight.requires_grad_(False)
    model["e"].weight.grad = torch.ones(20, 8)
    model.register_buffer("first", model["e"].weight.data[0])
    vars(model)["view"] = model["e"].weight.data.T
    copied = copy_model(model)
    assert count_params(copied) == 160
    with torch.no_grad():
        copied["e"].weight.zero_()
    assert not copied["h"].weight.any()
    assert not copied.first.any()
    assert not copied.view.any()
    assert model["h"].weight.any()
    assert [copied[k].weight.requires_grad for k in "eh"] == [True, False]
    assert copied["e"].weight.grad is not model["e"].weight.grad


@pytest.mark.parametrize(
    "odd",
    [
        lambda layer: nn.utils.weight_norm(layer),
        lambda layer: prune.random_unstructured(layer, "bias", amount=0.5),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach().to_sparse())),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(1, 6).expand(6, 6))),
        lambda layer: setattr(layer, "last", layer(torch.ones(1, 6))),
    ],
)
def test_what_deepcopy_refuses_or_blows_up_is_copied(odd) -> None:
    model = mlp(6, 6, 6)
    odd(model[2])
    copied = copy_model(model)
    if not model[2].weight.is_sparse:
        x = torch.randn(3, 6)
        torch.testing.assert_close(copied(x), model(x))
    assert count_params(copied) == count_params(model)


class Closing(nn.Module):
    """Reaches its layers through functions and a weak reference alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        layers, self.log = [self.a], []
        log = self.log

        def run(x: Tensor, *, last: nn.Module = self.b) -> Tensor:
            log.append(x.shape)
            return last(layers[0](x))

        vars(self)["steps"] = [lambda x: run(x), weakref.ref(self)]
        self.a.register_forward_hook(lambda module, args, output: output + self.steps[1]().b.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.steps[0](x)


def test_functions_see_the_layers_of_the_copy() -> None:
    model, x = Closing(), torch.randn(2, 4)
    copied = copy_model(model)
    exact = model(x).detach()
    assert torch.equal(copied(x), exact)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not copied(x).any()
    assert torch.equal(model(x), exact)
    assert copied.steps[1]() is copied
    assert model.steps[1]() is model
    assert len(model.log) == 4  # a list that a function writes to is still the user's


def test_functions_without_layers_stay_the_same() -> None:
    model = mlp(4, 4)
    scale, seen = 2.0, []
    model[0].register_forward_hook(lambda module, args, output: seen.append(scale))
    copied = copy_model(model)
    assert list(copied[0]._forward_hooks.values()) == list(model[0]._forward_hooks.values())
    copied(torch.randn(1, 4))
    assert seen == [2.0]
