"""Last factors fitted anew on inputs as they come by now: exact where they can be, never worse on batches held back."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from small_models import decay_
from torch import Tensor, nn

from tensortrain.compression import compress
from tensortrain.compression.choose.candidates import DEFAULT_FORMATS
from tensortrain.compression.stages import Factorize, Heal, Refit
from tensortrain.compression.stages.held_outputs import Distances, HeldOutputs, Judge
from tensortrain.compression.stages.last_factor import Equations, last_factor, why_no_last_factor
from tensortrain.compression.stages.refit import refit_
from tensortrain.compression.stages.streams import Streams, find_chain
from tensortrain.compression.survey.task import task_on_data
from tensortrain.nn import Conv1d, Conv2d, Linear
from tensortrain.train.outputs import relative_distance
from tensortrain.train.task import Task


def batches(n: int, *shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(n)]


def distance(small: nn.Module, model: nn.Module, data: list[Tensor]) -> float:
    with torch.no_grad():
        pairs = [(small.eval()(x), model.eval()(x)) for x in data]
        return sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(b.square().sum()) for _, b in pairs)


LAYERS = {
    "low rank": (lambda: Linear(12, 20, format="low_rank", rank=4), (50, 12)),
    "tt": (lambda: Linear(24, 30, rank=4, in_modes=(4, 6), out_modes=(5, 6)), (50, 24)),
    "tt of three cores, padded inputs": (
        lambda: Linear(23, 30, rank=3, in_modes=(2, 3, 4), out_modes=(5, 3, 2)),
        (60, 23),
    ),
    "tokens": (lambda: Linear(12, 20, bias=False, format="low_rank", rank=4), (8, 7, 12)),
    "conv low rank": (lambda: Conv2d(5, 8, 3, padding=1, format="low_rank", rank=4), (6, 5, 9, 9)),
    "conv tucker2": (lambda: Conv2d(5, 8, 3, stride=2, format="tucker2", rank=(3, 4)), (6, 5, 9, 9)),
    "conv tt": (
        lambda: Conv2d(6, 8, 3, padding="same", rank=4, in_modes=(2, 3), out_modes=(4, 2)),
        (6, 6, 9, 9),
    ),
    "conv over time": (
        lambda: Conv1d(6, 8, 5, padding=2, padding_mode="circular", format="low_rank", rank=4),
        (6, 6, 30),
    ),
    "dense": (lambda: nn.Linear(12, 9), (80, 12)),
    "dense conv": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 0), dilation=2), (6, 4, 9, 9)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_last_factor_is_found_again_from_inputs_and_outputs(kind: str) -> None:
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = make().double()
    assert not why_no_last_factor(layer)
    x, factor = torch.randn(shape, dtype=torch.float64), last_factor(layer)
    with torch.no_grad():
        wanted = layer(x)
        rows = factor.features(factor.rows(x, None)) @ factor.matrix().T
        bias = 0.0 if layer.bias is None else layer.bias.reshape(factor.n_blocks, -1)
        assert (rows + bias - factor.wanted(wanted, None)).abs().max() < 1e-10
        for tensor in factor.tensors():
            tensor.add_(torch.randn(tensor.shape))
        sums = Equations()
        sums.add(factor, x, wanted)
        matrix = sums.solved(factor.matrix(), damping=1e-13, centred=layer.bias is not None)
        found = matrix, None if layer.bias is None else sums.bias(matrix)
        assert sums.error(*found) < 1e-6 * float(wanted.square().sum())
        factor.write(*found)
        assert (layer(x) - wanted).abs().max() < 1e-5


def test_the_error_follows_from_the_sums() -> None:
    torch.manual_seed(0)
    layer = Linear(24, 30, rank=3, in_modes=(4, 6), out_modes=(5, 6)).double()
    x, y = torch.randn(40, 24, dtype=torch.float64), torch.randn(40, 30, dtype=torch.float64)
    factor, sums = last_factor(layer), Equations()
    sums.add(factor, x, y)
    exact = float((layer(x) - y).detach().square().sum())
    bias = layer.bias.detach().reshape(factor.n_blocks, -1)
    assert sums.error(factor.matrix(), bias) == pytest.approx(exact)


def test_a_strong_pull_leaves_a_factor_as_it_was() -> None:
    torch.manual_seed(0)
    layer = Linear(12, 20, format="low_rank", rank=4)
    factor, sums = last_factor(layer), Equations()
    sums.add(factor, torch.randn(30, 12), torch.randn(30, 20))
    old = factor.matrix().double()
    assert (sums.solved(old, damping=1e9, centred=True) - old).norm() < 1e-6 * old.norm()


def test_rows_that_a_mask_blanks_out_have_no_part() -> None:
    layer = nn.Linear(4, 3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 3)
    sums, same = Equations(), Equations()
    sums.add(last_factor(layer), x, y, mask)
    same.add(last_factor(layer), x[mask.bool()], y[mask.bool()])
    assert sums.n_rows == 3
    assert torch.equal(sums.cross, same.cross)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Embedding(9, 4),
        lambda: nn.Conv2d(4, 4, 3, groups=2),
        lambda: Linear(16, 16, format="cp", rank=3),
        lambda: Linear(25, 23, rank=3, in_modes=(5, 5), out_modes=(4, 6)),
    ],
)
def test_what_cannot_be_fitted_says_why(layer: Any) -> None:
    assert why_no_last_factor(layer())


# -- streams ----------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, str]:
        return x + scale * self.down(torch.tanh(self.up(self.norm(x)))), "more"


class Tower(nn.Module):
    def __init__(self, width: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        scale = x.new_ones(())
        for block in self.blocks:
            x = block(x, scale=scale)[0]
        return self.head(x)


def decaying(model: nn.Module) -> nn.Module:
    """Weights whose singular values fall, so that they can be cut."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                u, s, v = torch.linalg.svd(module.weight, full_matrices=False)
                module.weight.copy_((u * (3 * s[0] * 0.8 ** torch.arange(len(s)))) @ v)
    return model.eval()


