"""Blocks trained one by one towards the original's outputs: no labels, no pass through the rest, never worse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import decay_
from torch import Tensor, nn

from tensortrain.compression import compress
from tensortrain.compression.stages import Factorize, HealLocally
from tensortrain.compression.stages.held_outputs import Distances, HeldOutputs, Judge
from tensortrain.compression.stages.local import _Healing, heal_locally_
from tensortrain.compression.stages.material import Material
from tensortrain.compression.stages.streams import Streams
from tensortrain.errors import CheckpointError, KindError, RankError
from tensortrain.nn import Linear
from tensortrain.system.observer import Silent
from tensortrain.train.task import Task

SHORT = HealLocally(steps=30, n_batches=6)


def batches(n: int, *shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(n)]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))


def tower() -> nn.Sequential:
    torch.manual_seed(0)
    return decay_(nn.Sequential(nn.Linear(8, 12), *(Residual() for _ in range(3)), nn.Linear(12, 4)).eval(), power=0.5)


class NoChain(nn.Module):
    """Both layers see the input; the second one is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 20), nn.Linear(20, 20)
        decay_(self, power=0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.one(x))
        return torch.tanh(self.two(torch.tanh(self.two(y))))


def n_kept_of(found: Any) -> int:
    """Blocks, as the report tells."""
    (note,) = [note for note in found.report.notes if note.startswith("Local healing was kept")]
    return int(note.split("kept for ")[1].split()[0])


def cut(model: nn.Module, data: list[Tensor]) -> nn.Module:
    how = {"formats": ("low_rank", "tt"), "measure": False}
    return compress(model, budget="3x", data=data, stages=[Factorize()], **how).model


def material(model: nn.Module, small: nn.Module, data: list[Tensor]) -> Material:
    held = HeldOutputs.of(model, data[-2:], Judge(Task("regress")))
    return Material(model, small, data[:-2], held)


class Interrupted(Silent):
    """Stops after so many blocks, as a kill does."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step(self, n: int, **figures: float) -> None:
        if n == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("make", [tower, NoChain])
def test_outputs_come_nearer_block_by_block_or_layer_by_layer(make: Any) -> None:
    torch.manual_seed(1)
    model, data = make(), batches(8, 40, 8)
    small = cut(model, data)
    given = material(model, small, data)
    before = [p.detach().clone() for p in model.parameters()]
    start, end, n_kept, n = heal_locally_(given, SHORT, Silent())
    assert n_kept >= 1
    assert n >= 2
    assert end < start
    assert end == pytest.approx(given.held.distance(small))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in small.parameters())


def test_a_rate_that_ruins_every_block_leaves_the_model_as_it_was() -> None:
    model, data = tower(), batches(8, 40, 8)
    small = cut(model, data)
    before = copy.deepcopy(small.state_dict())
    start, end, n_kept, _ = heal_locally_(material(model, small, data), HealLocally(steps=8, lr=1e3), Silent())
    assert (n_kept, start) == (0, end)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


@pytest.mark.parametrize("in_nats", [True, False])
@pytest.mark.parametrize(("after", "kept"), [((0.0, 0.0, 0.0, 0.39), False), ((0.09, 0.08, 0.09, 0.1), True)])
def test_outputs_that_are_nearer_by_chance_alone_do_not_count(monkeypatch, after, kept, in_nats) -> None:
    model, data = tower(), batches(8, 40, 8)
    small = cut(model, data)
    start, given = copy.deepcopy(small.state_dict()), material(model, small, data)

    def distances(held: HeldOutputs, net: nn.Module) -> Distances:
        is_cut = all(torch.equal(value, start[name]) for name, value in net.state_dict().items())
        return Distances((0.1,) * 4 if is_cut else after, (0.1,) * 4, in_nats)

    monkeypatch.setattr(HeldOutputs, "distances", distances)
    n_kept = heal_locally_(given, HealLocally(steps=4, n_batches=6), Silent())[2]
    assert (n_kept > 0) is kept
    assert all(torch.equal(value, start[name]) for name, value in small.state_dict().items()) is not kept


class Stepping(nn.Module):
    """A recurrent cell: its maps see a few rows at each of many steps."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.on, self.last = nn.Linear(8, 24), nn.Linear(24, 24), nn.Linear(24, 4)
        decay_(self, power=0.5)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 24)
        for step in x.unbind(1):
            state = torch.tanh(self.into(step) + self.on(state))
        return self.last(state)


