"""Narrowing on the menu: plans that take hidden units out of a model, on models of many kinds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from small_models import mlp
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression.choose import together
from tensortrain.compression.choose.allocate import Option, summed
from tensortrain.compression.choose.widths import Width, widths_of
from tensortrain.compression.survey.layers import count_params
from tensortrain.errors import CheckpointError, ShapeError
from tensortrain.system.observer import Silent

NARROW = ("narrow",)


def redundant_mlp(hidden: int = 48, useful: int = 12) -> nn.Sequential:
    """A net whose hidden units are copies of a few."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, hidden), nn.GELU(), nn.Linear(hidden, 8))
    with torch.no_grad():
        for p in (net[0].weight, net[0].bias):
            p.copy_(p[torch.arange(hidden) % useful])
    return net.eval()


def batches(*shape: int, n: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator) for _ in range(n)]


def rel(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def test_copies_of_units_go_for_nothing() -> None:
    net, data = redundant_mlp(), batches(32, 16)
    result = tt.compress(net, budget="3x", data=data, heal=False, formats=NARROW, measure=False)
    assert result.model[0].out_features == result.model[2].in_features <= 16
    assert type(result.model[0]) is nn.Linear
    assert rel(result.model(data[0]), net(data[0])) < 0.1


def test_budget_is_met_and_counted() -> None:
    net, data = redundant_mlp(50), batches(32, 16)
    for budget in ("1.3x", "2.7x"):
        plan = tt.plan_compression(net, budget=budget, data=data, formats=NARROW)
        small = tt.apply_plan_(redundant_mlp(50), plan)
        assert plan.params_after == count_params(small) <= plan.params_before / float(budget[:-1])


def test_narrowing_takes_part_beside_formats() -> None:
    net, data = redundant_mlp(50, 20), batches(64, 16)
    with_it = tt.compress(net, budget="2x", data=data, heal=False, measure=False, formats=("low_rank", "narrow"))
    without = tt.compress(
        net, budget="2x", data=data, heal=False, measure=False, allow_slower=True, formats=("low_rank",)
    )
    wanted = net(data[0])
    assert with_it.plan.narrowed
    assert rel(with_it.model(data[0]), wanted) < rel(without.model(data[0]), wanted)


def test_plan_goes_through_json() -> None:
    net, data = redundant_mlp(), batches(32, 16)
    plan = tt.plan_compression(net, budget="2x", data=data, formats=NARROW)
    again = tt.CompressionPlan.from_json(plan.to_json())
    assert again == plan
    assert "narrow" in str(plan)
    small = tt.apply_plan_(redundant_mlp(), again)  # without what came to the layers, no refit: columns as they were
    kept = list(plan.narrowed[0].kept)
    assert torch.equal(small[2].weight, net[2].weight[:, kept])


def test_plan_of_another_model_changes_nothing() -> None:
    plan = tt.plan_compression(redundant_mlp(), budget="2x", data=batches(32, 16), formats=NARROW)
    other = redundant_mlp(40)
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(ShapeError, match="Nothing was changed"):
        tt.apply_plan_(other, plan)
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), before, strict=True))


