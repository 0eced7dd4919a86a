"""Every way in which a convolution can run gives what torch's convolution gives."""

from __future__ import annotations

import copy
import pickle
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import tensortrain as tt
from tensortrain.contract import CostModel
from tensortrain.contract.hops import Load
from tensortrain.formats import format_names, get_format
from tensortrain.nn.conv import choose, ways
from tensortrain.nn.conv import quick as short
from tensortrain.nn.conv.options import ConvOptions
from tensortrain.nn.conv.ways import HopsWay, Way
from tensortrain.system.native import library
from tensortrain.testing import rel_error

FORMATS = [name for name in format_names() if "conv" in get_format(name).kinds]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3, "padding": 1},
    "stride, dilation": {"kernel_size": (3, 2), "stride": (2, 1), "padding": 1, "dilation": (1, 2)},
    "1x1": {"kernel_size": 1},
    "1x1, stride": {"kernel_size": 1, "stride": 2},
    "1x1, padding": {"kernel_size": 1, "padding": (1, 0)},
    "flat kernel": {"kernel_size": (1, 3), "padding": (0, 1), "stride": (2, 1)},
}


def ways_of(layer: Any, x: Tensor, *, training: bool = False) -> list[Way]:
    """All ways that the layer could take."""
    spatial, options = tuple(x.shape[2:]), layer.conv_options()
    still = frozenset(axis for axis in range(layer.n_axes) if options.is_still(axis))
    outs = layer._out_spatial(spatial)
    load = Load(x.shape[0], spatial, outs, still, options.is_transposed, training, x.element_size())
    model, key = CostModel.reference(), layer._plan_of(x.shape[0], spatial, may_pack=not training).key
    return [*layer._dense_ways(load, model, key), *layer._other_ways(load, model, key)]


def by_way(layer: Any, way: Way, x: Tensor) -> Tensor:
    options = layer.conv_options()
    return way.run(x, way.prepare(layer, layer.core_list(), options), layer.bias, options, layer)


def check(layer: Any, x: Tensor, tolerance: float = 1e-12) -> None:
    dense = layer.to_dense()
    with torch.no_grad():
        ways = ways_of(layer, x)
        assert len({way.name for way in ways}) == len(ways)
        for way in ways:
            turned, last = (x.movedim(1, at).contiguous().movedim(at, 1) for at in (2, -1))
            for some in (x, x[:1], x[:0], turned, last, last[:1]):
                found, exact = by_way(layer, way, some), dense(some)
                assert found.shape == exact.shape, way.name
                assert some.numel() == 0 or rel_error(found, exact) <= tolerance, way.name


