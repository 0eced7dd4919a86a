"""Plans of large models: what takes memory lies in files, what takes long is kept; and the plan stays the same."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from small_models import ConvNet, Tagger, TwoHeads, assert_unchanged, batches, decay_, mlp, snapshot
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression import Silent, plan_compression
from tensortrain.compression.choose import planner, together
from tensortrain.compression.report import alone
from tensortrain.compression.stages import factorize
from tensortrain.compression.survey import calibrate, fisher, moments, span
from tensortrain.errors import CheckpointError
from tensortrain.formats import weighted_rank, weighting
from tensortrain.system import parking
from tensortrain.system.offloading import offload
from tensortrain.system.parking import is_parked

pytestmark = pytest.mark.usefixtures("double", "fixed_plans")


class TinyDecoder(nn.Module):
    """A table, gated units behind a norm, a head over many words."""

    def __init__(self, n_words: int = 90, width: int = 12, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(n_words, width)
        self.norm = nn.LayerNorm(width)
        self.gate, self.up = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)
        self.head = nn.Linear(width, n_words, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.table(input_ids)
        y = self.norm(x)
        return self.head(x + self.down(nn.functional.silu(self.gate(y)) * self.up(y)))


def texts(n: int, n_words: int = 60, length: int = 80) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(n_words, (3, length), generator=generator) for _ in range(n)]
    return [{"input_ids": each, "attention_mask": (each > 5).long()} for each in ids]


class Recurrent(nn.Module):
    """A recurrent layer, of which units can go."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(24, 32, num_layers=2, batch_first=True), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Attending(nn.Module):
    """Heads whose number its code does not name."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))
        self.o, self.head = nn.Linear(24, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 6)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        z = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x + self.o(z))


CASES = {
    "convolutions": (ConvNet, lambda: batches(4, 5, 3, 8, 8)),
    "a layer met twice": (TwoHeads, lambda: batches(4, 5, 24)),
    "texts": (Tagger, lambda: texts(4)),
    "units": (lambda: mlp(20, 48, 40, 6), lambda: batches(4, 9, 20)),
    "a decoder": (TinyDecoder, lambda: texts(4)),
    "a tied decoder": (lambda: TinyDecoder(tied=True), lambda: texts(4)),
}
each_case = pytest.mark.parametrize("case", list(CASES))


@pytest.fixture
def all_parked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is large."""
    for module, name, value in (
        (parking, "LARGE_BYTES", 0),
        (parking, "_HELD_BYTES", 0),
        (parking, "_WORTH_BYTES", 1),
        (parking, "_WORTH_THE_PAGES", 0),
        (moments, "_WORTH_PARKING", 1),
        (span, "_WORTH_PARKING", 1),
        (fisher, "_DOUBLES_AT_ONCE", 40),
        (calibrate, "_HELD_BYTES", 0),
        (weighting, "_AT_ONCE", 40),
        (weighting, "_SOME_PARTS", 1),
        (weighted_rank, "_AT_ONCE", 40),
    ):
        monkeypatch.setattr(module, name, value)


def made(case: str) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    build, data = CASES[case]
    return decay_(build()), data()


@each_case
def test_the_plan_does_not_depend_on_where_numbers_lie(case, request) -> None:
    model, data = made(case)
    wanted = plan_compression(model, budget="1.5x", data=data)
    request.getfixturevalue("all_parked")
    before = snapshot(model)
    found = plan_compression(model, budget="1.5x", data=data)
    assert_unchanged(model, before)
    assert found.layers
    assert [layer.spec for layer in found.layers] == [layer.spec for layer in wanted.layers]
    assert found.narrowed == wanted.narrowed
    assert found.calibration is not None
    grams = found.calibration.grams
    assert grams
    assert any(map(is_parked, grams.values()))
    for name, gram in wanted.calibration.grams.items():
        torch.testing.assert_close(grams[name], gram)
    for name, gram in wanted.calibration.output_grams.items():
        torch.testing.assert_close(found.calibration.output_grams[name], gram)


@each_case
def test_a_model_is_cut_in_place_as_a_copy_is(case, request) -> None:
    model, data = made(case)
    keywords: dict[str, Any] = {"budget": "1.5x", "data": data, "heal": False, "measure": False}
    wanted = tt.compress(model, **keywords)
    request.getfixturevalue("all_parked")
    found = tt.compress(model, inplace=True, **keywords)
    assert found.model is model
    assert [layer.spec for layer in found.plan.layers] == [layer.spec for layer in wanted.plan.layers]
    assert not any(map(is_parked, model.parameters()))
    for name, value in wanted.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["units", "a tied decoder"])