class Heads(nn.Module):
    """Names the size of its hidden layer, so that it cannot be narrowed."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).view(len(x), 4, 12).relu().flatten(1))


def test_a_size_that_the_forward_names_stays() -> None:
    net = nn.Sequential(Heads(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    plan = tt.plan_compression(net, budget="1.05x", data=batches(32, 16), formats=NARROW)
    assert {one.units.reader for one in plan.narrowed} == {"3"}
    tt.apply_plan_(net, plan)(torch.randn(3, 16))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.depthwise, self.norm2 = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32)
        self.down, self.norm3 = nn.Conv2d(32, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm2(self.depthwise(torch.relu(self.norm(self.up(x))))))
        return x + self.norm3(self.down(y))


def test_convolutions_with_norms_between_and_after() -> None:
    torch.manual_seed(0)
    net, data = Residual(), batches(8, 8, 10, 10)
    for x in data:
        net(x)  # running statistics
    net.eval()
    result = tt.compress(net, budget="1.5x", data=data, heal=False, formats=NARROW, measure=False)
    k = result.model.down.in_channels
    assert k < 32
    assert result.model.depthwise.groups == result.model.norm2.num_features == k
    assert result.report.params_after == count_params(result.model) <= count_params(net) / 1.5
    y = result.model.norm3(result.model.down(_inner(result.model, data[0])))
    assert torch.allclose(y.mean((0, 2, 3)), (net(data[0]) - data[0]).mean((0, 2, 3)), atol=0.1)


def _inner(net: Residual, x: Tensor) -> Tensor:
    return torch.relu(net.norm2(net.depthwise(torch.relu(net.norm(net.up(x))))))


_TABLES = {"llama": None, "gpt2": "*wpe*", "bert": "*embeddings*"}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_language_models_generate_as_before(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    net = _language_model(transformers, kind)
    ids = [{"input_ids": torch.randint(0, 60, (4, 9))} for _ in range(3)]
    result = tt.compress(net, budget="1.3x", data=ids, heal=False, formats=NARROW, measure=False, exclude=_TABLES[kind])
    assert result.plan.narrowed
    if kind == "bert":
        assert result.model(**ids[0]).last_hidden_state.shape == (4, 9, 32)
    else:
        with_cache = result.model.generate(ids[0]["input_ids"], max_new_tokens=5, do_sample=False, use_cache=True)
        without = result.model.generate(ids[0]["input_ids"], max_new_tokens=5, do_sample=False, use_cache=False)
        assert torch.equal(with_cache, without)


def _language_model(transformers, kind: str) -> nn.Module:  # type: ignore[no-untyped-def]
    small = {"vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    if kind == "llama":
        config = transformers.LlamaConfig(**small, intermediate_size=80, num_key_value_heads=2)
        return transformers.LlamaForCausalLM(config).eval()
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32)
        ).eval()
    return transformers.BertModel(transformers.BertConfig(**small, intermediate_size=80)).eval()


def test_checkpoints_keep_the_sizes(tmp_path) -> None:  # type: ignore[no-untyped-def]
    data = batches(32, 16)
    result = tt.compress(redundant_mlp(), budget="2x", data=data, heal=False, formats=NARROW, measure=False)
    tt.save_pretrained(result.model, tmp_path / "a")
    loaded = tt.load_pretrained(tmp_path / "a", model=redundant_mlp)
    assert torch.equal(loaded(data[0]), result.model(data[0]))
    tt.save_pretrained(loaded, tmp_path / "b")  # what was loaded is known as narrowed, too
    assert torch.equal(tt.load_pretrained(tmp_path / "b", model=redundant_mlp())(data[0]), loaded(data[0]))


def test_checkpoint_of_layers_narrowed_and_then_factorized(tmp_path) -> None:  # type: ignore[no-untyped-def]
    data = batches(32, 16)
    first = tt.compress(redundant_mlp(), budget="1.5x", data=data, heal=False, formats=NARROW, measure=False)
    twice = tt.compress(
        first.model, budget="1.5x", data=data, heal=False, formats=("low_rank",), measure=False, allow_slower=True
    )
    assert any(isinstance(m, tt.nn.Linear) for m in twice.model.modules())
    tt.save_pretrained(twice.model, tmp_path)
    loaded = tt.load_pretrained(tmp_path, model=redundant_mlp)
    assert torch.equal(loaded(data[0]), twice.model(data[0]))


def test_a_checkpoint_of_another_model_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    result = tt.compress(redundant_mlp(), budget="2x", data=batches(32, 16), heal=False, formats=NARROW, measure=False)
    tt.save_pretrained(result.model, tmp_path)
    with pytest.raises(CheckpointError, match="narrowed layer"):
        tt.load_pretrained(tmp_path, model=redundant_mlp(hidden=8, useful=4))


def test_in_place_an_error_brings_the_units_back() -> None:
    net = redundant_mlp()
    before, objects = [p.clone() for p in net.parameters()], list(net.parameters())

    with pytest.raises(RuntimeError, match="stopped"):
        tt.compress(
            net, budget="2x", data=batches(32, 16), formats=NARROW, inplace=True, measure=False, observer=_After("heal")
        )
    assert all(p is q for p, q in zip(net.parameters(), objects, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert net[0].out_features == 48


class _After(Silent):
    """Stops when a part of the work begins."""

    def __init__(self, part: str) -> None:
        self.part = part

    def on_start(self, name: str, total: int | None) -> None:
        if name == self.part:
            raise RuntimeError("stopped")


def test_sums_of_menus_hold_all_corners_of_their_hull() -> None:
    generator = torch.Generator().manual_seed(3)
    menus = []
    for n in (5, 7, 4):
        costs = torch.randperm(30, generator=generator)[:n].sort().values.tolist()
        losses = torch.rand(n, generator=generator).sort(descending=True).values.tolist()
        menus.append([Option(c, x, (n, c)) for c, x in zip(costs, losses, strict=True)])
    every = [(sum(o.cost for o in picks), sum(o.loss for o in picks)) for picks in itertools.product(*menus)]
    found = {(o.cost, round(o.loss, 9)) for o in summed(menus)}
    for slope in torch.logspace(-3, 1, 40).tolist():
        best = min(every, key=lambda one: one[1] + slope * one[0])
        assert (best[0], round(best[1], 9)) in found


class Auxiliary(nn.Module):
    """In training a second head reads the hidden units too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.aux = nn.Linear(16, 64), nn.Linear(64, 10), nn.Linear(64, 10)
        self.wide, self.out = nn.Linear(10, 40), nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        y = self.out(self.wide(self.down(h)).relu())
        return y + 0.1 * self.aux(h) if self.training else y


def test_what_training_alone_reads_stays() -> None:
    net, data = Auxiliary(), batches(32, 16)
    result = tt.compress(net, budget="1.2x", data=data, heal={"steps": 2}, formats=NARROW, measure=False)
    assert result.plan.narrowed
    assert all("up" not in one.units.makers for one in result.plan.narrowed)
    assert result.model.train()(data[0]).shape == (32, 10)