# A kernel of one position or of one channel is contiguous with any strides along these axes, and with some of them it
# is taken for a channels-last one.
AMBIGUOUS: dict[str, tuple[Any, dict[str, Any], tuple[int, ...]]] = {
    "1x1": (tt.nn.Conv2d, {"kernel_size": 1, "stride": 2}, (6, 5)),
    "1x1, groups": (tt.nn.Conv2d, {"kernel_size": 1, "groups": 2, "padding": 1}, (6, 5)),
    "depthwise": (tt.nn.Conv2d, {"kernel_size": 3, "groups": 4}, (6, 5)),
    "line": (tt.nn.Conv1d, {"kernel_size": 1, "stride": 2}, (7,)),
    "volume": (tt.nn.Conv3d, {"kernel_size": 1, "groups": 2}, (3, 2, 4)),
    "transposed": (tt.nn.ConvTranspose2d, {"kernel_size": 1, "stride": 2}, (6, 5)),
    "transposed, depthwise": (tt.nn.ConvTranspose2d, {"kernel_size": 3, "groups": 4}, (6, 5)),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
@pytest.mark.parametrize("format", FORMATS)
def test_kernels_and_outputs_have_torchs_strides(format: str, name: str) -> None:
    kind, options, spatial = AMBIGUOUS[name]
    layer, x = kind(4, 8, rank=2, format=format, **options), torch.randn(2, 4, *spatial)
    kernel = layer.dense_type(4, 8, **options).weight
    dense = layer.to_dense()
    assert layer.build_weight().stride() == dense.weight.stride() == kernel.stride()
    for training in (False, True):
        with torch.set_grad_enabled(training):
            expected = dense(x)
            assert layer(x).stride() == layer(x).stride() == expected.stride()
            for way in ways_of(layer, x, training=training):
                found = by_way(layer, way, x)
                assert found.stride() == expected.stride(), way.name
                assert rel_error(found, expected) <= 1e-12, way.name


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_planes(format: str, name: str, groups: int) -> None:
    layer = tt.nn.Conv2d(4 * groups, 6 * groups, groups=groups, format=format, rank=3, **OPTIONS[name])
    check(layer, torch.randn(3, 4 * groups, 7, 6))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_lines_and_volumes(format: str, groups: int) -> None:
    options: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1, "groups": groups, "format": format}
    check(tt.nn.Conv1d(4, 8, rank=2, **options), torch.randn(2, 4, 9))
    check(tt.nn.Conv3d(4, 8, rank=2, **options), torch.randn(2, 4, 5, 4, 3))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_transposed(format: str, groups: int) -> None:
    options: dict[str, Any] = {"stride": 2, "groups": groups, "format": format, "rank": 2}
    check(tt.nn.ConvTranspose2d(4, 8, (3, 1), output_padding=1, padding=(1, 0), **options), torch.randn(2, 4, 4, 3))
    check(tt.nn.ConvTranspose1d(4, 8, 3, **options), torch.randn(2, 4, 5))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("format", ["tt_naive", "cp"])
def test_padding_that_is_not_zero(format: str, mode: str) -> None:
    layer = tt.nn.Conv2d(4, 6, (3, 2), padding=(2, 1), padding_mode=mode, format=format, rank=2)
    check(layer, torch.randn(2, 4, 6, 5))
    check(tt.nn.Conv1d(4, 6, 4, padding="same", padding_mode=mode, format=format, rank=2), torch.randn(2, 4, 6))


@pytest.mark.parametrize("format", FORMATS)
def test_float32_with_kernels_in_the_librarys_layout(format: str) -> None:
    layer = tt.nn.Conv2d(16, 24, 3, padding=1, stride=2, format=format, rank=4, dtype=torch.float32)
    check(layer, torch.randn(2, 16, 9, 8, dtype=torch.float32), tolerance=1e-5)
    layer = tt.nn.Conv1d(16, 24, 3, format=format, rank=4, groups=2, dtype=torch.float32)
    check(layer, torch.randn(2, 16, 9, dtype=torch.float32), tolerance=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_gradients_of_every_way(format: str, groups: int) -> None:
    layer = tt.nn.Conv2d(4 * groups, 6 * groups, 3, padding=1, groups=groups, format=format, rank=2)
    x = torch.randn(2, 4 * groups, 4, 3, requires_grad=True)
    wanted = [x, *layer.cores]
    exact = torch.autograd.grad(_curved(layer.conv_options()(x, layer.build_weight(), layer.bias, groups)), wanted)
    for way in ways_of(layer, x, training=True):
        found = torch.autograd.grad(_curved(by_way(layer, way, x)), wanted)
        for one, other in zip(found, exact, strict=True):
            assert rel_error(one, other) <= 1e-10, way.name


def _curved(y: Tensor) -> Tensor:
    return (y * torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).cos()).sum() + y.square().sum()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_gradients_of_every_transposed_way(format: str, groups: int) -> None:
    options: dict[str, Any] = {"stride": 2, "groups": groups, "format": format, "rank": 2}
    layer = tt.nn.ConvTranspose2d(4 * groups, 6 * groups, (3, 2), padding=1, **options)
    x = torch.randn(2, 4 * groups, 3, 4, requires_grad=True)
    exact = torch.autograd.grad(_curved(layer.to_dense()(x)), [x])[0]
    found = [torch.autograd.grad(_curved(by_way(layer, way, x)), [x])[0] for way in ways_of(layer, x, training=True)]
    assert all(rel_error(one, exact) <= 1e-10 for one in found)


