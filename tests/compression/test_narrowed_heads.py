"""Attention heads with fewer directions: found, tried, on the menu, applied, stored; on attention of many kinds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression.choose.plan import NarrowedHeads
from tensortrain.compression.narrow_heads import narrowed_heads
from tensortrain.compression.survey.heads import AttentionHeads, find_heads
from tensortrain.compression.survey.layers import count_params, find_layers
from tensortrain.compression.survey.moments import Calibration, LayerMoments
from tensortrain.compression.survey.proven_heads import proven_heads
from tensortrain.compression.swap import swap
from tensortrain.errors import CheckpointError, ShapeError
from tensortrain.formats.head_narrowing import head_bases, head_steps, refit_heads, score_bases, score_steps
from tensortrain.formats.rotary_pairs import kept_pairs, pair_steps
from tensortrain.formats.weighting import energy
from tensortrain.system.observer import Silent

HEADS = ("heads",)


class Attention(nn.Module):
    """Heads of the queries share those of keys and values, in groups."""

    def __init__(self, width: int = 24, heads: int = 4, groups: int = 2, size: int = 6, *, norm: bool = False) -> None:
        super().__init__()
        self.heads, self.groups, self.size, self.norm = heads, groups, size, norm
        self.q, self.k = nn.Linear(width, heads * size), nn.Linear(width, groups * size)
        self.v, self.o = nn.Linear(width, groups * size), nn.Linear(heads * size, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (y.repeat_interleave(self.heads // self.groups, dim=1) for y in (k, v))
        z = nn.functional.scaled_dot_product_attention(q, k, v)
        z = nn.functional.normalize(z, dim=-1) if self.norm else z
        return x + self.o(z.transpose(1, 2).flatten(2))


def attends(**how: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Attention(**how), nn.LayerNorm(how.get("width", 24)), Attention(**how)).eval()


def batches(n: int = 6, width: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 7, width, generator=generator) for _ in range(n)]


def rel(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def spd(n: int, seed: int) -> Tensor:
    root = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.mT / n + 0.1 * torch.eye(n, dtype=torch.float64)


def weights(m: int, n: int) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


# -- the numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_groups", "n_heads"), [(3, 3), (2, 4), (1, 3)])
def test_losses_are_those_of_the_maps_that_are_built(n_groups: int, n_heads: int) -> None:
    weight, gram, outputs = weights(7, 5 * n_heads), spd(5 * n_heads, 1), spd(7, 2)
    steps = head_steps(weight, gram, outputs, n_groups, n_heads)
    assert steps.widths[0] == (5,) * n_groups
    assert steps.widths[-1] == (1,) * n_groups
    assert steps.worst == pytest.approx(0.5 * energy(weight, gram, outputs))
    for widths, loss in zip(steps.widths, steps.losses, strict=True):
        bases = head_bases(weight, gram, outputs, n_heads, widths)
        assert tuple(len(base) for base in bases) == widths
        new, chosen = refit_heads(weight, gram, bases, n_heads)
        assert 0.5 * energy(weight - new @ chosen, gram, outputs) == pytest.approx(loss, abs=1e-9 * steps.worst)


def test_one_head_alone_is_the_truncated_svd_of_the_product() -> None:
    weight, gram = weights(9, 6), spd(6, 3)
    steps = head_steps(weight, gram, None, 1, 1)
    values = torch.linalg.svdvals(weight @ torch.linalg.cholesky(gram)).square()
    for widths, loss in zip(steps.widths, steps.losses, strict=True):
        assert loss == pytest.approx(0.5 * float(values[widths[0] :].sum()), abs=1e-9)


def test_no_other_subspace_of_a_head_is_better() -> None:
    weight, gram = weights(9, 12), spd(12, 4)
    steps = head_steps(weight, gram, None, 2, 2)
    best = steps.losses[1]
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        one = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
        for bases in ([one[:5], torch.eye(6).double()], [torch.eye(6).double(), one[:5]]):
            new, chosen = refit_heads(weight, gram, bases, 2)
            assert 0.5 * energy(weight - new @ chosen, gram) >= best - 1e-9


@pytest.mark.parametrize("k", [1, 4, 6])
def test_scores_keep_the_truncated_svd_of_what_they_sum_over(k: int) -> None:
    key, gradient = spd(6, 7), spd(6, 8)
    steps = score_steps([key, spd(6, 9)], [gradient, spd(6, 10)])
    assert steps.widths[0] == (6, 6)
    assert steps.widths[-1] == (1, 1)
    alone = score_steps([key], [gradient])
    (keys,), (queries,) = score_bases([key], [gradient], [k])
    lost = torch.eye(6, dtype=torch.float64) - queries.mT @ keys
    loss = 0.5 * float((gradient @ lost @ key @ lost.mT).trace())
    assert loss == pytest.approx(alone.losses[6 - k], abs=1e-9)
    roots = [torch.linalg.cholesky(one) for one in (gradient, key)]
    values = torch.linalg.svdvals(roots[0].mT @ roots[1]).square()
    assert loss == pytest.approx(0.5 * float(values[k:].sum()), abs=1e-9)
    assert torch.allclose(keys @ keys.mT, torch.eye(k, dtype=torch.float64))


# -- found and tried -----------------------------------------------------------------------------------


def on(x: Any) -> Callable[[nn.Module], Any]:
    return (lambda net: net(**x)) if isinstance(x, Mapping) else (lambda net: net(x))


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1), (1, 1)])
def test_heads_and_their_groups_are_found(heads: int, groups: int) -> None:
    found = find_heads(attends(heads=heads, groups=groups), on(batches()[0]))
    sizes = (heads, groups, 6, 0, 6)
    assert found[::2] == [AttentionHeads(f"{k}.v", f"{k}.o", *sizes) for k in (0, 2)]
    assert found[1::2] == [AttentionHeads(f"{k}.k", f"{k}.q", *sizes, "scores") for k in (0, 2)]


def proven(net: nn.Module, batch: Any) -> list[AttentionHeads]:
    layers = {layer.name: layer for layer in find_layers(net)[0]}
    return proven_heads(net, Calibration(batches=[batch]), layers, lambda found: found, [])


def test_a_norm_of_each_head_is_no_matter_of_directions() -> None:
    assert [one.kind for one in proven(attends(), batches()[0])] == ["values", "scores"] * 2
    assert all(one.kind == "scores" for one in proven(attends(norm=True), batches()[0]))


class Read(nn.Module):
    """Values are read elsewhere too, in training alone if asked for."""

    def __init__(self, *, in_training: bool) -> None:
        super().__init__()
        self.attention, self.probe, self.in_training = Attention(groups=4), nn.Linear(24, 3), in_training

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x)
        seen = self.training or not self.in_training
        return y + self.probe(self.attention.v(x)).sum(-1, keepdim=True) if seen else y


@pytest.mark.parametrize("in_training", [False, True])
def test_values_that_others_read_stay(in_training: bool) -> None:
    torch.manual_seed(0)
    assert all(one.kind == "scores" for one in proven(Read(in_training=in_training).eval(), batches()[0]))


# -- plans ---------------------------------------------------------------------------------------------


def compressed(net: nn.Module, budget: Any = "1.2x", **how: Any) -> Any:
    how = {"data": batches(), "heal": False, "formats": HEADS, "measure": False, "allow_slower": True} | how
    return tt.compress(net, budget=budget, **how)


@pytest.mark.parametrize("groups", [4, 2])
def test_budget_is_met_and_the_model_keeps_its_shapes(groups: int) -> None:
    net = attends(groups=groups)
    before = copy.deepcopy(net.state_dict())
    result = compressed(net)
    plan = result.plan
    assert plan.heads
    assert not plan.narrowed
    assert plan.params_after == count_params(result.model) <= plan.params_before / 1.2
    assert result.model(batches()[0]).shape == (8, 7, 24)
    assert rel(result.model(batches()[0]), net(batches()[0])) < 0.3
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


def test_planted_directions_are_found_and_go_for_nothing() -> None:
    net = attends(width=64, heads=4, groups=4, size=16)
    with torch.no_grad():
        for part in (net[0], net[2]):
            for h, k in enumerate((3, 8, 5, 2)):  # directions that each head really has, in no basis of its own
                rows = slice(16 * h, 16 * h + 16)
                one = torch.linalg.qr(torch.randn(16, 16))[0][:, :k]
                part.v.weight[rows], part.v.bias[rows] = one @ one.T @ part.v.weight[rows], 0.0
    data = batches(12, 64)
    result = compressed(net, "1.55x", data=data, include=["*.v", "*.o"])
    assert [one.kept for one in result.plan.heads] == [(3, 8, 5, 2)] * 2
    assert rel(result.model(data[0]), net(data[0])) < 0.01


def test_scores_lose_planted_directions_for_nothing() -> None:
    net = attends(width=64, heads=4, groups=2, size=16)
    with torch.no_grad():
        for part in (net[0], net[2]):
            for g, k in enumerate((3, 8)):
                rows = slice(16 * g, 16 * g + 16)
                one = torch.linalg.qr(torch.randn(16, 16))[0][:, :k]
                part.k.weight[rows] = one @ one.T @ part.k.weight[rows]
    data = batches(12, 64)
    result = compressed(net, "1.48x", data=data, include=["*.q", "*.k"])
    assert [one.heads.kind for one in result.plan.heads] == ["scores"] * 2
    assert all(kept[0] <= 4 and kept[1] <= 9 for kept in (one.kept for one in result.plan.heads))
    assert rel(result.model(data[0]), net(data[0])) < 1e-3


def test_narrowed_heads_beat_low_rank_maps() -> None:
    net, data = attends(width=48, heads=4, groups=4, size=12), batches(20, 48)
    how = {"data": data, "include": ["*.v", "*.o"]}
    narrow = compressed(net, "1.15x", **how)
    factored = compressed(net, "1.15x", formats=("low_rank",), **how)
    assert rel(narrow.model(data[0]), net(data[0])) < 0.7 * rel(factored.model(data[0]), net(data[0]))


def test_with_half_and_double_precision_and_gradients() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        net = attends().to(dtype)
        data = [x.to(dtype) for x in batches()]
        result = compressed(net, data=data)
        assert result.plan.heads
        assert {p.dtype for p in result.model.parameters()} == {dtype}
        result.model(data[0]).square().mean().backward()
        assert all(p.grad is not None for p in result.model[0].parameters())


def test_exact_at_full_width() -> None:
    net, data = attends().double(), batches()[0].double()
    layers = {layer.name: layer for layer in find_layers(net)[0]}
    wanted = net(data)
    for heads in find_heads(net, on(data)):
        seen = torch.randn(4096, 24, dtype=torch.float64) + 1
        moments = LayerMoments(gram=seen.T.cov(correction=0), mean=seen.mean(0))
        moments.output_gram = None if heads.kind == "values" else spd(12, 6)
        built, statistics = narrowed_heads(net, heads, (6, 6), layers, moments)
        assert not statistics
        swap(net, built)
    assert rel(net(data), wanted) < 1e-12


def test_the_mean_of_what_goes_is_made_up_for() -> None:
    net, data = attends(), [x + 3 for x in batches()]
    result = compressed(net, "1.05x", data=data, include=["0.v", "0.o"])
    assert result.plan.heads
    means = [torch.cat([part(x) for x in data]).mean((0, 1)) for part in (result.model[0], net[0])]
    assert torch.allclose(*means, atol=1e-3)


def test_plan_goes_through_json_and_fits_without_what_was_seen() -> None:
    net = attends()
    plan = compressed(net).plan
    again = tt.CompressionPlan.from_json(plan.to_json())
    assert again == plan
    assert '"version": 5' in plan.to_json()
    small = tt.apply_plan_(copy.deepcopy(net), again)
    assert count_params(small) == plan.params_after
    assert rel(small(batches()[0]), net(batches()[0])) < 0.5
    without = compressed(net, formats=("low_rank",)).plan.to_json()
    assert '"version": 2' in without


def test_a_damaged_plan_is_refused() -> None:
    text = compressed(attends()).plan.to_json()
    kept = NarrowedHeads(AttentionHeads("a", "b", 4, 2, 6, 0, 6), (3, 2))
    assert kept.names == ("a", "b")
    for wrong in ('"size": 6', '"size": 1'), ('"n_groups": 2', '"n_groups": 1'):
        with pytest.raises(CheckpointError, match="must be the text"):
            tt.CompressionPlan.from_json(text.replace(*wrong))


def test_plan_of_another_model_changes_nothing() -> None:
    plan = compressed(attends()).plan
    for other in (attends(size=5), attends(groups=1), nn.Sequential(nn.Linear(24, 24))):
        before = [p.clone() for p in other.parameters()]
        with pytest.raises(ShapeError, match="Nothing was changed"):
            tt.apply_plan_(other, plan)
        assert all(torch.equal(p, q) for p, q in zip(other.parameters(), before, strict=True))


def test_in_place_an_error_brings_the_maps_back() -> None:
    net = attends()
    objects = [*net.modules(), *net.parameters()]
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match="stopped"):
        compressed(net, inplace=True, heal={"steps": 1}, observer=_After("heal"))
    assert all(p is q for p, q in zip([*net.modules(), *net.parameters()], objects, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


class _After(Silent):
    def __init__(self, part: str) -> None:
        self.part = part

    def on_start(self, name: str, total: int | None) -> None:
        if name == self.part:
            raise RuntimeError("stopped")


def test_checkpoints_keep_what_is_read_and_made(tmp_path) -> None:  # type: ignore[no-untyped-def]
    data = batches()
    result = compressed(attends())
    tt.save_pretrained(result.model, tmp_path / "a")
    loaded = tt.load_pretrained(tmp_path / "a", model=attends)
    assert torch.equal(loaded(data[0]), result.model(data[0]))
    given = attends()
    assert tt.load_pretrained(tmp_path / "a", model=given) is given
    assert torch.equal(given(data[0]), result.model(data[0]))
    tt.save_pretrained(loaded, tmp_path / "b")
    again = tt.load_pretrained(tmp_path / "b", model=loaded)  # has these layers already
    assert torch.equal(again(data[0]), result.model(data[0]))
    with pytest.raises(CheckpointError, match="narrowed layer"):
        tt.load_pretrained(tmp_path / "b", model=lambda: attends(size=5))


def test_state_dict_copies_and_pickles(tmp_path) -> None:  # type: ignore[no-untyped-def]
    net, data = compressed(attends()).model, batches()[0]
    other = copy.deepcopy(net)
    for p in other.parameters():
        p.data.zero_()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(data), net(data))
    torch.save(net, tmp_path / "net.pt")
    assert torch.equal(torch.load(tmp_path / "net.pt", weights_only=False)(data), net(data))


def test_a_second_compression_says_why_it_leaves_them() -> None:
    net = compressed(attends(), "1.1x", include=["*.v", "*.o"]).model
    plan = tt.plan_compression(net, budget="1.05x", data=batches(), formats=("low_rank",), allow_slower=True)
    reasons = {left.name: left.reason for left in plan.left_alone}
    assert "attention heads" in reasons["0.v"]


def test_only_what_takes_no_longer_unless_that_is_allowed() -> None:
    net = attends()  # so small that putting numbers in their places takes longer than what is saved
    plan = tt.plan_compression(net, budget=1.0, data=batches(), formats=HEADS)
    assert not plan.heads


def test_heads_have_to_be_asked_for() -> None:
    how = {"budget": "1.1x", "data": batches(), "allow_slower": True}
    assert not tt.plan_compression(attends(), **how).heads
    assert tt.plan_compression(attends(), **how, formats=("low_rank", "narrow", "heads")).heads


def test_the_report_counts_what_is_left() -> None:
    result = compressed(attends(), measure=True)
    assert result.plan.heads
    assert result.report.params_after == count_params(result.model) == result.plan.params_after
    assert "narrow" in str(result.plan)


def test_heads_that_do_nothing_go_first() -> None:
    net = attends(groups=4)
    with torch.no_grad():
        for part in (net[0], net[2]):
            part.o.weight[:, :6] = 0  # nobody reads the first head
    result = compressed(net, "1.1x")
    kept = [one.kept for one in result.plan.heads]
    assert kept
    assert all(one[0] == 1 for one in kept)
    again = tt.CompressionPlan.from_json(result.plan.to_json())
    assert torch.isfinite(tt.apply_plan_(copy.deepcopy(net), again)(batches()[0])).all()


def test_bytes_count_the_numbers_of_what_is_kept() -> None:
    result = compressed(attends(), {"bytes": 13_000})
    assert result.plan.heads
    tensors = (*result.model.parameters(), *result.model.buffers())
    assert sum(t.numel() * t.element_size() for t in tensors) <= 13_000


# -- models of transformers ----------------------------------------------------------------------------

_SMALL = {"vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
_MAPS = {
    "Mistral": ["*self_attn*"],  # rotary, grouped heads
    "GPT2": ["*attn*"],  # one map for queries, keys and values
    "GPTNeoX": ["*attention*"],  # the same, head by head
    "Qwen3": ["*self_attn*"],  # norms of queries and keys
    "Electra": ["*attention*"],
}


def _model(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = _SMALL | ({} if kind == "GPT2" else {"intermediate_size": 48})
    if kind in ("Mistral", "Qwen3"):
        small |= {"num_key_value_heads": 2, "head_dim": 12}
    if kind in ("Mistral", "Qwen3", "GPTNeoX", "GPT2"):
        small |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    name = {"GPT2": "GPT2LMHeadModel", "Electra": "ElectraModel"}.get(kind, f"{kind}ForCausalLM")
    return getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**small)).eval()


@pytest.mark.parametrize("kind", list(_MAPS))
def test_language_models_run_and_generate_as_before(kind: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    net = _model(kind)
    ids = [{"input_ids": torch.randint(2, 60, (4, 9))} for _ in range(4)]
    result = compressed(net, "1.05x", data=ids, include=_MAPS[kind])
    kinds = {one.heads.kind for one in result.plan.heads}
    assert kinds
    assert kinds <= {"values", *({"Electra": ["scores"], "Mistral": ["halves"]}.get(kind, []))}
    small = result.model
    assert count_params(small) == result.plan.params_after <= count_params(net) / 1.05
    wanted = small(**ids[0])[0]
    if kind != "Electra":
        long = [
            small.generate(ids[0]["input_ids"], max_new_tokens=5, do_sample=False, use_cache=u) for u in (True, False)
        ]
        assert torch.equal(*long)
    tt.save_pretrained(small, tmp_path)
    assert torch.equal(tt.load_pretrained(tmp_path)(**ids[0])[0], wanted)


# -- rotary pairs --------------------------------------------------------------------------------------


def _turned(kind: str, **more: Any) -> nn.Module:
    """A decoder whose positions turn keys and queries in pairs."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {**_SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, **more}
    config = getattr(transformers, f"{kind}Config")(**small, pad_token_id=1)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize(("kind", "pairing"), [("Llama", "halves"), ("Cohere", "neighbours")])
