"""Whole attention heads that go: found, tried, on the menu, applied, stored, told in configs."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression.choose.plan import Narrowed, NarrowedWholeHeads
from tensortrain.compression.config import config_notes
from tensortrain.compression.report.alone import loss_together, losses_alone
from tensortrain.compression.survey.hidden import find_hidden_units
from tensortrain.compression.survey.layers import count_params, find_layers
from tensortrain.compression.survey.moments import Calibration
from tensortrain.compression.survey.proven_whole_heads import proven_whole_heads
from tensortrain.compression.survey.whole_heads import Rows, WholeHeads, find_whole_heads
from tensortrain.errors import CheckpointError, ShapeError
from tensortrain.formats.narrowing import narrowing_of_blocks, refitted
from tensortrain.formats.weighting import energy
from tensortrain.system.observer import Silent

WHOLE = ("whole_heads",)


class Attention(nn.Module):
    """Heads of the queries share those of keys and values, in groups; its code counts heads, or does not."""

    def __init__(self, width: int = 24, heads: int = 4, groups: int = 2, size: int = 6, how: str = "free") -> None:
        super().__init__()
        self.num_heads, self.groups, self.size, self.how = heads, groups, size, how
        self.q, self.k = nn.Linear(width, heads * size), nn.Linear(width, groups * size)
        self.v, self.o = nn.Linear(width, groups * size), nn.Linear(heads * size, width)

    def forward(self, x: Tensor) -> Tensor:
        n_heads = {"free": -1, "counted": self.num_heads, "fixed": 4}[self.how]
        q = self.q(x).view(*x.shape[:-1], n_heads, self.size).transpose(1, 2)
        k, v = (layer(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.k, self.v))
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v))
        z = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.o(z)


def attends(**how: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Attention(**how), nn.LayerNorm(24), Attention(**how)).eval()


def batches(n: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 7, 24, generator=generator) for _ in range(n)]


def rel(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def on(batch: Any) -> Any:
    return (lambda net: net(**batch)) if isinstance(batch, dict) else (lambda net: net(batch))


def proven(net: nn.Module, batch: Any, notes: list[str] | None = None) -> list[WholeHeads]:
    found = Calibration(batches=[batch])
    return proven_whole_heads(net, found, lambda found: found, [] if notes is None else notes)


def compressed(net: nn.Module, budget: Any = "1.2x", **how: Any) -> Any:
    how = {"data": batches(), "heal": False, "formats": WHOLE, "measure": False} | how
    return tt.compress(net, budget=budget, **how)


# -- the numbers ---------------------------------------------------------------------------------------


def test_losses_of_blocks_are_those_of_the_refitted_map() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, root = (torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in (5, 12))
    gram = root.T @ root / 12 + 0.1 * torch.eye(12)
    blocks = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    order = narrowing_of_blocks(weight, gram, None, blocks)
    assert float(order.losses[-1]) == pytest.approx(0.5 * energy(weight, gram))
    for k in (1, 2, 3):
        places = torch.tensor([n for block in order.kept(k).tolist() for n in blocks[block]])
        change = weight.clone()
        change[:, places] -= refitted(weight, gram, places)
        assert 0.5 * energy(change, gram) == pytest.approx(order.loss(k))


# -- found and tried -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 3)])
def test_groups_of_heads_and_their_makers_are_found(heads: int, groups: int) -> None:
    found = proven(attends(heads=heads, groups=groups), batches()[0])
    width = 6 * heads // groups
    rows = [(Rows(f"{k}.q", 0, width, width), Rows(f"{k}.k", 0, 6, 6), Rows(f"{k}.v", 0, 6, 6)) for k in (0, 2)]
    assert found == [WholeHeads(own, f"{k}.o", groups, heads // groups, 6) for k, own in zip((0, 2), rows, strict=True)]


def test_one_group_is_all_there_is() -> None:
    assert not proven(attends(groups=1), batches()[0])


def test_code_that_counts_heads_under_a_known_name_is_told() -> None:
    small = compressed(attends(how="counted", groups=4)).model
    assert small[0].num_heads == small[0].q.out_features // 6


def test_code_that_fixes_the_number_of_heads_keeps_them_and_says_so() -> None:
    notes: list[str] = []
    assert not proven(attends(how="fixed"), batches()[0], notes)
    assert len(notes) == 1
    assert "'0.o', '2.o'" in notes[0]


# -- plans ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [4, 2])
def test_plain_layers_are_left_and_the_budget_is_met(groups: int) -> None:
    net = attends(groups=groups)
    before = copy.deepcopy(net.state_dict())
    result = compressed(net)
    assert result.plan.whole_heads
    assert result.plan.params_after == count_params(result.model) <= count_params(net) / 1.2
    assert all(
        type(one) in (nn.Linear, nn.LayerNorm)
        for part in result.model
        for one in part.modules()
        if not list(one.children())
    )
    assert rel(result.model(batches()[0]), net(batches()[0])) < 0.5
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("groups", [4, 2])
def test_heads_that_nobody_reads_go_for_nothing(groups: int) -> None:
    net: Any = attends(groups=groups).double()
    width = 24 // groups
    with torch.no_grad():
        net[0].o.weight[:, :width] = 0
        net[2].o.weight[:, width : 2 * width] = 0
    data = [x.double() for x in batches()]
    one = sum(len(net[0].q.weight[:width]) * 25 for _ in range(1)) + 2 * 6 * 25 + width * 24
    result = compressed(net, {"params": count_params(net) - 2 * one}, data=data)
    kept = [[g for g in range(groups) if g != gone] for gone in (0, 1)]
    assert [list(some.kept) for some in result.plan.whole_heads] == kept
    assert rel(result.model(data[0]), net(data[0])) < 1e-6  # the second moments are shrunk a little


def test_plan_without_data_is_the_model_cut_by_hand() -> None:
    net: Any = attends().double()
    data = [x.double() for x in batches()]
    plan = tt.CompressionPlan.from_json(compressed(net, data=data).plan.to_json())
    small = tt.apply_plan_(copy.deepcopy(net), plan)
    for one in plan.whole_heads:
        part = net[int(one.heads.reader[0])]
        gone = [g for g in range(2) if g not in one.kept]
        with torch.no_grad():
            for g in gone:
                part.o.weight[:, 12 * g : 12 * g + 12] = 0
    assert plan.whole_heads
    assert rel(small(data[0]), net(data[0])) < 1e-12


def test_with_half_precision_and_gradients() -> None:
    net = attends().bfloat16()
    data = [x.bfloat16() for x in batches()]
    small = compressed(net, data=data).model
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    small(data[0]).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_in_place_an_error_brings_everything_back() -> None:
    net: Any = attends(how="counted", groups=4)
    objects, x = [*net.modules(), *net.parameters()], batches()[0]
    wanted = net(x)
    with pytest.raises(RuntimeError, match="stopped"):
        compressed(net, inplace=True, heal={"steps": 1}, observer=_Stops())
    assert all(p is q for p, q in zip([*net.modules(), *net.parameters()], objects, strict=True))
    assert net[0].num_heads == 4
    assert torch.equal(net(x), wanted)


class _Stops(Silent):
    def on_start(self, name: str, total: int | None) -> None:
        if name == "heal":
            raise RuntimeError("stopped")


def test_checkpoints_keep_what_the_code_counts(tmp_path) -> None:  # type: ignore[no-untyped-def]
    def make() -> nn.Module:
        return attends(how="counted", groups=4)

    x, small = batches()[0], compressed(make(), "1.3x").model
    tt.save_pretrained(small, tmp_path / "a")
    loaded = tt.load_pretrained(tmp_path / "a", model=make)
    assert torch.equal(loaded(x), small(x))
    tt.save_pretrained(loaded, tmp_path / "b")
    again = tt.load_pretrained(tmp_path / "b", model=loaded)
    assert torch.equal(again(x), small(x))
    given: Any = attends(how="counted", groups=2)
    with pytest.raises(CheckpointError):
        tt.load_pretrained(tmp_path / "b", model=given)
    assert given[0].num_heads == 4


def test_plans_that_do_not_fit_change_nothing() -> None:
    plan = compressed(attends()).plan
    for other in (attends(size=5), attends(heads=2), nn.Sequential(nn.Linear(24, 24))):
        before = [p.clone() for p in other.parameters()]
        with pytest.raises(ShapeError, match="Nothing was changed"):
            tt.apply_plan_(other, plan)
        assert all(torch.equal(p, q) for p, q in zip(other.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", ["whole_heads", "heads"])
def test_what_fewer_heads_spoil_is_measured_and_planned_by(kind: str) -> None:
    net = attends(how="counted")
    how: dict[str, Any] = {"formats": (kind,), "allow_slower": True}
    plan = compressed(net, **how).plan
    assert plan.groups
    found = losses_alone(net, tt.apply_plan_(copy.deepcopy(net), plan), plan)
    told = {name: loss for name, loss in found.items() if any(name in one.names for one in plan.groups)}
    assert len(told) == len(plan.groups)
    alone = tt.apply_plan_(copy.deepcopy(net), replace(plan, layers=()).with_groups(plan.groups[:1]))
    (name,) = [name for name in told if name in plan.groups[0].names]
    torch.testing.assert_close(told[name], loss_together(net, alone, plan, batches=plan.calibration.batches[:1]))
    measured = compressed(net, measure_losses=True, **how).plan
    assert measured.params_after <= count_params(net) / 1.2


def test_a_damaged_plan_is_refused() -> None:
    heads = compressed(attends()).plan.whole_heads[0].heads
    for kept in ((), (1, 0), (0, 0), (2,)):
        with pytest.raises(ValueError, match="between one and all"):
            NarrowedWholeHeads(heads, kept)


def test_whole_heads_have_to_be_asked_for() -> None:
    assert not tt.plan_compression(attends(), budget="1.1x", data=batches(), allow_slower=True).whole_heads


# -- models of transformers ----------------------------------------------------------------------------

_SMALL = {"vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
_WITHOUT_TABLES = {
    "Bert": "*embeddings*",
    "GPT2": "*w?e",
    "Llama": "*embed*",
    "Qwen3": "*embed*",  # norms of queries and keys
    "GPTNeoX": "*embed*",  # one map for queries, keys and values, head by head
}


def _model(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = dict(_SMALL) if kind == "GPT2" else {**_SMALL, "intermediate_size": 48}
    if kind in ("Llama", "Qwen3"):
        small |= {"num_key_value_heads": 2, "head_dim": 12}
    if kind != "Bert":
        small |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    name = {"GPT2": "GPT2LMHeadModel", "Bert": "BertModel"}.get(kind, f"{kind}ForCausalLM")
    return getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**small)).eval()


def _ids(n: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(4, 9, dtype=torch.long)
    return [{"input_ids": torch.randint(2, 60, (4, 9), generator=generator), "attention_mask": mask} for _ in range(n)]


@pytest.mark.parametrize("kind", list(_WITHOUT_TABLES))
def test_language_models_run_generate_and_load_as_before(kind: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    net, ids = _model(kind), _ids()
    result = compressed(net, "1.05x", data=ids, exclude=_WITHOUT_TABLES[kind])
    assert result.plan.whole_heads
    small = result.model
    assert count_params(small) == result.plan.params_after <= count_params(net) / 1.05
    if kind != "Bert":
        both = [small.generate(**ids[0], max_new_tokens=5, do_sample=False, use_cache=use) for use in (True, False)]
        assert torch.equal(*both)
    tt.save_pretrained(small, tmp_path)
    assert torch.equal(tt.load_pretrained(tmp_path)(**ids[0])[0], small(**ids[0])[0])


def _narrowed_evenly(net: nn.Module, what: str, *, last_too: bool = True) -> nn.Module:
    """The model with half of its units or heads in every layer, the last one perhaps aside."""
    ids = _ids(1)[0]
    plan = tt.plan_compression(net, budget=1.0, data=[ids], formats=("low_rank",))
    if what == "units":
        units = find_hidden_units(net, on(ids))
        groups: list[Any] = [Narrowed(one, tuple(range(0, one.n_units, 2)), 0) for one in units]
    else:
        groups = [NarrowedWholeHeads(one, tuple(range(one.n_groups // 2))) for one in find_whole_heads(net, on(ids))]
    plan = tt.compression.choose.plan.replace(plan, layers=(), calibration=None)
    return tt.apply_plan_(copy.deepcopy(net), plan.with_groups(groups if last_too else groups[:-1]))


_SAYS = [
    *(("units", kind) for kind in _WITHOUT_TABLES),
    ("heads", "Llama"),
    ("heads", "Qwen3"),
]


@pytest.mark.parametrize(("what", "kind"), _SAYS)
def test_a_config_that_can_say_the_sizes_does(what: str, kind: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    net: Any = _model(kind)
    before, ids = net.config.to_dict(), _ids(1)[0]
    small: Any = _narrowed_evenly(net, what)
    assert small.config.to_dict() != before == net.config.to_dict()
    assert not config_notes(small)
    small.save_pretrained(tmp_path / "theirs")
    again = type(small).from_pretrained(tmp_path / "theirs").eval()
    assert torch.equal(again(**ids)[0], small(**ids)[0])
    tt.save_pretrained(small, tmp_path / "ours")
    assert torch.equal(tt.load_pretrained(tmp_path / "ours")(**ids)[0], small(**ids)[0])
    if what == "units" and kind != "GPT2":
        assert small.config.intermediate_size == 24
    if what == "heads":
        assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (2, 1)


@pytest.mark.parametrize(("what", "kind", "last_too"), [("units", "Llama", False), ("heads", "Bert", True)])
def test_a_config_that_cannot_lists_the_sizes(what: str, kind: str, last_too: bool, tmp_path) -> None:  # type: ignore[no-untyped-def]
    net: Any = _model(kind)
    ids = _ids(1)[0]
    small: Any = _narrowed_evenly(net, what, last_too=last_too)
    assert not hasattr(net.config, "narrowed_sizes")
    listed = small.config.narrowed_sizes
    name, sizes = next(iter(listed.items()))
    assert all(getattr(small.get_submodule(name), size) == value for size, value in sizes.items())
    assert "load_pretrained" in config_notes(small)[0]
    tt.save_pretrained(small, tmp_path)
    assert torch.equal(tt.load_pretrained(tmp_path)(**ids)[0], small(**ids)[0])


def test_a_report_says_so_and_another_model_of_the_config_is_left_alone() -> None:
    first: Any = _model("Llama")
    second = type(first)(first.config)
    result = compressed(first, "1.3x", data=_ids(), formats=("narrow",), exclude="*embed*", inplace=True)
    assert result.model is first
    assert first.config is not second.config
    assert second.config.intermediate_size == 48
    widths = {layer.mlp.up_proj.out_features for layer in first.model.layers}
    said = widths == {first.config.intermediate_size}
    assert said != any("narrowed_sizes" in note for note in result.report.notes)
    assert all(part.config is first.config for part in first.modules() if hasattr(part, "config"))


def test_layers_of_a_plan_are_still_there() -> None:
    assert {layer.name for layer in find_layers(attends())[0]} >= {"0.q", "2.o"}


# -- torch's attention ---------------------------------------------------------------------------------


class Looks(nn.Module):
    """Attention of torch, its weights given on or not."""

    def __init__(self, *, need_weights: bool = False, **how: Any) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(24, 4, batch_first=True, **how), nn.LayerNorm(24)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Any:
        y, weights = self.attention(x, x, x, need_weights=self.need_weights)
        return (self.norm(x + y), weights) if self.need_weights else self.norm(x + y)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.mark.parametrize("make", [Looks, encoder])
def test_attention_of_torch_does_with_fewer_heads(make: Any, tmp_path) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    net, x = make().eval(), batches()[0]
    result = compressed(net, "1.15x", include="*att*")
    small = result.model
    assert result.plan.whole_heads
    assert result.plan.params_after == count_params(small) <= count_params(net) / 1.15
    (first, *_) = [part for part in small.modules() if isinstance(part, tt.nn.MultiheadAttention)]
    assert first.num_heads < 4
    assert first.head_dim == 6
    assert type(first.q_proj) is nn.Linear
    assert first.q_proj.out_features == first.out_proj.in_features == 6 * first.num_heads
    assert rel(small(x), net(x)) < 0.5
    tt.save_pretrained(small, tmp_path / "a")
    loaded = tt.load_pretrained(tmp_path / "a", model=make)
    assert torch.equal(loaded(x), small(x))
    tt.save_pretrained(loaded, tmp_path / "b")
    again = tt.load_pretrained(tmp_path / "b", model=loaded)
    assert torch.equal(again(x), small(x))
    assert torch.equal(tt.to_dense_(copy.deepcopy(small))(x), small(x))  # torch's layer cannot hold them


def test_heads_of_torch_that_nobody_reads_go_for_nothing() -> None:
    torch.manual_seed(0)
    net: Any = Looks().eval().double()
    with torch.no_grad():
        net.attention.out_proj.weight[:, 6:12] = 0
    data = [x.double() for x in batches()]
    result = compressed(net, {"params": count_params(net) - 3 * 6 * 25 - 6 * 24}, data=data)
    assert [one.kept for one in result.plan.whole_heads] == [(0, 2, 3)]
    assert rel(result.model(data[0]), net(data[0])) < 1e-6
    torch.manual_seed(1)
    whole = compressed(Looks().eval(), 1.0).model
    assert type(whole.attention) is nn.MultiheadAttention  # of which nothing went


def test_weights_that_are_means_over_heads_keep_them_all() -> None:
    torch.manual_seed(0)
    plan = tt.plan_compression(
        Looks(need_weights=True).eval(), budget=1.0, data=batches(), formats=("low_rank", *WHOLE)
    )
    assert not plan.whole_heads
    assert any("attention heads before" in note for note in plan.notes)