# -- filters ------------------------------------------------------------------------------------------------------

FILTERS: list[tuple[tuple[int, ...], int, int, int, dict[str, Any]]] = [
    ((33,), 1, 1, 2, {"kernel": (5,), "stride": (1,), "padding": (2,), "dilation": (1,)}),
    ((40,), 2, 3, 1, {"kernel": (3,), "stride": (3,), "padding": (0,), "dilation": (2,)}),
    ((7, 70), 1, 1, 9, {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}),
    ((6, 5), 3, 1, 1, {"kernel": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}),
    ((9, 20), 2, 2, 3, {"kernel": (1, 3), "stride": (1, 2), "padding": (0, 4), "dilation": (1, 2)}),
    ((4, 3, 19), 1, 2, 5, {"kernel": (2, 3, 3), "stride": (1, 2, 2), "padding": (1, 0, 1), "dilation": (1, 1, 1)}),
]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("spatial, groups, inputs, outputs, how", FILTERS)
def test_our_own_kernel_for_few_channels(spatial, groups, inputs, outputs, how, dtype, tolerance) -> None:
    if library() is None:
        pytest.skip("the kernels are not built")
    options = ConvOptions(**how)
    assert ways.can_filter(options, dtype, torch.device("cpu"))
    x = torch.randn(3, groups * inputs, *spatial, dtype=dtype, requires_grad=True)
    weight = torch.randn(groups * outputs, inputs, *options.kernel, dtype=dtype, requires_grad=True)
    for bias in (None, torch.randn(groups * outputs, dtype=dtype, requires_grad=True)):
        leaves = [x, weight] if bias is None else [x, weight, bias]
        found, exact = (run(x, weight, bias, options, groups) for run in (ways._filtered, ways._convolved))
        assert found.shape == exact.shape
        assert rel_error(found, exact) <= tolerance
        grads = (torch.autograd.grad(_curved(y), leaves) for y in (found, exact))
        assert all(rel_error(one, other) <= 20 * tolerance for one, other in zip(*grads, strict=True))


def test_second_derivatives_of_filters() -> None:
    if library() is None:
        pytest.skip("the kernels are not built")
    options = ConvOptions((3, 2), (2, 1), (1, 0), (1, 2))
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((2, 2, 5, 4), (4, 1, 3, 2), (4,))]
    assert torch.autograd.gradgradcheck(lambda x, w, b: ways._filtered(x, w, b, options, 2), leaves)


def test_filters_leave_to_torch_what_others_look_on() -> None:
    options = ConvOptions((3,), (1,), (1,), (1,))
    x, weight = torch.randn(4, 1, 6), torch.randn(2, 1, 3)
    exact = ways._convolved(x, weight, None, options, 1)
    mapped = torch.vmap(lambda one: ways._filtered(one.unsqueeze(0), weight, None, options, 1).squeeze(0))(x)
    assert rel_error(mapped, exact) <= 1e-12
    _, tangent = torch.func.jvp(lambda one: ways._filtered(one, weight, None, options, 1), (x,), (x,))
    assert rel_error(tangent, exact) <= 1e-12
    with torch.autocast("cpu", torch.bfloat16):
        assert ways._filtered(x.float(), weight.float(), None, options, 1).dtype == torch.bfloat16
    assert ways._filtered(x.half(), weight.half(), None, options, 1).dtype == torch.float16
    same = ConvOptions((3,), (1,), "same", (1,), "reflect")
    assert not ways.can_filter(same, torch.float32, torch.device("cpu"))
    assert ways._filtered(x, weight, None, same, 1).shape == exact.shape