def test_pairs_that_positions_turn_are_found_as_they_lie(kind: str, pairing: str) -> None:
    net, ids = _turned(kind), {"input_ids": torch.randint(2, 60, (4, 9))}
    found = [one for one in proven(net, ids) if one.kind != "values"]
    assert [(one.kind, one.n_heads, one.n_groups, one.size) for one in found] == [(pairing, 4, 2, 8)] * 2


def test_pairs_stay_where_a_norm_comes_between() -> None:
    ids = {"input_ids": torch.randint(2, 60, (4, 9))}
    assert all(one.kind == "values" for one in proven(_turned("Qwen3", head_dim=8), ids))


def _cut_by_hand(net: Any, kept: list[list[list[int]]]) -> nn.Module:
    """Rows of other pairs set to zero in queries and keys, layer by layer and group by group."""
    small = copy.deepcopy(net)
    with torch.no_grad():
        for layer, groups in zip(small.model.layers, kept, strict=True):
            for g, numbers in enumerate(groups):
                gone = [k for k in range(8) if k not in numbers]
                layer.self_attn.k_proj.weight[[8 * g + k for k in gone]] = 0
                layer.self_attn.q_proj.weight[[8 * h + k for h in (2 * g, 2 * g + 1) for k in gone]] = 0
    return small


