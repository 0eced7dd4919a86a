"""One record a layer: what it sums up, what it gives, and how the version before kept it."""

from __future__ import annotations

import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import tensortrain as tt
from tensortrain.compression.survey.layers import find_layers
from tensortrain.compression.survey.moments import Calibration, LayerMoments, second_moment
from tensortrain.compression.survey.summaries import summarize
from tensortrain.formats import get_format
from tensortrain.system.parking import is_parked

ROWS = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]])


def test_sums_become_moments_about_the_mean() -> None:
    moments = LayerMoments()
    for part in (ROWS[:2], ROWS[2:]):
        moments.add(second_moment(part), part.double().sum(dim=0), len(part))
    moments.finish(centred=True)
    torch.testing.assert_close(moments.mean, ROWS.double().mean(dim=0))
    torch.testing.assert_close(moments.gram, ROWS.double().T.cov(correction=0))


def test_rows_that_are_equal_or_none_say_nothing() -> None:
    equal = LayerMoments()
    equal.add(second_moment(ROWS[:1]), ROWS[0].double(), 1)
    equal.finish(centred=True)
    none = LayerMoments()
    none.finish(centred=False)
    for moments in (equal, none):
        assert moments.gram is moments.mean is None
        assert moments.weighting.is_plain


def test_outputs_weigh_only_beside_inputs() -> None:
    gradients = torch.eye(3)
    assert LayerMoments(output_gram=gradients).weighting.outputs is None
    weighting = LayerMoments(gram=torch.eye(2), output_gram=gradients).weighting
    assert weighting.outputs is gradients
    assert torch.equal(weighting.inputs, torch.eye(2))


def test_figures_by_layer_are_those_that_are_known() -> None:
    found = Calibration({"a": LayerMoments(gram=torch.eye(2), calls=2), "b": LayerMoments(norm="bn")})
    assert list(found.grams) == ["a"]
    assert (found.calls, found.norms, found.means, found.output_grams) == ({"a": 2}, {"b": "bn"}, {}, {})
    assert found.weighing("b") == found.weighing("elsewhere") == (None, None)


def test_a_pickle_of_the_version_before_has_dicts_by_layer() -> None:
    before = {"grams": {"a": ROWS}, "output_grams": {}, "norms": {"b": "bn"}, "calls": {"a": 3}, "n_examples": 5}
    found = Calibration.__new__(Calibration)
    found.__setstate__(before)
    assert torch.equal(found.grams["a"], ROWS)
    assert (found.calls, found.norms, found.n_examples) == ({"a": 3}, {"b": "bn"}, 5)
    again = pickle.loads(pickle.dumps(found))
    assert again.calls == found.calls
    assert torch.equal(again.of("a").gram, ROWS)


def test_a_weighting_is_the_same_object_while_the_moments_are() -> None:
    moments = LayerMoments(gram=torch.eye(2).double())
    weighting = moments.weighting
    assert moments.weighting is weighting
    assert pickle.loads(pickle.dumps(moments)).weighting is not weighting
    moments.forget_derived()
    assert moments.weighting is not weighting
    again = moments.weighting
    moments.output_gram = torch.eye(3).double()
    assert moments.weighting is not again
    assert moments.weighting.outputs is moments.output_gram


@pytest.mark.parametrize("name", ["tt", "tt_separate", "low_rank"])
def test_nothing_of_one_layer_is_left_for_the_next(name: str) -> None:
    """Not even until Python looks for circles of objects, which hold several copies of the weight."""
    layer = nn.Linear(12, 8)
    fmt, weight = get_format(name), tt.nn.Linear.weight_shape_of(layer)
    x, y = torch.randn(50, 12).double(), torch.randn(50, 8).double()
    moments = LayerMoments(gram=x.T @ x, output_gram=y.T @ y, parks=True)
    gc.disable()
    try:
        fmt.spectra(layer.weight.detach(), fmt.spec(weight, rank=1), weighting=moments.weighting)
        left = weakref.ref(moments.weighting)
        moments.forget_derived()
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("padding", [2, "same"])
def test_patches_are_those_that_a_convolution_sees(mode: str, padding: int | str) -> None:
    """Whatever it pads with: the moment of its inputs gives the mean square of its outputs."""
    conv = nn.Conv2d(2, 3, 3, padding=padding, padding_mode=mode, bias=False).double()
    x, moments = torch.randn(1, 2, 6, 7).double(), LayerMoments()
    (layer,) = find_layers(nn.Sequential(conv))[0]
    summarize(layer, x, None, moments)
    assert moments.gram is not None
    assert moments.n_rows
    weight = conv.weight.detach().flatten(1)
    of_outputs = (weight @ moments.gram * weight).sum(dim=1) / moments.n_rows
    torch.testing.assert_close(of_outputs, conv(x).detach().square().mean(dim=(0, 2, 3)))


@pytest.mark.parametrize("parks", [False, True])
@pytest.mark.parametrize("n", [7, 1023, 1024, 1201])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_moments_of_many_columns_are_those_of_few(n: int, dtype: torch.dtype, parks: bool) -> None:
    calls = [torch.randn(k, 2 * n).to(dtype)[:, ::2] for k in (9, 0, 4)]
    moments = LayerMoments(parks=parks)
    for rows in calls:
        moments.add_rows(rows)
        moments.add_gradients(rows)
    moments.finish_gradients(3)
    moments.finish(centred=False)
    rows = torch.cat(calls).double()
    assert moments.gram is not None
    assert moments.output_gram is not None
    assert moments.gram.dtype == moments.output_gram.dtype == torch.float64
    known = torch.float64 if dtype == torch.float64 else torch.float32  # as which products are made
    torch.testing.assert_close(moments.gram.to(known), (rows.T @ rows / len(rows)).to(known))
    torch.testing.assert_close(moments.output_gram.to(torch.float32), (rows.T @ rows / 3).float())
    if n >= 1024:
        assert is_parked(moments.gram) == is_parked(moments.output_gram) == parks