def run_plain(model: nn.Module, batch: Tensor) -> Any:
    return model(batch)


def test_the_blocks_of_a_tower_are_a_chain() -> None:
    model = Tower()
    assert find_chain(model, lambda: model(torch.randn(2, 16))) == [f"blocks.{k}" for k in range(4)]


def test_a_model_whose_blocks_see_more_than_the_last_one_is_no_chain() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    model = Dense()
    assert find_chain(model, lambda: model(torch.randn(2, 8))) == []


@torch.no_grad()
def test_parts_run_as_in_the_whole_model() -> None:
    model, small, data = Tower(), Tower(), batches(2, 5, 16)
    streams = Streams.of(model, small, data, run_plain)
    for name in ("blocks.1.up", "blocks.3.down"):
        part, block = streams.part_of(name), int(name.split(".")[1])
        for k, x in enumerate(data):
            for net, run in ((model, part.run_original), (small, part.run_small)):
                expected = x
                for one in net.blocks[: block + 1]:
                    expected = one(expected, scale=torch.ones(()))[0]
                assert torch.equal(run(k), expected)
    assert streams.part_of("head").name == ""
    assert streams.part_of("blocks.0.up").name == ""  # there is no way back


@torch.no_grad()
def test_blocks_that_write_to_their_input_do_not_spoil_it() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6))
    x = torch.randn(3, 6)
    streams = Streams.of(model, copy.deepcopy(model), [x], run_plain)
    part = streams.part_of("1")
    first = part.run_small(0).clone()
    assert torch.equal(part.run_small(0), first)
    assert torch.equal(streams.part_of("2").run_original(0), model(x.clone()))


# -- the stage --------------------------------------------------------------------------------------------


def refitted(model: nn.Module, data: list[Any], **options: Any) -> tuple[Any, Any]:
    """Compressed without refits, and with them."""
    before = compress(model, budget="2x", data=data, measure=False, stages=[Factorize()], **options)
    after = compress(model, budget="2x", data=data, measure=False, stages=[Factorize(), Refit()], **options)
    return before.model, after


