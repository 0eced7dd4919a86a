"""Linear layers whose modes multiply to more than their sizes."""

import pytest
import torch
import torch.nn.functional as F

import tensortrain as tt
from tensortrain.errors import ShapeError

DOUBLE = {"dtype": torch.float64}


def padded(**options):
    return tt.nn.Linear(37, 53, in_modes=(5, 8), out_modes=(9, 6), rank=7, **{**DOUBLE, **options})


@pytest.mark.parametrize("implementation", ["auto", "factorized", "dense"])
@pytest.mark.parametrize("lead", [(), (0,), (1,), (3, 4)])
def test_output_and_gradients_are_those_of_the_dense_weight(implementation, lead):
    layer = padded(implementation=implementation)
    x = torch.randn(*lead, 37, requires_grad=True, **DOUBLE)
    factor = torch.randn(*lead, 53, **DOUBLE)
    y = layer(x)
    assert y.shape == (*lead, 53)
    expected = F.linear(x, layer.format.to_dense(list(layer.cores), layer.spec), layer.bias)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    wanted = (x, layer.bias, *layer.cores)
    found = torch.autograd.grad((y * factor).sum(), wanted)
    for one, other in zip(found, torch.autograd.grad((expected * factor).sum(), wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("force", ["left-to-right", "right-to-left", "merged", "factorized"])
def test_every_plan_takes_the_padded_input(batch, force):
    layer = padded(bias=False)
    plan = layer.plan(batch, force=force)
    x = torch.randn(batch, 37, **DOUBLE)
    torch.testing.assert_close(
        plan.execute(x, (), layer.runner.prepared(layer, plan), layer.bias),
        F.linear(x, layer.weight),
        rtol=1e-12,
        atol=1e-12,
    )


def test_full_rank_reproduces_a_dense_layer_of_prime_sizes():
    dense = torch.nn.Linear(37, 53, **DOUBLE)
    layer = tt.nn.Linear.from_dense(dense, in_modes=(5, 8), out_modes=(9, 6))
    x = torch.randn(4, 37, **DOUBLE)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.to_dense().weight, dense.weight, rtol=1e-10, atol=1e-10)


def test_weighted_decomposition_is_never_worse_than_the_plain_one():
    dense = torch.nn.Linear(37, 53, **DOUBLE)
    x = torch.randn(200, 37, **DOUBLE) @ torch.randn(37, 37, **DOUBLE)
    g = torch.randn(200, 53, **DOUBLE)
    modes = {"in_modes": (5, 8), "out_modes": (9, 6), "rank": 10}
    plain = tt.nn.Linear.from_dense(dense, **modes)
    weighted = tt.nn.Linear.from_dense(dense, input_gram=x.T @ x, **modes)
    both = tt.nn.Linear.from_dense(dense, input_gram=x.T @ x, output_gram=g.T @ g, **modes)

    def output_error(layer):
        return float(((layer.weight - dense.weight) @ x.T).detach().norm())

    def weighted_error(layer):
        return float((g @ (layer.weight - dense.weight) @ x.T).detach().norm())

    assert output_error(weighted) <= output_error(plain) * (1 + 1e-9)
    assert weighted_error(both) <= weighted_error(plain) * (1 + 1e-9)


def test_sizes_without_factors_are_padded_by_themselves():
    layer = tt.nn.Linear(4099, 1009, rank=8, bias=False)
    assert (layer.in_modes, layer.out_modes) == ((12, 18, 19), (13, 10, 8))
    assert layer.weight.shape == (1009, 4099)
    assert layer.n_params < 1009 * 4099 / 200
    assert tt.nn.Linear(768, 3072, rank=8).in_modes == (8, 8, 12)  # sizes that factor well stay as they are


def test_drawn_weights_have_the_variance_asked_for():
    layer = padded(init=0.3)
    assert float(layer.weight.square().mean().sqrt()) == pytest.approx(0.3, rel=1e-9)


def test_norm_counts_the_weight_alone():
    layer = padded()
    torch.testing.assert_close(tt.nn.dense_norm(layer), layer.weight.square().sum())


def test_modes_far_beyond_the_size_are_a_mistake():
    with pytest.raises(ShapeError, match=r"exactly 37 \(padded, up to 55\)"):
        tt.nn.Linear(37, 53, in_modes=(8, 8), out_modes=(9, 6), rank=4)
    with pytest.raises(ShapeError, match="exactly 12: found"):
        tt.nn.Linear(12, 53, in_modes=(3, 5), out_modes=(9, 6), rank=4)
    with pytest.raises(ShapeError, match="exactly 37: found"):
        tt.nn.Linear(37, 53, format="kronecker", in_modes=(5, 8), out_modes=(9, 6), rank=4)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_recurrent_layers_of_prime_sizes(kind):
    torch.manual_seed(0)
    dense = getattr(torch.nn, kind)(37, 13, **DOUBLE)
    layer = getattr(tt.nn, kind).from_dense(dense, format="tt")
    x = torch.randn(5, 2, 37, **DOUBLE)
    torch.testing.assert_close(layer(x)[0], dense(x)[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_every_hidden_size_is_taken(kind):
    for size in range(2, 200):
        layer = getattr(tt.nn, kind)(64, size, rank=2, compress="both", device="meta")
        assert layer.l0.hh.out_features == layer.l0.ih.out_features == size * (3 if kind == "GRU" else 4)


def test_output_has_a_layout_of_its_own():
    assert padded(bias=False, implementation="factorized")(torch.randn(3, 37)).view(-1).shape == (3 * 53,)


def test_compiled_and_exported():
    layer = padded(implementation="factorized").eval()
    x = torch.randn(3, 37)
    program = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(program(x), layer(x), rtol=1e-12, atol=1e-12)


def test_compress_takes_prime_sizes():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(211, 307), torch.nn.ReLU(), torch.nn.Linear(307, 10))
    found = tt.compress(model, budget="8x", formats=("tt",), allow_slower=True, measure=False)
    assert found.model(torch.randn(2, 211)).shape == (2, 10)
    assert sum(p.numel() for p in found.model.parameters()) <= sum(p.numel() for p in model.parameters()) / 8