def test_the_two_halves_of_a_train_are_a_chain_of_two_convolutions() -> None:
    layer = tt.nn.Conv2d(16, 12, 3, padding=1, format="tt_separate", rank=3)
    with torch.no_grad():
        hopping = [way for way in ways_of(layer, torch.randn(1, 16, 8, 8)) if isinstance(way, HopsWay)]
    assert any(len(way.hops) == 2 and all(hop.is_plain for hop in way.hops) for way in hopping)


def test_a_hop_never_builds_the_whole_kernel() -> None:
    for format in FORMATS:
        layer = tt.nn.Conv2d(8, 6, 3, format=format, rank=2, implementation="factorized")
        with torch.no_grad():
            ways = ways_of(layer, torch.randn(1, 8, 5, 5))
        n_cores = len(layer.cores)
        assert all(len(way.hops[0].cores) < n_cores for way in ways if isinstance(way, HopsWay))
        assert not layer.plan(1, (5, 5)).uses_dense


# -- choosing -----------------------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> list[str]:
    """Names of ways that were run; the one that comes last is the fastest by a clock of our own."""
    seen: list[str] = []

    def calls(ways: list[Way], request: Any, maker: Any) -> list[Any]:
        numbers = range(len(seen) + 1, len(seen) + len(ways) + 1)
        seen.extend(way.name for way in ways)
        return [choose._Call(lambda number=number: number) for number in numbers]

    monkeypatch.setattr(choose, "_KNOWN", {})
    monkeypatch.setattr(choose, "_DENSE_S", {})
    monkeypatch.setattr(choose, "_calls", calls)
    monkeypatch.setattr(choose, "_CLEARLY", 1.0)
    monkeypatch.setattr(choose, "can_time", lambda device: True)
    monkeypatch.setattr(choose, "timed", lambda call, device: 1.0 / call())
    monkeypatch.setattr(choose._NOTES, "_file", lambda device: tmp_path / "kept" / "convolutions.json")
    return seen


def make(**options: Any) -> Any:
    return tt.nn.Conv2d(32, 32, 3, padding=1, format="tucker2", rank=8, dtype=torch.float32, **options)


def test_the_fastest_way_run_is_kept_and_its_time_is_told(timed: list[str]) -> None:
    layer, x = make(), torch.randn(2, 32, 8, 8, dtype=torch.float32)
    with torch.no_grad():
        plan = layer.plan(2, (8, 8))
        assert plan.way.name == timed[-1]
        assert plan.is_measured
        assert plan.predicted_s == pytest.approx(1.0 / len(timed))
        assert timed[0] == "dense plain"
        assert "measured" in str(plan)
        n_run = len(timed)
        assert make().plan(2, (8, 8)).way.name == plan.way.name  # remembered
        choose._KNOWN.clear()
        again = make().plan(2, (8, 8))  # by another process
        assert (again.way.name, again.predicted_s) == (plan.way.name, pytest.approx(plan.predicted_s))
        assert len(timed) == n_run
        assert rel_error(layer(x), layer.to_dense()(x)) <= 1e-5


def test_a_rough_trial_runs_fewer_ways_and_is_kept_by_nobody(timed: list[str]) -> None:
    with torch.no_grad():
        with choose.roughly():
            rough = make().plan(2, (8, 8))
        n_rough = len(timed)
        assert rough.is_measured
        assert timed[0] == "dense plain"
        assert not choose._KNOWN
        plan = make().plan(2, (8, 8))
        assert len(timed) - n_rough > n_rough
        assert plan.is_measured
        n_run = len(timed)
        with choose.roughly():  # what is known exactly is used
            assert make().plan(2, (8, 8)).way.name == plan.way.name
        assert len(timed) == n_run