def test_copies_that_losses_are_measured_on_lie_in_files(case, request, monkeypatch) -> None:
    model, data = made(case)
    keywords: dict[str, Any] = {"budget": "1.5x", "data": data, "heal": False, "measure_losses": True}
    wanted = tt.compress(model, **keywords)
    request.getfixturevalue("all_parked")
    lay: list[bool] = []

    def together_of(original: nn.Module, built: nn.Module, *args: Any, **how: Any) -> float:
        lay.append(all(map(is_parked, (*original.parameters(), *built.parameters()))))
        return alone.loss_together(original, built, *args, **how)

    monkeypatch.setattr(planner, "loss_together", together_of)
    found = tt.compress(model, inplace=True, **keywords)
    assert lay
    assert all(lay)
    assert [layer.spec for layer in found.plan.layers] == [layer.spec for layer in wanted.plan.layers]
    assert not any(map(is_parked, model.parameters()))


@pytest.mark.parametrize("failing", ["convolutions", "units", "a tied decoder"])
def test_a_failure_leaves_a_large_model_as_it_was(failing, all_parked) -> None:
    model, data = made(failing)
    before, ids = snapshot(model), [id(p) for p in model.parameters()]

    class Stops(Silent):
        def on_end(self) -> None:
            if self.name == "decompose":
                raise RuntimeError("stopped")

        def on_start(self, name: str, total: int | None) -> None:
            self.name = name

    keywords: dict[str, Any] = {"heal": False, "measure": False, "inplace": True}
    with pytest.raises(RuntimeError, match="stopped"):
        tt.compress(model, budget="1.5x", data=data, observer=Stops(), **keywords)
    assert_unchanged(model, before)
    assert [id(p) for p in model.parameters()] == ids
    assert not any(map(is_parked, model.parameters()))


def test_what_a_run_made_of_cores_goes_with_the_layer_that_has_run(all_parked) -> None:
    layer = tt.nn.Embedding(40, 12, format="low_rank", rank=3)
    head = tt.nn.tied_head(layer)
    x = torch.randn(5, 12)
    with torch.no_grad():
        wanted = head(x)
        for module in (head, layer):
            assert layer.runner.cache.nbytes > 0
            factorize._drop_derived(module)
            assert layer.runner.cache.nbytes > 0  # it lies in memory
        offload(layer.cores)
        for module in (head, layer):
            torch.testing.assert_close(head(x), wanted)
            factorize._drop_derived(module)
            assert layer.runner.cache.nbytes == 0


def test_a_compared_original_lies_in_files(all_parked) -> None:
    model, data = made("units")
    result = tt.compress(model, budget="1.5x", data=data, heal={"steps": 2}, inplace=True)
    assert result.report.latency
    assert not any(map(is_parked, result.model.parameters()))


def test_statistics_in_files_go_through_pickle(all_parked) -> None:
    model, data = made("a decoder")
    plan = plan_compression(model, budget="1.5x", data=data)
    for again in (pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)):
        assert again == plan
        for name, gram in plan.calibration.grams.items():
            assert torch.equal(again.calibration.grams[name], gram)


