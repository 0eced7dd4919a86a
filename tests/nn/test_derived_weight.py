"""``layer.weight`` is a copy to read: writing to it is refused, and reading it is like reading any tensor."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.errors import DerivedWeightError

LAYERS: dict[str, tuple[Callable[[], Any], Callable[[], Tensor]]] = {
    "linear": (lambda: tt.nn.Linear(24, 18, rank=3), lambda: torch.randn(5, 24)),
    "one core": (lambda: tt.nn.Linear(24, 18, in_modes=(24,), out_modes=(18,)), lambda: torch.randn(5, 24)),
    "conv": (lambda: tt.nn.Conv2d(8, 12, 3, rank=3), lambda: torch.randn(2, 8, 5, 5)),
    "transposed": (lambda: tt.nn.ConvTranspose2d(8, 12, 3, rank=3), lambda: torch.randn(2, 8, 5, 5)),
    "embedding": (lambda: tt.nn.Embedding(50, 12, padding_idx=2, rank=3), lambda: torch.randint(50, (2, 4))),
    "bag": (lambda: tt.nn.EmbeddingBag(50, 12, rank=3), lambda: torch.randint(50, (2, 4))),
}


def added(layer: Any) -> None:
    layer.weight.data += torch.ones(())


def assigned_data(layer: Any) -> None:
    layer.weight.data = torch.zeros(layer.weight.shape)


WRITES: dict[str, Callable[[Any], object]] = {
    "merge": added,
    "data": assigned_data,
    "init": lambda layer: nn.init.kaiming_uniform_(layer.weight),
    "copy": lambda layer: layer.weight.copy_(torch.zeros(())),
    "item": lambda layer: layer.weight.__setitem__(0, 0.0),
    "row": lambda layer: layer.weight[0].zero_(),
    "view": lambda layer: layer.weight.detach().flatten()[1:3].fill_(2.0),
    "transpose": lambda layer: layer.weight.mT.mul_(2),
    "cpu": lambda layer: layer.weight.data.cpu().clamp_(0),
    "assignment": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(2, 2))),
    "frozen": lambda layer: layer.weight.requires_grad_(False),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", LAYERS)
def test_writes_are_refused(kind: str, write: str, grad: bool) -> None:
    build, inputs = LAYERS[kind]
    layer, x = build().eval(), inputs()
    with torch.set_grad_enabled(grad):
        before = layer(x).detach().clone()
        with pytest.raises(DerivedWeightError, match=r"cores"):
            WRITES[write](layer)
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_written_to_a_copy_stays_there(kind: str, grad: bool) -> None:
    layer = LAYERS[kind][0]().eval()
    with torch.set_grad_enabled(grad):
        exact = layer.weight.clone()
        parameter = nn.Parameter(layer.weight)
        assert type(parameter) is nn.Parameter
        assert parameter.requires_grad
        assert parameter.is_leaf
        with torch.no_grad():
            parameter.add_(1)
            torch.relu_(layer.weight.detach())  # functions cannot be told; they write to a copy
        assert torch.equal(layer.weight, exact)


def test_it_reads_like_a_tensor() -> None:
    layer = tt.nn.Linear(24, 18, rank=3)
    weight, x = layer.weight, torch.randn(5, 24)
    assert not torch.overrides.has_torch_function((weight,))
    for found in (weight.clone(), weight * 2, x @ weight.T, F.linear(x, weight), weight.sum(0)):
        assert type(found) is Tensor
    assert copy.deepcopy(weight.detach()).zero_().sum() == 0
    assert type(pickle.loads(pickle.dumps(weight.detach()))) is Tensor
    F.linear(x, weight).sum().backward()
    assert all(core.grad is not None for core in layer.cores)


def test_it_is_saved_as_a_tensor() -> None:
    layer, file = tt.nn.Linear(24, 18, rank=3), io.BytesIO()
    torch.save({"weight": layer.weight.detach()}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["weight"], layer.weight)
    dense = nn.Linear(24, 18)
    dense.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    dense.weight.data.add_(1)
    torch.testing.assert_close(dense.weight - 1, layer.weight)


def test_arrays_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        tt.nn.Linear(24, 18, rank=3).weight.detach().numpy()[0] = 1


def test_weights_of_composite_layers() -> None:
    layer = tt.nn.GRU(24, 16, rank=2)
    weights = layer.dense_weights()
    with pytest.raises(DerivedWeightError), torch.no_grad():
        weights["weight_ih_l0"].zero_()
    with torch.no_grad():
        weights["bias_ih_l0"].fill_(2.0)  # a parameter of its own
    assert bool((layer.l0.ih.bias == 2.0).all())
