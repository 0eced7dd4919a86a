"""A table that the output layer shares is one weight: decomposed once, and shared afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression.survey.layers import count_params, find_layers

VOCABULARY = 300


class Language(nn.Module):
    """Words in, logits over the same words out."""

    def __init__(self, *, tied: bool = True, bias: bool = False, dim: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.hidden = nn.Embedding(VOCABULARY, dim), nn.Linear(dim, dim)
        self.head = nn.Linear(dim, VOCABULARY, bias=bias)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.table(ids))))


def text(n: int = 6) -> list[Tensor]:
    shares = 1 / torch.arange(1, VOCABULARY + 1).double()
    generator = torch.Generator().manual_seed(1)
    return [torch.multinomial(shares, 16 * 8, True, generator=generator).view(16, 8) for _ in range(n)]


@pytest.mark.parametrize("bias", [False, True])
def test_table_and_head_are_one_layer_and_stay_so(bias: bool) -> None:
    net = Language(bias=bias).eval()
    found, left = find_layers(net)
    assert [layer.name for layer in found] == ["table", "hidden"]
    assert not left
    result = tt.compress(net, budget="2x", data=text(), heal=False, measure=False, allow_slower=True)
    small = result.model
    assert isinstance(small.head, tt.nn.TiedHead)
    assert small.head.embedding is small.table
    assert count_params(small) == result.report.params_after <= count_params(net) / 2
    h = torch.randn(3, 24)
    bias_of = 0.0 if small.head.bias is None else small.head.bias
    torch.testing.assert_close(small.head(h), h @ small.table.weight.T + bias_of, rtol=1e-4, atol=1e-5)


def test_an_untied_model_of_the_same_kind_has_three_layers() -> None:
    assert len(find_layers(Language(tied=False))[0]) == 3


def test_a_third_owner_keeps_it_as_it_is() -> None:
    net = Language()
    net.other = nn.Linear(24, VOCABULARY, bias=False)
    net.other.weight = net.table.weight
    found, left = find_layers(net)
    assert [layer.name for layer in found] == ["hidden"]
    assert {one.name for one in left} == {"table", "head", "other"}
    assert all("tied" in one.reason for one in left)


@pytest.mark.parametrize("pattern", ["table", "head"])
def test_either_name_leaves_both_alone(pattern: str) -> None:
    assert [layer.name for layer in find_layers(Language(), exclude=pattern)[0]] == ["hidden"]
    assert [layer.name for layer in find_layers(Language(), include=pattern)[0]] == ["table"]


def test_a_head_that_cannot_be_changed_is_told_with_its_table() -> None:
    net = Language()
    net.head.forward = lambda h: h @ net.table.weight.T  # one of its own
    found, left = find_layers(net)
    assert [layer.name for layer in found] == ["hidden"]
    assert {one.name for one in left} == {"table", "head"}


def test_what_the_head_needs_counts() -> None:
    """Weighed by lookups and logits together, logits suffer less than by lookups alone."""
    net, data = Language().eval(), text()
    kept = {"include": "table", "formats": ("low_rank",), "allow_slower": True}
    both = tt.plan_compression(net, budget="1.6x", data=data, **kept)
    moments = both.calibration.of("table")
    assert torch.isclose(moments.gram.sum(), torch.tensor(1.0, dtype=torch.float64))
    alone = copy.deepcopy(both)
    untied = tt.plan_compression(Language(tied=False), budget="1.6x", data=data, **kept).calibration.of("table")
    alone.calibration.of("table").gram, alone.calibration.of("table").output_gram = untied.gram, untied.output_gram
    wanted = torch.cat([net(x) for x in data]).log_softmax(-1)
    errors = []
    for plan in (both, alone):
        found = torch.cat([tt.apply_plan_(copy.deepcopy(net), plan)(x) for x in data]).log_softmax(-1)
        errors.append(float((wanted.exp() * (wanted - found)).sum(-1).mean().detach()))
    assert errors[0] < errors[1]


def test_back_to_dense_they_share_one_parameter() -> None:
    net = Language(bias=True).eval()
    small = tt.compress(net, budget="2x", data=text(), heal=False, measure=False, allow_slower=True).model
    wanted = small(text()[0])
    dense = tt.to_dense_(small)
    assert type(dense.head) is nn.Linear
    assert dense.head.weight is dense.table.weight
    torch.testing.assert_close(dense(text()[0]), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("into", ["class", "dense model", "small model"])
def test_checkpoints_share_the_table_again(into: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    small = tt.compress(
        Language(bias=True).eval(), budget="2x", data=text(), heal=False, measure=False, allow_slower=True
    ).model
    tt.save_pretrained(small, tmp_path)
    model = {"class": lambda: Language(bias=True), "dense model": Language(bias=True), "small model": small}[into]
    wanted = small(text()[0])
    loaded = tt.load_pretrained(tmp_path, model=model)
    assert torch.equal(loaded(text()[0]), wanted)
    assert loaded.head.embedding is loaded.table
    loaded(text()[0]).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())
    assert count_params(loaded) == count_params(small)


def _tied(transformers, kind: str):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=4, n_positions=32)
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    config.tie_word_embeddings = True
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_language_models_generate(kind: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    transformers = pytest.importorskip("transformers")
    net = _tied(transformers, kind)
    data = [{"input_ids": ids} for ids in text()]
    how = {"include": "lm_head", "heal": False, "measure": False, "allow_slower": True}
    result = tt.compress(net, budget="1.2x", data=data, **how)
    assert isinstance(result.model.lm_head, tt.nn.TiedHead)
    assert result.report.params_after <= count_params(net) / 1.2
    new = result.model.generate(data[0]["input_ids"], max_new_tokens=4, do_sample=False)
    assert new.shape == (16, 12)
    tt.save_pretrained(result.model, tmp_path)
    loaded = tt.load_pretrained(tmp_path)
    assert torch.equal(loaded(**data[0]).logits, result.model(**data[0]).logits)


class Offset(Language):
    """Hidden states far from zero."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.table(ids))) + 2.0)