def test_the_steps_of_a_recurrent_map_are_fitted_at_once() -> None:
    torch.manual_seed(0)
    model, data = Stepping().eval(), batches(6, 5, 30, 8)
    small = cut(model, data)
    given = material(model, small, data)
    streams = Streams.of(model, small, given.batches, given.held.judge.outputs)
    healing = _Healing(streams, given.held, SHORT, given.held.distances(small))
    (first, *_) = pairs = healing._pairs("on")
    assert [len(one) for one in pairs] == [1] * 4
    run, wanted, _ = first[0]
    assert run().shape == wanted.shape == (5 * 30, 24)
    _, then, _ = healing._pairs("last")[0][0]
    assert torch.allclose(then, model(data[0]))


def test_frozen_and_shared_parameters_stay_as_they_are() -> None:
    model, data = tower(), batches(8, 40, 8)
    small = cut(model, data)
    small[1].b = copy.deepcopy(model[1].b)
    small[2].b.bias = small[1].b.bias  # of two blocks
    small[1].b.weight.requires_grad_(False)
    kept = small[1].b.weight.detach().clone(), small[1].b.bias.detach().clone()
    heal_locally_(material(model, small, data), SHORT, Silent())
    assert torch.equal(small[1].b.weight, kept[0])
    assert torch.equal(small[1].b.bias, kept[1])


def test_a_killed_run_goes_on_after_the_last_block(tmp_path) -> None:
    model, data, file = tower(), batches(8, 40, 8), tmp_path / "local.ckpt"
    first = cut(model, data)
    second = copy.deepcopy(first)
    heal_locally_(material(model, first, data), SHORT, Silent())
    killed = copy.deepcopy(second)
    with pytest.raises(KeyboardInterrupt):
        heal_locally_(material(model, killed, data), SHORT, Interrupted(2), file)
    heal_locally_(material(model, second, data), SHORT, Silent(), file)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
    other = HealLocally(steps=31, n_batches=6)
    with pytest.raises(CheckpointError, match="of the same run"):
        heal_locally_(material(model, cut(model, data), data), other, Silent(), file)


def test_the_word_local_fits_and_heals_without_labels() -> None:
    model, data = tower(), batches(12, 40, 8)
    bare = compress(model, budget="3x", data=data, measure=False, stages=[Factorize()])
    found = compress(model, budget="3x", data=data, measure=False, heal="local", evaluate=lambda net: 1.0)
    unseen = torch.cat(batches(4, 40, 8, seed=5))
    far, near = ((each.model(unseen) - model(unseen)).square().sum() for each in (bare, found))
    assert near < 0.8 * far
    assert [point.method for point in found.report.curve][1:] == ["before healing", "refitted", "healed locally"]
    assert n_kept_of(found) >= 0  # after refits little is left to gain
    assert not found.report.healing


def test_without_data_nothing_is_healed_and_unknown_words_are_refused() -> None:
    found = compress(tower(), budget="2x", measure=False, heal="local")
    assert any("Nothing was healed locally" in note for note in found.report.notes)
    with pytest.raises(KindError, match="'local'"):
        compress(tower(), budget="2x", heal="global")  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"steps": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"n_held_back": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RankError):
        HealLocally(**settings)


def test_blocks_of_an_encoder_whose_positions_are_blanked_out() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(8):
        mask = (torch.arange(7)[None] < torch.randint(2, 8, (6, 1), generator=generator)).long()
        data.append({"input_ids": torch.randint(40, (6, 7), generator=generator), "attention_mask": mask})
    how = {"formats": ("low_rank", "tt"), "measure": False}
    found = compress(model, budget="1.5x", data=data, heal="local", **how)
    assert any(isinstance(m, Linear) for m in found.model.modules())
    assert n_kept_of(found) >= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_are_trained_as_float32_copies(dtype: torch.dtype) -> None:
    ends = []
    for kind in (torch.float32, dtype):
        model, data = tower(), batches(8, 40, 8)
        small = cut(model, data).to(kind)  # one plan for all dtypes: the subject is the training
        model, data = model.to(kind), [x.to(kind) for x in data]
        start, end, n_kept, _ = heal_locally_(material(model, small, data), SHORT, Silent())
        assert n_kept >= 1
        ends.append(end / start)
    assert ends[1] < ends[0] + 0.01
    assert all(p.dtype == dtype and bool(torch.isfinite(p).all()) for p in small.parameters())


def test_a_model_that_gives_no_numbers_is_infinitely_far() -> None:
    model, data = tower(), batches(8, 40, 8)
    held = material(model, copy.deepcopy(model), data).held
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[1].a.weight.fill_(torch.nan)
    assert held.distance(model) == 0
    assert held.distance(broken) == torch.inf