@pytest.mark.parametrize("formats", [("low_rank",), ("tt",), DEFAULT_FORMATS])
def test_outputs_come_nearer_on_data_that_no_fit_has_seen(formats: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model, data, unseen = decaying(Tower()), batches(20, 40, 16), batches(4, 40, 16, seed=9)
    before, after = refitted(model, data, formats=formats)
    assert distance(after.model, model, unseen) < 0.95 * distance(before, model, unseen)
    assert any("refitted on the compressed" in note for note in after.report.notes)
    assert sum(p.numel() for p in after.model.parameters()) == sum(p.numel() for p in before.parameters())


def test_a_convolutional_net_with_batch_norms_comes_no_farther() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3)]
    model = nn.Sequential(*layers, nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16 * 36, 5))
    data, unseen = batches(12, 16, 3, 8, 8), batches(3, 16, 3, 8, 8, seed=9)
    for x in data:
        model.train()(x)
    before, after = refitted(model.eval(), data)
    assert distance(after.model, model, unseen) < distance(before, model, unseen)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_maps_of_recurrent_layers_are_fitted_on_their_own_roll_outs(kind: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = kind(12, 20, num_layers=2, batch_first=True), nn.Linear(20, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x)[0][:, -1])

    torch.manual_seed(0)
    model, data, unseen = Net().eval(), batches(20, 16, 9, 12), batches(4, 16, 9, 12, seed=9)
    with torch.no_grad():
        for p in model.layer.parameters():
            p.mul_(4)  # torch's own are so small that gates hardly move
    before, after = refitted(model, data)
    assert after.plan.opened == ("layer",)
    assert distance(after.model, model, unseen) < distance(before, model, unseen)


@pytest.mark.parametrize("data", [batches(2, 30, 16), iter(batches(20, 30, 16))])
def test_without_batches_to_hold_back_a_note_says_that_nothing_was_fitted(data: Any) -> None:
    found = compress(Tower(), budget="2x", data=data, measure=False, stages=[Factorize(), Refit()])
    assert any(note.startswith("Nothing was refitted") for note in found.report.notes)


def test_a_fit_that_does_not_help_leaves_the_model_as_it_was(monkeypatch) -> None:
    from tensortrain.compression.stages.last_factor import LastFactor

    torch.manual_seed(0)
    model, data = decaying(Tower()), batches(20, 40, 16)
    write = LastFactor.write
    monkeypatch.setattr(LastFactor, "write", lambda self, matrix, bias: write(self, -3 * matrix, bias))
    before, after = refitted(model, data)
    for one, other in zip(before.parameters(), after.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not any("refitted on the compressed" in note for note in after.report.notes)


def test_the_reader_of_fewer_units_is_fitted() -> None:
    from tensortrain.compression.stages.held_outputs import HeldOutputs, Judge
    from tensortrain.compression.stages.material import Material
    from tensortrain.system.observer import Silent
    from tensortrain.train.task import Task

    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(10, 30), nn.ReLU(), nn.Linear(30, 8)), batches(12, 60, 10)
    small = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 8))
    small.load_state_dict({k: v[:20] if k.startswith("0") else v[..., :20] for k, v in model.state_dict().items()})
    held = HeldOutputs.of(model, data[10:], Judge(Task("regress")))
    before = distance(small, model, data[10:])
    outcome = refit_(Material(model, small, data[:10], held), Refit(), Silent())
    assert outcome.kept == ["2"]
    assert distance(small, model, data[10:]) < 0.5 * before


class Caching(nn.Module):
    """Remembers what it saw in a list that the caller hands on, as a cache of keys and values."""

    def __init__(self, needs_cache: bool) -> None:
        super().__init__()
        self.layer, self.needs_cache = nn.Linear(8, 8), needs_cache

    def forward(self, x: Tensor, cache: dict[str, list[Tensor]] | None) -> Tensor:
        y = torch.tanh(self.layer(x))
        if cache is not None:
            cache.setdefault("seen", []).append(y)
            y = torch.stack(cache["seen"]).sum(dim=0) if self.needs_cache else y
        return y