class Counting(nn.Module):
    """Counts its runs, and those with a backward pass."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.forwards, self.backwards = net, 0.0, 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.forwards += input_ids.numel()
        y: Tensor = self.net(input_ids, attention_mask)
        if y.requires_grad:
            y.register_hook(self._count)
        return y

    def _count(self, gradient: Tensor) -> None:
        self.backwards += 1


@pytest.mark.parametrize("n", [8, 16])
def test_a_plan_takes_few_passes_over_the_data(n) -> None:
    torch.manual_seed(0)
    model, data = Counting(decay_(TinyDecoder())), texts(n)
    plan_compression(model, budget="1.5x", data=data)
    passes = model.forwards / sum(batch["input_ids"].numel() for batch in data)
    assert passes <= 1 + 12 / n
    assert model.backwards <= 6


# -- going on after a kill ------------------------------------------------------------------------------


class Kill(BaseException):
    """What no code of the package takes."""


class Killer(Silent):
    """Ends the work at one step of one piece of it, and notes what was said."""

    def __init__(self, where: str = "", step: int = 0) -> None:
        self.where, self.step, self.name = where, step, ""
        self.said: list[str] = []
        self.begun: list[str] = []

    def on_start(self, name: str, total: int | None) -> None:
        self.name = name
        self.begun.append(name)

    def on_step(self, n: int, **figures: float) -> None:
        if self.name == self.where and n == self.step:
            raise Kill

    def message(self, text: str) -> None:
        self.said.append(text)


KILLS = [("calibrate", 2), ("gradients", 3), ("widths", 1), ("candidates", 1), ("candidates", 3)]


@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("where, step", KILLS)
@pytest.mark.parametrize("case", ["units", "a decoder", "convolutions"])
def test_a_killed_plan_goes_on(case, where, step, parked, tmp_path, request) -> None:
    if parked:
        request.getfixturevalue("all_parked")
    model, data = made(case)
    if where == "widths" and case == "convolutions":
        pytest.skip("it has none")
    whole = plan_compression(model, budget="1.5x", data=data)
    with pytest.raises(Kill):
        plan_compression(model, budget="1.5x", data=data, work_dir=tmp_path, observer=Killer(where, step))
    after = Killer()
    found = plan_compression(model, budget="1.5x", data=data, work_dir=tmp_path, observer=after)
    assert found == whole
    assert ("calibrate" in after.begun) == (where in ("calibrate", "gradients"))
    assert not after.said


JOINT: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "recurrent": (Recurrent, ("recurrent",), "recurrent_widths_of"),
    "whole heads": (Attending, ("whole_heads",), "whole_head_widths_of"),
    "directions": (Attending, ("heads",), "head_widths_of"),
}


@pytest.mark.parametrize("kind", list(JOINT))
def test_all_that_is_narrowed_together_is_kept(kind, tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    build, formats, name = JOINT[kind]
    model, data = decay_(build()), batches(4, 5, 7, 24)
    keywords: dict[str, Any] = {"budget": "1.3x", "data": data, "formats": formats, "allow_slower": True}
    whole = plan_compression(model, **keywords)
    assert whole.recurrent or whole.whole_heads or whole.heads
    with pytest.raises(Kill):
        plan_compression(model, **keywords, work_dir=tmp_path, observer=Killer("candidates", 2))
    monkeypatch.setattr(together, name, again)
    assert plan_compression(model, **keywords, work_dir=tmp_path) == whole


def test_menus_of_heads_are_kept_apart_by_whether_they_may_be_slow(tmp_path) -> None:
    torch.manual_seed(0)
    model, data = decay_(Attending()), batches(4, 5, 7, 24)
    keywords: dict[str, Any] = {"budget": "1.3x", "data": data, "formats": ("heads", "low_rank")}
    plan_compression(model, **keywords, allow_slower=True, work_dir=tmp_path)
    kept = {path.name for path in tmp_path.glob("menu-of-heads*")}
    assert kept
    assert all("slow" in name for name in kept)


def again(*args: Any, **keywords: Any) -> None:
    raise AssertionError("done again")


@each_case
def test_nothing_is_done_twice_for_another_budget(case, tmp_path, monkeypatch) -> None:
    model, data = made(case)
    wanted = plan_compression(model, budget="1.3x", data=data)
    plan_compression(model, budget="2x", data=data, work_dir=tmp_path)
    for module, name in ((planner, "calibrate"), (planner, "families"), (together, "widths_of")):
        monkeypatch.setattr(module, name, again)
    found = plan_compression(model, budget="1.3x", data=data, work_dir=tmp_path)
    assert found == wanted
    for name, gram in wanted.calibration.grams.items():
        assert torch.equal(found.calibration.grams[name], gram)
    assert found.calibration.batches[0].__class__ is wanted.calibration.batches[0].__class__


@pytest.mark.parametrize("other", ["weights", "data", "formats", "damaged"])
def test_what_was_kept_of_another_planning_is_not_used(other, tmp_path) -> None:
    model, data = made("units")
    plan_compression(model, budget="1.5x", data=data, work_dir=tmp_path)
    keywords: dict[str, Any] = {"formats": ("low_rank",)} if other == "formats" else {}
    if other == "weights":
        with torch.no_grad():
            model[0].weight.mul_(1.5)
    if other == "data":
        data = batches(4, 9, 20)[1:]
    if other == "damaged":
        for path in tmp_path.iterdir():
            path.write_bytes(path.read_bytes()[:-9])
    observer = Killer()
    found = plan_compression(model, budget="1.5x", data=data, work_dir=tmp_path, observer=observer, **keywords)
    assert found == plan_compression(model, budget="1.5x", data=data, **keywords)
    assert any("starts over" in text for text in observer.said)


def test_batches_that_cannot_be_kept_are_no_error(tmp_path) -> None:
    packed = [nn.utils.rnn.pack_sequence([torch.randn(3, 2)])]
    lstm = nn.LSTM(2, 8)
    observer = Killer()
    plan = plan_compression(lstm, budget="1.2x", data=packed, work_dir=tmp_path, observer=observer)
    assert any("not kept" in text for text in observer.said)
    assert plan == plan_compression(lstm, budget="1.2x", data=packed, work_dir=tmp_path)


def test_a_killed_compression_goes_on(tmp_path) -> None:
    model, data = made("a decoder")
    keywords: dict[str, Any] = {"budget": "1.5x", "data": data, "heal": False, "measure": False, "work_dir": tmp_path}
    with pytest.raises(Kill):
        tt.compress(model, observer=Killer("decompose", 1), **keywords)
    after = Killer()
    found = tt.compress(model, observer=after, **keywords)
    assert "calibrate" not in after.begun
    assert "decompose" in after.begun
    wanted = tt.compress(model, **{**keywords, "work_dir": None})
    for name, value in wanted.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value)


@pytest.mark.parametrize("call", [plan_compression, tt.compress])
def test_a_working_folder_is_a_folder(call, tmp_path) -> None:
    file = tmp_path / "file"
    file.touch()
    for odd in (file, 3):
        with pytest.raises(CheckpointError, match="folder"):
            call(mlp(8, 8), budget="2x", work_dir=odd)