class Masked(nn.Module):
    """Logits with a mask beside whose size nothing shows."""

    def __init__(self, value: float, *, scaled: bool) -> None:
        super().__init__()
        self.up, self.down, self.value, self.scaled = nn.Linear(16, 64), nn.Linear(64, 10), value, scaled

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        h = h / h.shape[-1] ** 0.5 if self.scaled else h
        return self.down(h).masked_fill(torch.arange(10) > 6, self.value)


@pytest.mark.parametrize("value", [-1e9, -torch.inf])
@pytest.mark.parametrize("scaled", [False, True])
def test_masked_outputs_are_compared_where_they_are_no_masks(value: float, scaled: bool) -> None:
    net = Masked(value, scaled=scaled).eval()
    plan = tt.plan_compression(net, budget="1.2x" if not scaled else 1.0, data=batches(32, 16), formats=NARROW)
    assert bool(plan.narrowed) != scaled


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 4)
        self.up, self.down = nn.Linear(4, 60), nn.Linear(60, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.out(self.attention(x, x, x)[0].mean(1).relu())).relu())


def test_maps_of_layers_that_are_put_together_again_keep_their_sizes() -> None:
    net = Attends().eval()
    result = tt.compress(net, budget="1.1x", data=batches(8, 5, 16), heal=False, formats=NARROW, measure=False)
    assert [one.units.makers for one in result.plan.narrowed] == [("up",)]
    assert type(result.model.attention) is nn.MultiheadAttention


def test_a_conv1d_of_transformers_that_was_narrowed_and_then_factorized(tmp_path) -> None:  # type: ignore[no-untyped-def]
    transformers = pytest.importorskip("transformers")
    net = _language_model(transformers, "gpt2")
    ids = [{"input_ids": torch.randint(0, 60, (4, 9))} for _ in range(3)]
    how = {"data": ids, "heal": False, "measure": False, "include": "*mlp*", "allow_slower": True}
    first = tt.compress(net, budget="1.2x", formats=NARROW, **how)
    twice = tt.compress(first.model, budget="1.2x", formats=("low_rank",), **how)
    tt.save_pretrained(twice.model, tmp_path)
    loaded = tt.load_pretrained(tmp_path)
    assert torch.equal(loaded(**ids[0]).logits, twice.model(**ids[0]).logits)


def test_a_plan_that_does_not_fit_is_refused_before_the_decompositions(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    plan = tt.plan_compression(redundant_mlp(), budget="2x", data=batches(32, 16), formats=NARROW)
    other = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(40, 8))
    with pytest.raises(ShapeError, match="hidden units"):
        tt.apply_plan_(other, plan)


class Filters(nn.Module):
    """Convolutions in a row, of some channels."""

    def __init__(self, n: int, depthwise: bool) -> None:
        super().__init__()
        self.up, self.norm = nn.Conv2d(6, n, 3, padding=1, bias=False), nn.BatchNorm2d(n)
        self.between = nn.Conv2d(n, n, 3, padding=1, groups=n, bias=False) if depthwise else nn.Identity()
        self.down = nn.Conv2d(n, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.between(torch.relu(self.norm(self.up(x))))))


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize(
    "n, widths", [(6, [1, 2, 3, 4, 5]), (12, [8]), (16, [8]), (40, [8, 16, 32]), (64, [8, 16, 32, 48])]
)
def test_channels_of_convolutions_go_in_whole_lanes(n: int, widths: list[int], depthwise: bool) -> None:
    """31 channels of 32 take longer than all."""
    torch.manual_seed(0)
    net, data = Filters(n, depthwise).eval(), batches(4, 6, 8, 8)
    offered = {one.n_units: one.seconds for one in _offered(net, data, allow_slower=False)}
    assert [*offered] == widths
    finer = {one.n_units: one.seconds for one in _offered(net, data, allow_slower=True)}
    assert [*finer] == list(range(1, n))
    assert all(finer[k] == seconds for k, seconds in offered.items())
    if n > 16:
        assert finer[n - 1] == 1.0  # as long as all
        assert finer[17] == finer[31] == 32 / n


def _offered(net: nn.Module, data: Sequence[Tensor], *, allow_slower: bool) -> Sequence[Width]:
    found: list[Width] = []

    def noted(*args: Any, **how: Any) -> Any:
        made = widths_of(*args, **how)
        found.extend(made.menus[made.reader])
        return made

    with mock.patch.object(together, "widths_of", noted):
        tt.plan_compression(net, budget="1.02x", data=data, allow_slower=allow_slower)
    return found


def test_other_units_go_one_by_one() -> None:
    torch.manual_seed(0)
    offered = _offered(mlp(12, 40, 6), batches(8, 12), allow_slower=False)
    assert [one.n_units for one in offered] == list(range(1, 40))
    assert offered[0].seconds == 1 / 40
