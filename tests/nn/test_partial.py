"""Dense layers that read some inputs and make some outputs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import tensortrain as tt
from tensortrain.errors import ShapeError


@pytest.mark.parametrize(("read", "made"), [(None, (0, 3, 4)), ((1, 2), None), ((0, 5), (4,)), (None, None)])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (0, 6)])
def test_it_computes_what_its_whole_weight_does(read, made, shape) -> None:  # type: ignore[no-untyped-def]
    layer = tt.nn.PartialLinear(6, 5, read=read, made=made, dtype=torch.float64)
    bias = torch.zeros(5, dtype=torch.float64)
    bias[list(made) if made is not None else slice(None)] = layer.bias.detach()
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, layer.whole_weight(), bias))
    assert layer.whole_weight().shape == (5, 6)
    wanted = torch.autograd.grad(F.linear(x, layer.whole_weight(), bias).square().sum(), (x, layer.weight))
    found = torch.autograd.grad(y.square().sum(), (x, layer.weight))
    torch.testing.assert_close(found, wanted)


def test_numbers_are_no_part_of_the_state_and_move_with_the_layer() -> None:
    layer = tt.nn.PartialLinear(6, 5, bias=False, read=(1, 2), made=(0, 4))
    assert list(layer.state_dict()) == ["weight"]
    assert "2 inputs read, 2 outputs made" in repr(layer)
    other = copy.deepcopy(layer).to(torch.bfloat16)
    assert other._read.dtype == torch.long
    assert other(torch.randn(3, 6, dtype=torch.bfloat16)).shape == (3, 5)


@pytest.mark.parametrize("wrong", [(), (2, 1), (0, 0), (-1, 2), (3, 6)])
def test_numbers_have_to_rise_within_the_sizes(wrong: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="read must hold rising numbers below 6"):
        tt.nn.PartialLinear(6, 9, read=wrong)


def test_it_traces() -> None:
    layer, x = tt.nn.PartialLinear(6, 5, read=(1, 2), made=(0, 4)), torch.randn(3, 6)
    exported = torch.export.export(layer, (x,)).module()
    assert torch.equal(exported(x), layer(x))