def test_rough_trials_time_a_dense_kernel_once_for_all_ranks(timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "timed", lambda call, device: 1.0)  # none is so far behind that it drops out
    with torch.no_grad(), choose.roughly():
        plans = [
            tt.nn.Conv2d(32, 32, 3, padding=1, format="tucker2", rank=rank, dtype=torch.float32).plan(2, (8, 8))
            for rank in (8, 9)
        ]
        assert len(timed) > 2
        assert timed.count("dense plain") == 1
        assert all(plan.is_measured for plan in plans)
        other = tt.nn.Conv2d(32, 48, 3, padding=1, format="tucker2", rank=8, dtype=torch.float32).plan(2, (8, 8))
        assert timed.count("dense plain") == 2
        assert other.is_measured


def test_a_trial_counts_the_long_way_of_what_is_never_ready() -> None:
    layer, x = make(), torch.randn(1, 32, 6, 6, dtype=torch.float32)
    with torch.no_grad():
        ways = ways_of(layer, x)
        request = choose.Request(layer.spec, layer.conv_options(), 1, (6, 6), 32 * 36, False, x.dtype, x.device)
        calls = choose._calls(ways, request, layer)
        for way, call in zip(ways, calls, strict=True):
            assert (call.more_s > 0) == (way.name == "steps"), way.name


def _fastest_of(monkeypatch: pytest.MonkeyPatch, tried: list[float], alone: list[float]) -> int:
    """Which call is kept, of given times among all of them and in turns with the first."""
    monkeypatch.setattr(choose, "seconds_in_use", lambda calls, timer: list(tried))
    monkeypatch.setattr(choose, "duel", lambda call, other, timer: (alone[call], alone[other]))
    seconds, found = choose._fastest(range(len(tried)), lambda call: 0.0)  # type: ignore[arg-type]
    assert seconds[found] == min(alone[found], tried[found]) or found == 0
    assert seconds[0] < float("inf")
    return found


@pytest.mark.parametrize(
    ("tried", "alone", "found"),
    [
        ([1.0, 0.5, 0.7], [1.0, 0.5, 0.7], 1),
        ([1.0, 0.5, 0.7], [1.0, 1.2, 0.7], 2),  # luck among many
        ([1.0, 0.5, 0.7], [1.0, 0.95, 0.95], 0),
        ([1.0, 0.95, 0.99], [1.0, 0.1, 0.1], 0),  # not worth the doubt
        ([9.0, 5.0, 7.0], [1.0, 5.0, 7.0], 0),  # the first had bad luck
        ([float("inf"), 0.5, 0.7], [0.4, 0.5, 0.7], 0),  # so bad that it was not tried again
        ([float("inf"), 0.5, float("inf")], [1.0, 0.5, 2.0], 1),
    ],
)
def test_a_way_has_to_beat_the_dense_kernel_in_turns_of_the_two(
    monkeypatch: pytest.MonkeyPatch, tried: list[float], alone: list[float], found: int
) -> None:
    assert _fastest_of(monkeypatch, tried, alone) == found


