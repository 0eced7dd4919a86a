"""Hidden units found by how numbers flow, and taken out again, on models of many kinds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tensortrain.compression.narrow import narrow_
from tensortrain.compression.survey.hidden import HiddenUnits, find_hidden_units
from tensortrain.errors import ShapeError
from tensortrain.formats.narrowing import refitted


def run_on(x: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(x)


def seen(model: nn.Module, x: Tensor) -> list[tuple[tuple[str, ...], str]]:
    return [(units.makers, units.reader) for units in find_hidden_units(model.eval(), run_on(x))]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 10, bias=False), nn.Linear(6, 10), nn.Linear(10, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Convolutions with everything that works on channels between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.act = nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.PReLU(8)
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.act(self.depthwise(torch.relu(self.norm(self.first(x))))))


class Squeezed(nn.Module):
    """A gate from the mean over positions: its maker's units are read by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu()
        gate = self.up(self.down(y.mean((2, 3))).tanh()).sigmoid()
        return self.out(y * gate[:, :, None, None])


class Scaled(nn.Module):
    """A parameter of the model itself takes part, which no layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(6, 8), nn.Linear(8, 6), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() * self.scale)


class Leaky(nn.Module):
    """The hidden units are given out beside the result."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.a(x).relu()
        return self.b(hidden), hidden


class ReadByKeyword(nn.Module):
    """A second reader, called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).relu()
        return self.b(hidden) + self.c(input=hidden)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        return self.b(self.a(x).relu())


def test_plain_gated_and_convolutional_units_are_found() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Dropout(), nn.Linear(10, 7), nn.GELU(), nn.Linear(7, 2))
    assert seen(plain, torch.randn(4, 6)) == [(("0",), "3"), (("3",), "5")]
    assert seen(Gated(), torch.randn(2, 3, 6)) == [(("gate", "up"), "down")]
    (units,) = find_hidden_units(Block().eval(), run_on(torch.randn(2, 3, 6, 6)))
    assert units == HiddenUnits(("first",), ("norm", "depthwise", "act"), "last", 8)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)), (4, 6)),
        (nn.Sequential(nn.Linear(6, 8), nn.Softmax(-1), nn.Linear(8, 3)), (4, 6)),
        (nn.Sequential(nn.Linear(6, 8), nn.Unflatten(1, (2, 4)), nn.Linear(4, 3)), (4, 6)),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 3)), (2, 3, 4, 4)),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1)), (2, 3, 4, 4)),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)), (4, 6)),
        (Scaled(), (4, 6)),
        (Leaky(), (4, 6)),
        (Twice(), (4, 6)),
        (ReadByKeyword(), (4, 6)),
    ],
)
def test_units_that_others_see_or_mix_are_left_alone(model: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    assert seen(model, torch.randn(shape)) == []


def test_of_a_squeezed_block_only_the_inner_units_are_free() -> None:
    torch.manual_seed(0)
    assert seen(Squeezed(), torch.randn(2, 3, 6, 6)) == [(("down",), "up")]


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).train()
    model[0].weight.requires_grad_(False)
    find_hidden_units(model, run_on(torch.randn(4, 6)))
    assert model.training
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad
    assert not model[0]._forward_hooks
    assert model[2].weight.grad is None


@pytest.mark.parametrize(("build", "shape"), [(Gated, (5, 6)), (Block, (3, 3, 6, 6)), (Squeezed, (3, 3, 6, 6))])
def test_units_that_do_nothing_go_without_a_trace(build: type[nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape)
    (units,) = find_hidden_units(model, run_on(x))
    reader = model.get_submodule(units.reader)
    kept = torch.arange(units.n_units)[: units.n_units - 3]
    with torch.no_grad():
        reader.weight[:, units.n_units - 3 :] = 0
    before = model(x)
    names, n_params = list(model.state_dict()), sum(p.numel() for p in model.parameters())
    undo = narrow_(model, units, kept, refitted(reader.weight, torch.eye(units.n_units), kept))
    torch.testing.assert_close(model(x), before)
    assert list(model.state_dict()) == names
    assert sum(p.numel() for p in model.parameters()) < n_params
    (narrow,) = find_hidden_units(model, run_on(x))
    assert narrow.n_units == len(kept)
    undo()
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert sum(p.numel() for p in model.parameters()) == n_params


def test_a_bias_shift_is_added_and_what_is_frozen_stays_so() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    model[2].weight.requires_grad_(False)
    bias = model[2].bias
    (units,) = find_hidden_units(model, run_on(torch.randn(4, 6, dtype=torch.float64)))
    undo = narrow_(model, units, torch.tensor([0, 2, 5]), torch.zeros(3, 3), torch.ones(3))
    torch.testing.assert_close(model(torch.randn(4, 6).double()), (bias + 1).expand(4, 3))
    assert (model[0].out_features, model[2].in_features) == (3, 3)
    assert not model[2].weight.requires_grad
    undo()
    assert model[2].bias is bias
    assert model[2].in_features == 8


@pytest.mark.parametrize("inplace", [False, True])
def test_activations_that_write_to_their_input(inplace: bool) -> None:
    layers = [nn.Linear(6, 8), nn.ReLU(inplace), nn.Linear(8, 9), nn.ReLU(inplace), nn.Linear(9, 3)]
    assert seen(nn.Sequential(*layers), torch.randn(4, 6)) == [(("0",), "2"), (("2",), "4")]


def test_a_weight_of_another_shape_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    (units,) = find_hidden_units(model, run_on(torch.randn(4, 6)))
    with pytest.raises(ShapeError, match="2 was given"):
        narrow_(model, units, torch.tensor([0, 1]), torch.zeros(3, 3))
    assert model[0].out_features == 8


transformers = pytest.importorskip("transformers")


def tiny(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=60,
        )
        return transformers.LlamaForCausalLM(config).eval()
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, bos_token_id=0, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_language_models_still_generate_with_their_cache(kind: str) -> None:
    model, ids = tiny(kind), torch.randint(2, 60, (2, 7))
    found = find_hidden_units(model, lambda one: one(ids).logits)
    assert len(found) == 2
    for units in found:
        kept = torch.arange(0, units.n_units, 2)
        reader = model.get_submodule(units.reader)
        weight = reader.weight.T if kind == "gpt2" else reader.weight
        narrow_(model, units, kept, refitted(weight, torch.eye(units.n_units), kept))
    steps = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "min_new_tokens": 6}
    with_cache, without = (model.generate(ids, use_cache=use, **steps) for use in (True, False))
    assert torch.equal(with_cache, without)