@pytest.mark.parametrize(("kind", "last"), [("Llama", [3, 7]), ("Cohere", [6, 7])])
def test_pairs_that_nothing_comes_from_go_for_nothing(kind: str, last: list[int], tmp_path) -> None:  # type: ignore[no-untyped-def]
    net: Any = _turned(kind).double()
    kept = [[[k for k in range(8) if k not in last]] * 2] * 2
    with torch.no_grad():
        for layer in net.model.layers:  # nobody asks for the last pair of a head
            layer.self_attn.q_proj.weight.unflatten(0, (4, 8))[:, last] = 0
    ids = [{"input_ids": torch.randint(2, 60, (4, 9)), "attention_mask": torch.ones(4, 9).long()} for _ in range(4)]
    n = sum(
        part.weight.numel() for layer in net.model.layers for part in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    how = {"data": ids, "include": ["*q_proj", "*k_proj"]}
    result = compressed(net, {"params": count_params(net) - n // 4}, **how)
    assert [one.kept for one in result.plan.heads] == [(6, 6), (6, 6)]
    wanted = net(**ids[0]).logits
    assert rel(result.model(**ids[0]).logits, wanted) < 1e-12
    assert rel(_cut_by_hand(net, kept)(**ids[0]).logits, wanted) < 1e-12
    small, x = result.model, ids[0]
    long = [small.generate(**x, max_new_tokens=5, do_sample=False, use_cache=u) for u in (True, False)]
    assert torch.equal(*long)
    tt.save_pretrained(small, tmp_path)
    assert torch.equal(tt.load_pretrained(tmp_path)(**x).logits, small(**x).logits)


def test_losses_of_pairs_are_those_of_what_is_cut() -> None:
    keys, gradients = [spd(8, 1), spd(8, 2)], [spd(8, 3), spd(8, 4)]
    for pairing in ("halves", "neighbours"):
        steps = pair_steps(keys, gradients, pairing)
        assert steps.widths[0] == (8, 8)
        assert steps.widths[-1] == (2, 2)
        for widths, loss in zip(steps.widths, steps.losses, strict=True):
            total = 0.0
            for key, gradient, width in zip(keys, gradients, widths, strict=True):
                kept = kept_pairs(key, gradient, pairing, width)
                assert len(kept) == width
                lost = torch.eye(8, dtype=torch.float64)
                lost[kept] = 0
                total += 0.5 * float((gradient @ lost @ key @ lost).trace())
            assert total == pytest.approx(loss)


def test_images_and_decoders_that_look_at_an_encoder() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    net = transformers.ViTModel(transformers.ViTConfig(**small, image_size=16, patch_size=4)).eval()
    data = [{"pixel_values": torch.randn(4, 3, 16, 16)} for _ in range(3)]
    assert compressed(net, "1.05x", data=data, include="*attention*").plan.heads
    assert len(proven(net, data[0])) == 4
    config = transformers.T5Config(vocab_size=60, d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=1)
    net = transformers.T5Model(config).eval()
    ids = torch.randint(2, 60, (4, 9))
    assert [one.kind for one in proven(net, {"input_ids": ids, "decoder_input_ids": ids})] == ["values", "scores"] * 3