def test_a_trial_beside_other_programs_is_made_again(timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    for alone, later, is_again in ((False, 10.0, False), (False, 1000.0, True), (True, 1000.0, False)):
        monkeypatch.setattr(choose.Watch, "is_alone", lambda self, alone=alone: alone)
        monkeypatch.setattr(choose.time, "time", lambda: now)
        with torch.no_grad():
            choose._NOTES.write("none", torch.device("cpu"), 0)
            choose._NOTES._file(torch.device("cpu")).unlink()
            make().plan(2, (8, 8))
            n_run = len(timed)
            choose._KNOWN.clear()
            monkeypatch.setattr(choose.time, "time", lambda later=later: now + later)
            make().plan(2, (8, 8))
            choose._KNOWN.clear()
        assert (len(timed) > n_run) == is_again


def test_sizes_that_run_alike_share_a_trial(timed: list[str]) -> None:
    with torch.no_grad():
        first = make().plan(8, (100, 100))
        n_run = len(timed)
        second = make().plan(7, (99, 98))
        assert len(timed) == n_run
        assert second.predicted_s == pytest.approx(first.predicted_s * 7 * 99 * 98 / (8 * 100 * 100))
        make().plan(8, (50, 100))
        assert len(timed) > n_run
    assert [choose.bucket(n) for n in (1, 7, 15, 16, 17, 31, 33, 224)] == [1, 7, 15, 16, 18, 32, 36, 224]


def test_long_trials_are_of_few_ways(timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_TOO_LONG_S", 1e-9)
    with torch.no_grad():
        assert make().plan(4, (8, 8)).is_measured
        assert len(timed) == 1 + choose._LEAST_TRIED
        assert timed[0] == "dense plain"
        monkeypatch.setattr(choose, "_TOO_LONG_S", 1.0)
        make().plan(4, (9, 9))
        assert len(timed) > 2 * (1 + choose._LEAST_TRIED)


def test_long_trials_take_fewer_examples(timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_FAR_TOO_LONG_S", 1e-9)
    with torch.no_grad():
        plan = make().plan(4, (8, 8))
        assert not plan.is_measured
        assert timed == []
        monkeypatch.setattr(choose, "_FAR_TOO_LONG_S", 1e-2)
        monkeypatch.setattr(choose, "_LIKELY", 1e9)
        plan = make().plan(2**14, (8, 8))
    assert plan.is_measured
    assert plan.predicted_s > 1.0 / len(timed)  # of fewer examples, scaled up


@pytest.mark.parametrize("text", ["", "[]", "null", '{"a": 1}'])
def test_a_damaged_file_is_replaced(timed: list[str], text: str) -> None:
    file = choose._NOTES._file(torch.device("cpu"))
    file.parent.mkdir()
    file.write_text(text)
    with torch.no_grad():
        assert make().plan(1, (8, 8)).is_measured


def test_nothing_is_timed_where_it_may_not(timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make()
    layer.may_time_plans = False
    with torch.no_grad():
        assert not layer.plan(1, (8, 8)).is_measured
        layer.may_time_plans = True
        torch.use_deterministic_algorithms(True)
        try:
            assert not layer.plan(1, (8, 8)).is_measured
        finally:
            torch.use_deterministic_algorithms(False)
        monkeypatch.undo()  # the tests' constants are given, not measured
        assert not layer.plan(1, (8, 9)).is_measured
        meta = tt.nn.Conv2d(8, 8, 3, format="cp", rank=2, device="meta")
        assert meta(torch.empty(1, 8, 5, 5, device="meta")).shape == (1, 8, 3, 3)
    assert timed == []


def test_a_trial_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(choose, "_KNOWN", {})
    monkeypatch.setattr(choose, "can_time", lambda device: True)
    monkeypatch.setattr(choose._NOTES, "_file", lambda device: tmp_path / "convolutions.json")
    layer, x = make(), torch.randn(1, 32, 6, 6, dtype=torch.float32)
    dense, state, seen = layer.to_dense(), torch.get_rng_state(), []
    with torch.inference_mode():
        assert rel_error(layer(x), dense(x)) <= 1e-5
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t), t)[1], lambda t: t):
        layer.plan(1, (6, 6))
    assert choose._KNOWN
    assert seen == []
    assert all(core.grad is None for core in layer.cores)
    layer(x).sum().backward()
    assert all(core.grad is not None for core in layer.cores)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_packed_kernel_follows_the_cores_and_counts_as_memory() -> None:
    layer, x = make(implementation="dense"), torch.randn(1, 32, 6, 6, dtype=torch.float32)
    with torch.no_grad():
        plan = layer._plan_of(1, (6, 6), may_pack=True)
        packed = [way for way in ways_of(layer, x) if way.packs and way.uses_dense]
        if not packed:
            pytest.skip("this build of torch packs no kernels")
        layer.runner.layer_plans[plan.key] = _with_way(plan, packed[0])
        first = layer(x)
        assert rel_error(first, layer.to_dense()(x)) <= 1e-5
        assert first.is_contiguous()
        assert layer.resident_cache_bytes >= 32 * 32 * 9 * 4
        layer.cores[1].mul_(2.0)
        assert rel_error(layer(x), layer.to_dense()(x)) <= 1e-5
        assert rel_error(layer(x), first) > 1e-2
    x.requires_grad_()
    layer(x).sum().backward()  # the library's layout has no derivative: another way runs
    assert x.grad is not None


@pytest.fixture(params=["with kernels", "without kernels"])
def _kernels_or_none(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without kernels":
        monkeypatch.setattr(short, "library", lambda: None)
    elif library() is None:
        pytest.skip("the kernels are not built")


def quick(layer: Any, x: Tensor) -> Tensor | None:
    """What the short way gives, where it is taken."""
    way = layer.runner.way
    return None if way is None else way(layer, x)


@pytest.mark.usefixtures("_kernels_or_none")
@pytest.mark.parametrize("implementation", ["auto", "dense"])
def test_the_short_way_sees_every_change(implementation: Any) -> None:
    layer, x = make(implementation=implementation), torch.randn(2, 32, 6, 6, dtype=torch.float32)
    dense = layer.to_dense()
    last = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(3):
            assert rel_error(layer(x), dense(x)) <= 1e-5
            assert rel_error(layer(last), dense(x)) <= 1e-5
            assert rel_error(layer(x[:1]), dense(x[:1])) <= 1e-5
        for some in (x, last, x[:1]):
            found = quick(layer, some)
            assert found is not None
            assert rel_error(found, dense(some)) <= 1e-5
        assert layer.plan(2).spatial == (6, 6)
        assert quick(layer, x.double()) is None
        assert quick(layer, x[:, :, 1:]) is None
        assert quick(layer, x.to(torch.bfloat16)) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert quick(layer, x) is None
        torch.use_deterministic_algorithms(True)
        try:
            assert quick(layer, x) is None
        finally:
            torch.use_deterministic_algorithms(False)
        layer.cores[0].mul_(2.0)
        assert quick(layer, x) is None
        assert rel_error(layer(x), layer.to_dense()(x)) <= 1e-5
        assert quick(layer, x) is not None
        layer.bias.add_(1.0)
        assert rel_error(layer(x), layer.to_dense()(x)) <= 1e-5
        layer.implementation = "factorized"
        assert quick(layer, x) is None
        assert rel_error(layer(x), layer.to_dense()(x)) <= 1e-5
        layer.implementation = implementation
        layer.cores[1] = torch.nn.Parameter(torch.randn_like(layer.cores[1]))
        assert rel_error(layer(x), layer.to_dense()(x)) <= 1e-5
        assert quick(layer, x) is not None
        handle = layer.cores.register_forward_hook(lambda module, args, cores: [2 * core for core in cores])
        assert quick(layer, x) is None
        handle.remove()
        assert torch.vmap(lambda one: layer(one.unsqueeze(0)))(x).shape == (2, 1, 32, 6, 6)
    assert quick(layer, x) is None  # gradients are recorded
    layer(x).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    with torch.no_grad():
        assert rel_error(layer(x), layer.to_dense()(x)) <= 1e-5
        assert layer.plan(2).spatial == (6, 6)


@pytest.mark.usefixtures("_kernels_or_none")
def test_copies_and_files_of_a_layer_that_has_run() -> None:
    layer, x = make(), torch.randn(2, 32, 6, 6, dtype=torch.float32)
    with torch.no_grad():
        exact = layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert quick(other, x) is None
            assert rel_error(other(x), exact) <= 1e-6
            other.cores[0].zero_()
            assert rel_error(layer(x), exact) == 0


def _with_way(plan: Any, way: Way) -> Any:
    from dataclasses import replace

    return replace(plan, way=way)