def test_a_mean_of_what_the_head_reads_does_no_harm_beside_a_bias() -> None:
    data, errors = text(), []
    for bias in (False, True):
        net = Offset(bias=bias).eval()
        how = {"include": "table", "formats": ("low_rank",), "allow_slower": True, "heal": False, "measure": False}
        small = tt.compress(net, budget="1.6x", data=data, **how).model
        errors.append(float((small(data[0]) - net(data[0])).detach().square().mean()))
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize("how", ["buffer", "view"])
def test_whoever_else_has_numbers_of_the_table_keeps_it(how: str) -> None:
    net = Language()
    if how == "buffer":
        net.register_buffer("copy", net.table.weight.data)
    else:
        net.other = nn.Linear(24, 10, bias=False)
        net.other.weight = nn.Parameter(net.table.weight.data[:10])
    found, left = find_layers(net)
    assert [layer.name for layer in found] == ["hidden"]
    assert {"table", "head"} <= {one.name for one in left}


def test_what_hangs_on_a_head_goes_along_and_comes_back() -> None:
    net = Language().eval()
    net.head.note = "mine"
    net.head.register_buffer("extra", torch.arange(3.0))
    how = {"include": "table", "formats": ("low_rank",), "allow_slower": True, "heal": False, "measure": False}
    small = tt.compress(net, budget="1.5x", data=text(), **how).model
    assert small.head.note == "mine"
    assert torch.equal(small.head.extra, net.head.extra)
    dense = tt.to_dense_(small)
    assert dense.head.note == "mine"
    assert torch.equal(dense.head.extra, net.head.extra)


def test_a_plan_fits_only_models_that_tie_the_same_head() -> None:
    plan = tt.plan_compression(Language(), budget="1.5x", data=text(), include="table", allow_slower=True)
    assert plan.layers[0].head == "head"
    assert tt.CompressionPlan.from_json(plan.to_json()) == plan
    with pytest.raises(tt.errors.ShapeError, match="output layer that shares"):
        tt.apply_plan_(Language(tied=False), plan)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_transformers_saves_and_ties_what_is_tied_by_now(kind: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    transformers = pytest.importorskip("transformers")
    net = _tied(transformers, kind)
    keys = dict(net.all_tied_weights_keys)
    how = {"include": "lm_head", "heal": False, "measure": False, "allow_slower": True}
    small = tt.compress(net, budget="1.2x", data=[{"input_ids": ids} for ids in text()], **how).model
    assert net.all_tied_weights_keys == keys
    wanted = small(text()[0]).logits
    small.tie_weights()
    small.save_pretrained(tmp_path)
    assert torch.equal(small(text()[0]).logits, wanted)
    back = tt.to_dense_(small)
    assert back.all_tied_weights_keys == keys
    back.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path)
    assert torch.allclose(again(text()[0]).logits, wanted, atol=1e-4)


def test_flops_are_those_of_the_head_too() -> None:
    net, data = Language().eval(), text()
    plan = tt.plan_compression(net, budget={"flops": "2x"}, data=data, allow_slower=True)
    (table,) = [layer for layer in plan.layers if layer.name == "table"]
    assert table.flops_before == 2 * 8 * VOCABULARY * 24  # eight words in an example
    assert table.flops_after is not None
    assert 0 < table.flops_after < table.flops_before
    assert (
        sum(layer.flops_after or 0 for layer in plan.layers)
        <= sum(layer.flops_before or 0 for layer in plan.layers) / 2
    )


def test_formats_that_are_no_chains_serve_a_tied_table_too() -> None:
    net = Language().eval()
    how = {"include": "table", "formats": ("cp",), "allow_slower": True, "heal": False, "measure": False}
    small = tt.compress(net, budget="1.5x", data=text(), **how).model
    assert small.table.spec.format == "cp"
    assert small.head(torch.randn(2, 24)).shape == (2, VOCABULARY)
