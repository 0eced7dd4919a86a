"""Surgery: all layers or none, and everything about a layer but its weight carries over."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import ConvNet, Tagger, TwoHeads, assert_unchanged, batches, decay_, mlp, snapshot
from torch import nn

import tensortrain as tt
from tensortrain.compression import (
    CompressionPlan,
    apply_plan_,
    compress,
    plan_compression,
    to_dense_,
)
from tensortrain.compression import (
    swap as swapping,
)
from tensortrain.compression.report.measure import resident_bytes
from tensortrain.errors import NonFiniteError, ShapeError

pytestmark = pytest.mark.usefixtures("double", "fixed_plans")


def factorized(model: nn.Module) -> list[tt.nn.FactorizedLayer]:
    return [module for module in model.modules() if isinstance(module, tt.nn.FactorizedLayer)]


def compressed(model: nn.Module, budget: Any = 0.6, **options: Any) -> nn.Module:
    return apply_plan_(model, plan_compression(model, budget=budget, **options))


# -- all or nothing -------------------------------------------------------------------------------------


def test_a_nan_weight_stops_it_before_the_first_change() -> None:
    model = decay_(mlp(24, 24, 24, 24))
    plan = plan_compression(model, budget="2x")
    with torch.no_grad():
        model[4].weight[0, 0] = torch.nan
    before = snapshot(model)
    with pytest.raises(NonFiniteError):
        apply_plan_(model, plan)
    assert_unchanged(model, before)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_failed_decomposition_changes_nothing(monkeypatch, error) -> None:
    model = decay_(mlp(24, 24, 24, 24))
    plan = plan_compression(model, budget="2x")
    before, calls, real = snapshot(model), [], tt.nn.Linear.from_spec

    def second_fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(tt.nn.Linear, "from_spec", second_fails)
    with pytest.raises(error):
        apply_plan_(model, plan)
    assert len(calls) == 2
    assert_unchanged(model, before)


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_a_failed_assignment_is_undone(monkeypatch, fails_at: int) -> None:
    model = decay_(TwoHeads())
    plan = plan_compression(model, budget="4x")  # three layers under four names
    before, calls, real = snapshot(model), [], swapping._assign

    def fails_once(owner: nn.Module, child: str, module: nn.Module) -> None:
        calls.append(child)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        real(owner, child, module)

    monkeypatch.setattr(swapping, "_assign", fails_once)
    with pytest.raises(KeyboardInterrupt):
        apply_plan_(model, plan)
    assert_unchanged(model, before)
    monkeypatch.undo()
    assert len(factorized(apply_plan_(model, plan))) == 3


def test_a_made_up_plan_is_refused_whole() -> None:
    model = decay_(mlp(24, 24, 24))
    text = plan_compression(model, budget="2x").to_json().replace('"auto"', '"dense"')
    plan = CompressionPlan.from_json(text.replace('"2"', '"3"'))  # "3" does not exist
    before = snapshot(model)
    with pytest.raises(ShapeError, match="layer '3'"):
        apply_plan_(model, plan)
    assert_unchanged(model, before)


# -- what carries over ----------------------------------------------------------------------------------


def test_shared_modules_stay_shared() -> None:
    model = compressed(decay_(TwoHeads()), "4x")
    assert isinstance(model.first, tt.nn.Linear)
    assert model.blocks[1] is model.first
    assert model.blocks[0] is not model.first
    assert sum(p.numel() for p in model.parameters()) == sum(layer.n_params for layer in factorized(model))


def test_modes_and_requires_grad_carry_over() -> None:
    model = decay_(mlp(24, 24, 24))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model[0].eval()
    compressed(model)
    first, second = factorized(model)
    assert not first.training
    assert second.training
    assert not any(core.requires_grad for core in first.cores)
    assert first.bias.requires_grad
    assert all(core.requires_grad for core in second.cores)
    assert not second.bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_carry_over(dtype: torch.dtype) -> None:
    model = decay_(nn.Sequential(nn.Embedding(40, 24), nn.Linear(24, 24))).to(dtype)
    ids = torch.arange(40)
    exact = model(ids)
    compressed(model, 0.9)
    assert {p.dtype for p in model.parameters()} == {dtype}
    y = model(ids)
    assert y.dtype == dtype
    assert ((y - exact).norm() / exact.norm()).item() < 0.2
    assert {p.dtype for p in to_dense_(model).parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calibration_works_in_low_precision(dtype: torch.dtype) -> None:
    model = decay_(mlp(24, 24, 24)).to(dtype)
    data = [x.to(dtype) for x, _ in batches(3, 32, 24)]
    exact = model(data[0])
    compressed(model, 0.7, data=data)
    assert ((model(data[0]) - exact).norm() / exact.norm()).item() < 0.1


@pytest.mark.cuda
def test_devices_carry_over() -> None:
    model = decay_(ConvNet()).float().cuda()
    data = [x.float() for x, _ in batches(2, 8, 3, 8, 8)]  # moved to the model's device
    compressed(model, 0.5, data=data)
    assert all(p.is_cuda for p in model.parameters())
    assert model(data[0].cuda()).is_cuda


def test_hooks_carry_over_and_their_handles_still_work() -> None:
    model = decay_(mlp(24, 24, 24))
    log: list[str] = []
    layer = model[0]
    handles = [
        layer.register_forward_pre_hook(lambda module, args: log.append("before")),
        layer.register_forward_hook(lambda module, args, kwargs, output: log.append("after"), with_kwargs=True),
        layer.register_full_backward_pre_hook(lambda module, grad_out: log.append("backward before")),
        layer.register_full_backward_hook(lambda module, grad_in, grad_out: log.append("backward after")),
        layer.register_state_dict_pre_hook(lambda module, prefix, keep_vars: log.append("state")),
    ]
    compressed(model)
    assert isinstance(model[0], tt.nn.Linear)
    model(torch.randn(3, 24, requires_grad=True)).sum().backward()
    assert log == ["before", "after", "backward before", "backward after"]
    model.state_dict()
    assert log[4:] == ["state"]
    for handle in handles:
        handle.remove()
    log.clear()
    model(torch.randn(3, 24, requires_grad=True)).sum().backward()
    model.state_dict()
    assert log == []


def test_hooks_survive_the_way_back() -> None:
    model = decay_(mlp(24, 24))
    log: list[str] = []
    model[0].register_forward_hook(lambda module, args, output: log.append(type(module).__name__))
    compressed(model)
    to_dense_(model)
    model(torch.randn(2, 24))
    assert log == ["Linear"]
    assert type(model[0]) is nn.Linear


def test_options_of_layers_carry_over() -> None:
    conv = nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2, padding_mode="circular", bias=False)
    model = nn.ModuleList([decay_(conv), decay_(nn.Embedding(50, 16, padding_idx=3))])
    compressed(model)
    assert (model[0].stride, model[0].padding, model[0].dilation) == ((2, 2), (2, 2), (2, 2))
    assert model[0].padding_mode == "circular"
    assert model[0].bias is None
    assert model[1].padding_idx == 3
    x = torch.randn(2, 8, 9, 9)
    dense = to_dense_(copy.deepcopy(model))
    torch.testing.assert_close(model[0](x), dense[0](x))


def test_a_bare_layer_comes_back_as_the_new_one() -> None:
    layer = decay_(nn.Linear(32, 32))
    before = snapshot(layer)
    new = compressed(layer)
    assert isinstance(new, tt.nn.Linear)
    assert_unchanged(layer, before)
    back = to_dense_(new)
    assert type(back) is nn.Linear


def test_containers_of_every_kind() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.ModuleDict({"a": nn.Linear(16, 16)})
            self.rows = nn.ModuleList([nn.Linear(16, 16)])
            self.steps = nn.Sequential(nn.Sequential(nn.Linear(16, 16)))

        def forward(self, x):
            return self.steps(self.rows[0](self.items["a"](x)))

    model = compressed(decay_(Net()))
    assert len(factorized(model)) == 3
    assert model(torch.randn(2, 16)).shape == (2, 16)


def test_transformer_encoders_run_in_both_modes() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2)
    compressed(decay_(encoder), 0.8)
    assert len(factorized(encoder)) == 4
    x = torch.randn(2, 5, 32)
    for mode in (True, False):
        encoder.train(mode)
        assert encoder(x).shape == x.shape
    with torch.inference_mode():  # torch's fast path reads weights past the layers' forward
        torch.testing.assert_close(encoder(x), to_dense_(copy.deepcopy(encoder))(x))


# -- undo -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build, shape", [(ConvNet, (3, 8, 8)), (TwoHeads, (24,)), (lambda: mlp(24, 24), (24,))])
def test_to_dense_undoes_the_surgery(build, shape) -> None:
    model = decay_(build()).eval()
    kinds = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    compressed(model, 0.6, data=batches(2, 8, *shape))
    x = torch.randn(4, *shape)
    y = model(x)
    assert len(factorized(model)) > 0
    assert to_dense_(model) is model
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)


def test_to_dense_of_an_embedding_and_a_tagger() -> None:
    model = compressed(decay_(Tagger(80, 24)), 0.7)
    ids = torch.randint(0, 80, (3, 7))
    y = model(ids).logits
    torch.testing.assert_close(to_dense_(model)(ids).logits, y)
    assert factorized(model) == []


def test_a_failed_undo_changes_nothing(monkeypatch) -> None:
    model = compressed(decay_(mlp(24, 24, 24)))
    before, calls, real = snapshot(model), [], tt.nn.Linear.to_dense

    def second_fails(layer: Any) -> Any:
        calls.append(layer)
        if len(calls) == 2:
            raise MemoryError
        return real(layer)

    monkeypatch.setattr(tt.nn.Linear, "to_dense", second_fails)
    with pytest.raises(MemoryError):
        to_dense_(model)
    assert_unchanged(model, before)


def test_surgery_itself_keeps_no_dense_weight() -> None:
    model = compressed(decay_(mlp(64, 64, 64)), "4x", data=batches(2, 8, 64))
    assert resident_bytes(model) == 8 * sum(p.numel() for p in model.parameters())


def test_a_flops_budget_never_builds_the_dense_weight() -> None:
    model = decay_(mlp(64, 64, 64))
    data = batches(2, 8, 64)
    how = {"formats": ("low_rank", "tt"), "allow_slower": True, "heal": False, "measure": False}
    result = compress(model, budget={"flops": "4x"}, data=data, **how)
    result.model(data[0][0])
    assert {layer.implementation for layer in factorized(result.model)} == {"factorized"}
    assert resident_bytes(result.model) < 0.5 * resident_bytes(model)


def test_gpt2_is_compressed_and_comes_back() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(0, 40, (2, 8))
    kinds, keys = [type(module) for module in model.modules()], list(model.state_dict())
    table = tt.inspect(model, {"input_ids": ids})
    assert [row.kind for row in table][2:] == ["Conv1D"] * 4
    assert table.rows[2].flops == 8 * 2 * 32 * 96
    how = {"formats": ("low_rank", "tt"), "heal": False, "measure": False, "allow_slower": True}
    result = compress(model, budget=0.7, data=[{"input_ids": ids}], **how)
    small, plan = result.model, CompressionPlan.from_json(result.plan.to_json())
    assert len(factorized(small)) >= 3
    assert small.transformer.h[0].attn.c_attn.nf == 96
    again = apply_plan_(copy.deepcopy(model), plan)
    assert [type(module) for module in again.modules()] == [type(module) for module in small.modules()]
    y = small(ids).logits
    to_dense_(small)
    torch.testing.assert_close(small(ids).logits, y)
    assert [type(module) for module in small.modules()] == kinds
    assert list(small.state_dict()) == keys