@torch.no_grad()
@pytest.mark.parametrize("needs_cache", [False, True])
def test_a_cache_is_left_out_and_blocks_that_need_one_are_no_chain(needs_cache: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Caching(needs_cache) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            cache: dict[str, list[Tensor]] = {}
            for block in self.blocks:
                x = block(x, cache)
            return x

    model, x = Net(), torch.randn(4, 8)
    streams = Streams.of(model, copy.deepcopy(model), [x], run_plain)
    assert bool(streams.chain) != needs_cache
    part = streams.part_of("blocks.2.layer")
    for _ in range(2):
        torch.testing.assert_close(part.run_small(0), model(x))


def test_a_decoder_with_a_cache_is_refitted() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(40, (6, 7), generator=generator)} for _ in range(10)]
    stages = [Factorize(), Refit()]
    found = compress(model, budget="1.3x", data=data, measure=False, n_batches=4, stages=stages)
    assert any("refitted on the compressed" in note for note in found.report.notes)
    assert not any("no solution" in note for note in found.report.notes)


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [12, 40, 12, 20, 5]
    layers = [each for a, b in itertools.pairwise(sizes) for each in (nn.Linear(a, b), nn.Tanh())]
    return decay_(nn.Sequential(*layers[:-1]), power=0.6).eval()


@pytest.mark.parametrize("how", ["frozen", "excluded"])
def test_what_is_frozen_or_left_out_of_the_plan_is_not_fitted(how: str) -> None:
    model, data = _net(), batches(12, 60, 12)
    options = {"formats": ("low_rank",), "measure": False, "allow_slower": True}
    if how == "frozen":
        model[4].requires_grad_(False)
    else:
        options["exclude"] = ["4"]
    cut = compress(model, budget="1.3x", data=data, stages=[Factorize()], **options).model
    found = compress(model, budget="1.3x", data=data, stages=[Factorize(), Refit()], **options)
    assert any(" layers were refitted" in note for note in found.report.notes)
    for p, q in zip(found.model[4].parameters(), cut[4].parameters(), strict=True):
        assert torch.equal(p, q)


def test_inputs_of_the_blocks_are_those_of_the_model_by_then() -> None:
    class Stemmed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.blocks = nn.Linear(6, 8), nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return x

    model, x = Stemmed(), torch.randn(4, 6)
    small = copy.deepcopy(model)
    streams = Streams.of(model, small, [x], run_plain)
    assert streams.chain
    with torch.no_grad():
        small.stem.weight.mul_(3)
        part = streams.part_of("blocks.0")
        torch.testing.assert_close(part.run_small(0), small.blocks[0](small.stem(x)))
        torch.testing.assert_close(part.run_original(0), model.blocks[0](model.stem(x)))


def test_a_single_image_has_the_equations_of_a_batch_of_one() -> None:
    layer, x = nn.Conv2d(3, 8, 3, padding=1), torch.randn(3, 8, 8)
    factor, sums = last_factor(layer), Equations()
    sums.add(factor, x, layer(x).detach(), None)
    assert sums.error(factor.matrix().double(), layer.bias.detach().double()) < 1e-6


def test_models_that_draw_are_judged_with_the_same_numbers() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + torch.randn_like(x))

    model, data = Noisy(), batches(4, 20, 6)
    task = task_on_data(model, data)
    assert task.random
    held = HeldOutputs.of(model, data, Judge(task))
    assert held.distance(model) == 0


