"""What must hold for every model of the gallery, written once.

``Run`` takes one case through the library; each function under ``@check`` looks at what came out.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from gallery_case import Case
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression.computed import is_computed
from tensortrain.compression.opened import opened_for_a_while
from tensortrain.compression.survey.layers import find_layers
from tensortrain.formats import energy

__all__ = ["CHECKS", "Run"]

N_TRAIN, N_HELD_BACK = 8, 3
CHECKS: dict[str, Callable[[Run], None]] = {}


def check(function: Callable[[Run], None]) -> Callable[[Run], None]:
    CHECKS[function.__name__] = function
    return function


class Unavailable(Exception):
    """What a check looks at failed before, and that was told already."""


class Run:
    """One case on its way: every step is taken when it is first asked for, and only once."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.model = case.trained(case.build())
        settle_norms_(self.model, lambda: case.run(self.model, case.batch(self.twin().eval())))
        self.original = self.twin()
        with torch.no_grad():
            drawn = [case.batch(self.twin().eval()) for _ in range(N_TRAIN + N_HELD_BACK)]
            self.train = [*drawn[:N_TRAIN], *case.extra(self.twin().eval())]
        self.held_back = drawn[N_TRAIN:]
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 0.25)  # of the user's own training
        self.touched: list[str] = []
        self._failed: set[str] = set()

    def twin(self) -> nn.Module:
        """The model once more; not by a copy, since some models cannot be copied."""
        new = self.case.build()
        new.load_state_dict(self.model.state_dict())
        return new

    def call(self, what: str, function: Callable[[], Any]) -> Any:
        """One call of the library, and whether it left alone what it was given."""
        if what in self._failed:
            raise Unavailable(what)
        before, batches, around = state_of(self.model), copy.deepcopy(self.train), surroundings()
        try:
            return function()
        except Exception:
            self._failed.add(what)
            raise
        finally:
            found = changes(before, state_of(self.model)) + changes(around, surroundings())
            found += [] if same_bits(batches, self.train) else ["the batches"]
            self.touched += [f"{what} changed {name}" for name in found]

    def compress(self, **options: Any) -> tt.CompressionResult:
        options = {"budget": self.case.budget, "allow_slower": True, "measure": False, **self.case.options, **options}
        return tt.compress(self.model, **options)

    @property
    def data(self) -> Any:
        return self.case.data(self.train)

    @cached_property
    def inspected(self) -> Any:
        return self.call("inspect", lambda: tt.inspect(self.model, example_inputs=self.train[0]))

    @cached_property
    def plan(self) -> tt.CompressionPlan:
        options = {"budget": self.case.budget, "allow_slower": True, **self.case.options}
        return self.call("plan_compression", lambda: tt.plan_compression(self.model, data=self.data, **options))

    @cached_property
    def cut(self) -> tt.CompressionResult:
        """Compressed with data, not healed."""
        plan = self.plan
        return self.call("compress without healing", lambda: self.compress(data=self.data, heal=False, plan=plan))

    @cached_property
    def blind(self) -> tt.CompressionResult:
        return self.call("compress without data", self.compress)

    @cached_property
    def healed(self) -> tt.CompressionResult:
        options = {"data": self.data, "heal": self.case.heal, "measure": self.case.measure}
        return self.call("compress with healing", lambda: self.compress(**options))

    @cached_property
    def unhealed(self) -> nn.Module:
        """The healed model as it was before."""
        plan, twin = self.healed.plan, self.twin()
        return self.call("apply_plan_", lambda: tt.apply_plan_(twin, plan))

    @cached_property
    def saved(self) -> Path:
        return self.call("save_pretrained", lambda: tt.save_pretrained(self.healed.model, self.folder / "saved"))

    @cached_property
    def loaded(self) -> nn.Module:
        folder, twin = self.saved, self.twin()
        return self.call("load_pretrained", lambda: tt.load_pretrained(folder, model=twin))

    @cached_property
    def loaded_by_class(self) -> nn.Module:
        folder = self.saved
        return self.call("load_pretrained by class", lambda: tt.load_pretrained(folder, model=self.case.build))

    @cached_property
    def undone(self) -> nn.Module:
        loaded = self.loaded
        return self.call("to_dense_", lambda: tt.to_dense_(copy.deepcopy(loaded)))

    def outputs(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """All tensors of numbers that a model returns; noise is drawn alike for all models."""
        modes = [(module, module.training) for module in model.modules()]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            output = self.case.run(model.eval(), copy.deepcopy(batch))
        for module, mode in modes:
            module.training = mode
        found = tensors_in(output)
        return {name: y for name, y in found if y.is_floating_point() and y.ndim > 0}

    def errors(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        """Relative distance to the original of each output: to its spread about the mean, as plans count."""
        sums: dict[str, list[float]] = {}
        for batch in batches:
            new, old = self.outputs(model, batch), self.outputs(self.original, batch)
            assert new.keys() == old.keys(), f"outputs {list(new)}, expected {list(old)}"
            for name, y in old.items():
                lost, spread = squares(new[name].double(), y.double())
                total = sums.setdefault(name, [0.0, 0.0])
                total[0], total[1] = total[0] + lost, total[1] + spread
        return {name: math.sqrt(lost / max(spread, 1e-30)) for name, (lost, spread) in sums.items()}

    @property
    def rounding(self) -> float:
        """What may be lost for the dtype's sake."""
        return max(8 * torch.finfo(p.dtype).eps for p in self.model.parameters() if p.is_floating_point())


@torch.no_grad()
def settle_norms_(model: nn.Module, run: Callable[[], Any]) -> None:
    """Give the batch norms that are in training the statistics of the data, as training would have."""
    norms: list[Any] = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None
    for _ in range(4 * N_TRAIN if norms else 0):
        run()
    for norm in norms:
        norm.momentum = 0.1
    for module, mode in modes:
        module.training = mode


def squares(new: Tensor, old: Tensor) -> tuple[float, float]:
    """Squared distance, and squared spread about the mean; where numbers are infinite both have to be."""
    assert new.shape == old.shape, f"an output of shape {tuple(new.shape)}, expected {tuple(old.shape)}"
    finite = torch.isfinite(old)
    assert torch.equal(new[~finite], old[~finite]), "an output that is not finite where the original's is, or reverse"
    new, old = new.masked_fill(~finite, 0), old.masked_fill(~finite, 0)
    mean = old.mean(dim=0) if len(old) > 1 else old.mean()
    return float((new - old).square().sum()), float((old - mean).masked_fill(~finite, 0).square().sum())


def total_error(errors: Mapping[str, float]) -> float:
    """One figure for all outputs, in which each counts alike: what a plan foretells."""
    return math.sqrt(sum(error**2 for error in errors.values()))


def predicted_error(plan: tt.CompressionPlan, model: nn.Module) -> float:
    """Relative error of a model's outputs, as its plan foretells it.

    ``rel_error`` of a layer is the share of its output that is lost, counted as far as it reaches the model's
    output. What the whole layer carries there, as a share of the mean square of the model's output about its mean,
    is its weight measured in the two second moments that the plan was made with. Errors of different layers are
    taken to be independent, so that their squares add up.
    """
    found = planned_layers(model)
    carried = [_carried(plan, found[layer.name]) * (layer.rel_error or 0.0) ** 2 for layer in plan.layers]
    return math.sqrt(sum(carried))


def planned_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that plans reach, with the maps of recurrent layers and attention as layers of their own."""
    with opened_for_a_while(model) as opened:
        return {layer.name: layer for layer in find_layers(opened.model)[0]}


def _carried(plan: tt.CompressionPlan, layer: Any) -> float:
    assert plan.calibration is not None
    gram, output_gram = plan.calibration.weighing(layer.name)
    if gram is None or output_gram is None:
        return 0.0
    matrix = layer.kernel.flatten(1)
    matrix = matrix.T if layer.weight.kind == "embedding" else matrix
    return energy(matrix, gram, output_gram) / plan.calibration.output_scale


def not_weighed(plan: tt.CompressionPlan) -> list[str]:
    """Layers that were cut without a word on what they see or where it leads: nothing is foretold for them."""
    assert plan.calibration is not None
    names = [layer.name for layer in plan.layers if layer.spec is not None]
    return [n for n in names if any(m is None or not m.any() for m in plan.calibration.weighing(n))]


# -- what must hold ---------------------------------------------------------------------------------------


@check
def inspecting_lists_the_layers(run: Run) -> None:
    table = run.inspected
    assert len(table) > 0
    assert table.params == n_numbers(run.original)
    assert all(row.name in str(table) for row in table)


@check
def a_plan_is_text_and_comes_back(run: Run) -> None:
    assert tt.CompressionPlan.from_json(run.plan.to_json()) == run.plan
    assert all(layer.name in str(run.plan) for layer in run.plan.layers)


@check
def the_budget_is_met_with_data(run: Run) -> None:
    assert run.plan.params_after == n_numbers(run.cut.model)
    _check_budget(run, run.cut)


@check
def the_budget_is_met_without_data(run: Run) -> None:
    _check_budget(run, run.blind)


@check
def the_budget_is_met_with_healing(run: Run) -> None:
    _check_budget(run, run.healed)


def _check_budget(run: Run, result: tt.CompressionResult) -> None:
    before, after = n_numbers(run.original), n_numbers(result.model)
    report, limit = result.report, math.floor(before / float(run.case.budget.rstrip("x")))
    assert (report.params_before, report.params_after) == (before, after)
    assert after <= limit, f"{after} parameters of {limit} allowed"
    why = [note for note in (*getattr(result.plan, "notes", ()), *report.notes) if "budget" in note]
    assert after >= 0.95 * limit or why, f"{after} parameters of {limit} allowed, and no note on it: {report.notes}"
    assert tt.Report.from_json(report.to_json()) == report


@check
def outputs_stay_within_twice_the_prediction(run: Run) -> None:
    errors, calibration = run.errors(run.cut.model, run.held_back), run.plan.calibration
    assert calibration is not None
    assert total_error(errors) > 0, "the new layers do not run"
    if any(0 not in calibration.input_shapes.get(name, ()) for name in not_weighed(run.plan)):
        return  # named, see below
    predicted = predicted_error(run.plan, run.original) + run.rounding
    text = f"predicted {predicted:.4f}, found {shown(errors)}"
    assert total_error(errors) <= 2 * predicted, text


@check
def layers_without_statistics_are_named_and_judged_by_their_weight(run: Run) -> None:
    names = not_weighed(run.plan)
    notes = " ".join((*getattr(run.plan, "notes", ()), *run.cut.report.notes))
    unnamed = [name for name in names if name not in notes and "by inputs alone" not in notes]
    assert not unnamed, f"cut without statistics, and no note names them: {unnamed}"
    unseen = [name for name in names if run.plan.calibration.weighing(name)[0] is None]  # else inputs have a say
    _check_weights(run, run.cut, unseen)


@check
def layers_cut_without_data_stay_within_their_error(run: Run) -> None:
    assert all(math.isfinite(error) for error in run.errors(run.blind.model, run.held_back).values())
    _check_weights(run, run.blind, [layer.name for layer in run.blind.plan.layers if layer.spec is not None])


def _check_weights(run: Run, result: tt.CompressionResult, names: list[str]) -> None:
    old = {name: layer.kernel.detach().double() for name, layer in planned_layers(run.original).items()}
    said = {layer.name: layer.rel_error or 0.0 for layer in result.plan.layers}
    for name in names:
        new: Any = result.model.get_submodule(name)
        kept = new.format.to_dense(list(new.cores), new.spec).detach().double()
        error = float((kept - old[name]).norm() / old[name].norm())
        assert error <= 1.01 * said[name] + run.rounding, f"{name}: weight error {error:.4f}, said {said[name]:.4f}"


@check
def healing_does_not_hurt(run: Run) -> None:
    cut, healed = run.errors(run.unhealed, run.held_back), run.errors(run.healed.model, run.held_back)
    told = [note for note in run.healed.report.notes if "heal" in note.lower()]
    text = f"cut {shown(cut)}, healed {shown(healed)}, notes {run.healed.report.notes}"
    assert total_error(healed) <= 1.02 * total_error(cut) + run.rounding or told, text
    losses = [row["loss"] for row in run.healed.report.healing]
    assert losses or told, f"no history of the healing, no note: {run.healed.report.notes}"


@check
def traits_of_the_model_are_kept(run: Run) -> None:
    for result in (run.cut, run.blind, run.healed):
        modules = dict(result.model.named_modules())
        for name, module in run.model.named_modules():
            if _is_within(name, _computed(run, result.plan)):
                continue  # the weight is computed no more, and the layer plain
            assert modules[name].training == module.training, f"{name or 'the model'}: training mode"
            assert len(modules[name]._forward_hooks) == len(module._forward_hooks), f"{name}: hooks"
        parameters = dict(result.model.named_parameters())
        replaced = {name for layer in result.plan.layers if layer.spec is not None for name in layer.names}
        for name, parameter in run.model.named_parameters():
            now = parameters.get(name)
            if now is not None and not parameter.requires_grad and name.rpartition(".")[0] not in replaced:
                assert torch.equal(now, parameter), f"{name} was frozen and has changed"
        for name, module in run.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and run.model.training and not module.training:
                assert same_bits(dict(module.named_buffers()), dict(modules[name].named_buffers())), f"{name}: frozen"
        before, after = planned_layers(run.model), planned_layers(result.model)
        for layer in result.plan.layers:
            weight: Any = before[layer.name].module.weight
            new = list(
                (
                    after[layer.name].module if layer.spec is None else result.model.get_submodule(layer.name)
                ).parameters()
            )
            assert all(p.dtype == weight.dtype for p in new), f"{layer.name}: dtype"
            assert any(p.requires_grad for p in new) == weight.requires_grad, f"{layer.name}: requires_grad"


@check
def a_saved_model_comes_back_to_the_bit(run: Run) -> None:
    _check_same_outputs(run, run.loaded)


@check
def a_saved_model_comes_back_by_its_class(run: Run) -> None:
    _check_same_outputs(run, run.loaded_by_class)


def _check_same_outputs(run: Run, model: nn.Module) -> None:
    for batch in run.held_back:
        assert same_bits(run.outputs(model, batch), run.outputs(run.healed.model, batch))


def _computed(run: Run, plan: tt.CompressionPlan) -> set[str]:
    """Layers whose weight was computed at every call, and is not any more."""
    return {name for name in plan.opened if is_computed(run.original.get_submodule(name))}


def _is_within(name: str, layers: set[str]) -> bool:
    return any(name == layer or name.startswith(f"{layer}.") for layer in layers)


@check
def undoing_gives_the_same_function(run: Run) -> None:
    assert not any(isinstance(module, tt.nn.FactorizedLayer) for module in run.undone.modules())
    narrowed = [name for one in run.cut.plan.narrowed for name in one.names]
    changed = {*_computed(run, run.cut.plan), *narrowed}  # they stay plain, and narrow
    shapes, now = (
        {name: value.shape for name, value in net.state_dict().items() if not _is_within(name, changed)}
        for net in (run.original, run.undone)
    )
    assert now == shapes
    for batch in run.held_back:
        new, old = run.outputs(run.undone, batch), run.outputs(run.loaded, batch)
        for name, y in old.items():
            lost, _ = squares(new[name].double(), y.double())
            finite = y[torch.isfinite(y)].double()
            assert lost <= (16 * run.rounding * float(finite.norm())) ** 2, f"{name}: {math.sqrt(lost)}"


@check
def measuring_gives_figures_or_a_note(run: Run) -> None:
    if run.case.measure:
        report = run.healed.report
        assert (report.latency and report.memory) or report.notes


@check
def the_model_that_was_given_is_untouched(run: Run) -> None:
    assert not run.touched, "; ".join(run.touched[:4])


# -- tools ------------------------------------------------------------------------------------------------


def shown(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{name or 'output'} {error:.4f}" for name, error in list(errors.items())[:6])


def n_numbers(model: nn.Module) -> int:
    """Numbers that the parameters of a model hold; shared memory counts once."""
    return sum({p.untyped_storage().data_ptr(): p.numel() for p in model.parameters()}.values())


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
        return
    if dataclasses.is_dataclass(value) and not isinstance(value, Mapping):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, SimpleNamespace):
        value = vars(value)
    if isinstance(value, (tuple, list)):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from tensors_in(each, f"{name}.{key}".lstrip("."))


def same_bits(a: Any, b: Any) -> bool:
    one, two = dict(tensors_in(a)), dict(tensors_in(b))
    return one.keys() == two.keys() and all(
        x.dtype == two[name].dtype and torch.equal(bits(x), bits(two[name])) for name, x in one.items()
    )


def bits(x: Tensor) -> Tensor:
    """The bytes: zeros of both signs differ, the same NaN is equal."""
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that hangs on a model's modules, and of its tensors the bits."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"the class of {name}"] = type(module)
        for key, value in vars(module).items():
            found |= _entries(f"{name}.{key}", value)
    return found


def _entries(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        about = (value.requires_grad, value.dtype, value.stride(), id(value.grad))
        grad = None if value.grad is None else bits(value.grad).clone()
        return {f"{name} (object)": value, f"{name} (bits)": bits(value).clone(), f"{name} (traits)": about,
                f"{name} (grad)": grad}  # fmt: skip
    if isinstance(value, (dict, list, tuple, set)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        found = {f"{name} (object)": value, f"{name} (size)": len(value)}
        for key, each in items:
            found |= _entries(f"{name}.{key}", each)
        return found
    return {name: value}


def surroundings() -> dict[str, Any]:
    return {
        "torch's random state": torch.get_rng_state(),
        "Python's random state": random.getstate(),
        "NumPy's random state": numpy.random.get_state()[1].tobytes(),
        "the grad mode": torch.is_grad_enabled(),
        "the default dtype": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
    }


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    names = [*before, *(name for name in after if name not in before)]
    return [n for n in names if n not in before or n not in after or not _same(before[n], after[n])]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and not a.requires_grad and torch.equal(a, b))
    return a is b or (not isinstance(a, (nn.Module, dict, list, set)) and type(a) is type(b) and bool(a == b))