def test_healing_refits_once_and_not_for_statistics_alone(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    calls: list[int] = []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return refit_(*args)

    monkeypatch.setattr("tensortrain.compression.stages.refit.refit_", counted)
    model, data = _net(), batches(12, 60, 12)
    how = {"budget": "1.5x", "data": data, "formats": ("narrow",), "measure": False}
    assert compress(model, heal={"steps": 2}, **how).plan.narrowed
    assert len(calls) == 1
    compress(model, stages=[Factorize(), Refit(), Heal(steps=2)], **how)
    assert len(calls) == 2
    compress(model, heal={"epochs": 0}, **how)
    assert len(calls) == 2


def test_an_interrupt_of_the_refits_leaves_the_model_as_it_was_cut(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    def stops(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("tensortrain.compression.stages.refit.refit_", stops)
    model, data = _net(), batches(12, 60, 12)
    how = {"budget": "1.5x", "data": data, "formats": ("narrow",), "measure": False}
    found, cut = compress(model, heal={"steps": 2}, **how), compress(model, heal=False, **how)
    assert any("interrupted" in note for note in found.report.notes)
    assert all(torch.equal(p, q) for p, q in zip(found.model.parameters(), cut.model.parameters(), strict=True))


@pytest.mark.parametrize(
    "judged, plain, nearer",
    [
        ((0.6, 0.7), (0.5, 0.5), True),
        ((0.1, 1.3), (0.5, 0.5), False),  # pieces do not agree
        ((0.9995, 0.9995), (0.5, 0.5), False),  # hardly nearer
        ((0.5, 0.7), (1.2, 1.0), False),  # classes are as certain, but their logits lie farther off
        ((float("inf"),), (float("inf"),), False),
        ((), (), False),
    ],
)
def test_outputs_are_nearer_where_batches_agree_and_logits_come_no_farther(
    judged: tuple[float, ...], plain: tuple[float, ...], nearer: bool
) -> None:
    before = Distances((1.0, 1.0), (1.0, 1.0))
    assert Distances(judged, plain).is_nearer(before, gain=1e-3) is nearer


def test_squares_are_nearer_where_their_mean_is() -> None:
    before = Distances((1.0, 1.0), (1.0, 1.0), in_nats=False)
    assert Distances((0.1, 1.3), (0.1, 1.3), in_nats=False).is_nearer(before, gain=1e-3)
    assert not Distances((0.9995, 0.9995), (0.9995, 0.9995), in_nats=False).is_nearer(before, gain=1e-3)


@pytest.mark.parametrize("after, nearer", [((0.6, 0.7), True), ((0.1, 1.3), False), ((0.9995, 0.9995), False)])
def test_squares_are_clearly_nearer_where_batches_agree(after: tuple[float, ...], nearer: bool) -> None:
    before = Distances((1.0, 1.0), (1.0, 1.0), in_nats=False)
    assert Distances(after, after, in_nats=False).is_nearer(before, gain=1e-3, clearly=True) is nearer


def test_pieces_of_examples_that_are_nearly_alike_count_as_little_as_they_are() -> None:
    torch.manual_seed(0)
    model, data = nn.Linear(6, 4), batches(1, 16, 6)
    data[0][:4] *= 1e-4  # the first of four pieces
    held = HeldOutputs.of(model, data, Judge(Task("regress")))
    off = copy.deepcopy(model)
    with torch.no_grad():
        off.bias.add_(0.1)
    found = held.distances(off)
    assert len(found.judged) == 4
    assert torch.allclose(torch.tensor(found.judged), torch.tensor(found.mean), rtol=1e-4)  # the same shift in each
    with torch.no_grad():
        whole = relative_distance(off(data[0]), model(data[0]))
    assert 0.5 < found.mean / float(whole) < 2


def test_anything_is_nearer_than_no_numbers() -> None:
    broken = Distances((float("inf"),), (float("inf"),))
    assert Distances((1.0, 2.0), (1.0, 1.0)).is_nearer(broken, gain=1e-3)
    assert not broken.is_nearer(broken, gain=1e-3)


def test_logits_are_told_apart_where_classes_are_certain() -> None:
    """Logits far apart: the divergence hardly sees a change of half their size."""
    torch.manual_seed(0)
    model, data = nn.Linear(6, 4), batches(3, 20, 6)
    with torch.no_grad():
        model.weight.mul_(60)
    held = HeldOutputs.of(model, data, Judge(Task("classify")))
    off = copy.deepcopy(model)
    with torch.no_grad():
        off.weight.mul_(1.5)
    found = held.distances(off)
    assert len(found.judged) == len(found.plain) == 15  # four examples each
    assert found.mean == held.distance(off)
    assert found.plain[0] > 50 * found.judged[0]
    assert held.distances(model) == Distances((0.0,) * 15, (0.0,) * 15)
