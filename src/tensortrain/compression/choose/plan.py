"""What will be done to a model, decided and printed before anything is changed."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from tensortrain.compression.choose.allocate import Option, allocate
from tensortrain.compression.choose.beyond_reach import (
    nothing_to_compress,
    unspent_note,
    what_stands_in_the_way,
)
from tensortrain.compression.choose.budget import Budget, BudgetLike, read_budget
from tensortrain.compression.choose.candidates import DEFAULT_FORMATS, Candidate, candidates, least_params
from tensortrain.compression.choose.cost import LayerCost, dense_cost, spec_cost
from tensortrain.compression.survey.calibrate import Calibration, calibrate
from tensortrain.compression.survey.layers import FoundLayer, LeftAlone, count_params, find_layers
from tensortrain.errors import BudgetError, CheckpointError
from tensortrain.formats import PLAIN, FactorSpec, Weighting, get_format
from tensortrain.nn.base import Implementation
from tensortrain.system.observer import Observer, Silent
from tensortrain.train.batches import n_examples, take, to_device
from tensortrain.train.outputs import Output, check_output
from tensortrain.train.preserve import preserved, uncompiled
from tensortrain.train.task import Task, TaskName, check_task_name, decide_task

__all__ = ["CompressionPlan", "LayerPlan", "check_reachable", "plan_compression"]

_SLACK = 0.01  # of the whole model's time: what a layer may lose before it counts as slower
# Exponent on a layer's weight when the model is healed: at 80x on Fashion-MNIST, after one epoch, 0.5 gave 90.5 %,
# 1 gave 88.8 % and 0 gave 90.0 %.
_HEALED_REACH = 0.5
# What counts of a squared error where the healing is long, for a weight of full matrix rank: this share of that of the
# best form of the same size, and a little of its own. At 40x on Fashion-MNIST, after seven epochs, trains with a
# relative error of 0.8 in the two large layers ended 0.25 points above low-rank layers of the same size with an error
# of 0.2: long training makes up for any start, but not for what a narrow layer cannot pass on.
_TRAINED_ERROR, _TRAINED_OWN_ERROR = 1 / 3, 0.001
# Rank steps to plan with, as shares of the rank: the coarse ones mostly spend the whole budget. In a model with one
# large layer they can leave several per cent of it, and planning is done again with the fine ones.
_GROWTHS = (0.08, 0.01)
_SPENT = 0.95
_FLOPS_NOT_KNOWN_YET = 10**15
_OFF_THE_PATH = 0.01  # of the usual weight: for a layer that the output the user named does not depend on
_FIRST = 3  # batches among which the first with an example is looked for
_VERSION = 2


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer; ``spec`` is ``None`` where it stays dense."""

    names: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    spec: FactorSpec | None
    params_before: int
    params_after: int
    flops_before: int | None
    flops_after: int | None
    rel_error: float | None
    decision: str
    implementation: str = "auto"
    spectra: tuple[tuple[float, ...], ...] = ()

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def format(self) -> str:
        return "dense" if self.spec is None else self.spec.format


@dataclass(frozen=True)
class CompressionPlan:
    """Formats, modes and ranks for a whole model. Prints as a table; ``to_json`` gives it as text.

    Attributes:
        layers: One entry a layer that can be factorized.
        budget, params_before, params_after: Of the whole model.
        left_alone: What is not touched, and why.
        task, outputs: How the model is judged, in words, and the names of its outputs that count.
        notes: Sentences on what could not be done as asked.
        calibration: The input statistics it was made with; not part of the text.
    """

    layers: tuple[LayerPlan, ...]
    budget: str
    params_before: int
    params_after: int
    left_alone: tuple[LeftAlone, ...] = ()
    calibration: Calibration | None = field(default=None, compare=False, repr=False)
    task: str = ""
    outputs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def compression(self) -> float:
        return self.params_before / max(1, self.params_after)

    def to_json(self) -> str:
        data = {
            "version": _VERSION,
            "budget": self.budget,
            "params_before": self.params_before,
            "params_after": self.params_after,
            "layers": [_layer_to_dict(layer) for layer in self.layers],
            "left_alone": [asdict(layer) for layer in self.left_alone],
            "task": self.task,
            "outputs": list(self.outputs),
            "notes": list(self.notes),
        }
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> CompressionPlan:
        """Read a plan back.

        Raises:
            CheckpointError: The text is not a plan, or was damaged.
        """
        try:
            data = json.loads(text)
            if data["version"] == 1:  # before plans told how a model is judged
                data = {**data, "version": _VERSION, "task": "", "outputs": [], "notes": []}
            if data["version"] != _VERSION:
                raise ValueError(f"version {data['version']}")
            return cls(
                layers=tuple(_layer_from_dict(layer) for layer in data["layers"]),
                budget=str(data["budget"]),
                params_before=int(data["params_before"]),
                params_after=int(data["params_after"]),
                left_alone=tuple(LeftAlone(**layer) for layer in data["left_alone"]),
                task=str(data["task"]),
                outputs=_texts(data["outputs"]),
                notes=_texts(data["notes"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"a plan must be the text that to_json() wrote: {error!r}. Make it again with plan_compression()."
            ) from error

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [5])
        head = f"{'layer':<{width}}  {'format':<9} {'modes out x in':<28} {'ranks':<22} {'params':>23} {'error':>7}"
        rows = [head, "-" * len(head)] + [_row(layer, width) for layer in self.layers]
        rows.append(
            f"budget {self.budget}: {self.params_before:,} -> {self.params_after:,} parameters "
            f"({self.compression:.4g}x fewer)"
        )
        rows += [self.task] if self.task else []
        rows += [f"left alone: {layer}" for layer in self.left_alone]
        rows += [f"note: {note}" for note in self.notes]
        return "\n".join(rows)


def plan_compression(
    model: nn.Module,
    *,
    budget: BudgetLike,
    data: Iterable[Any] | None = None,
    example_inputs: Any = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    allow_slower: bool = False,
    batch_size: int | None = None,
    n_batches: int = 16,
    will_heal: bool | Literal["long"] = False,
    task: TaskName | Task | None = None,
    output: Output | None = None,
    observer: Observer | None = None,
) -> CompressionPlan:
    """Choose format, modes and ranks of every layer so that the model fits a budget. Changes nothing.

    Every layer brings a menu of candidates with their predicted errors, weighted by the second moments of
    its inputs and by how far the error reaches the model's output where ``data`` is given. One allocation
    over all menus then spends the budget where it lowers the error most.

    Args:
        model: Any module; a bare layer too.
        budget: ``"20x"``, a share, ``{"params": n}`` or ``{"flops": n}``; every parameter of the model
            counts, shared ones once.
        data: Calibration batches, as for training (labels are not used).
        example_inputs: A batch to take shapes from, when there is no ``data``.
        formats: Names to choose among.
        include, exclude: Layer names or fnmatch patterns.
        allow_slower: Take candidates that are predicted slower than the dense layer. Without it a layer may
            lose at most 1 % of the whole model's predicted time at this batch size.
        batch_size: Rows to judge speed at; by default the batch size of the data.
        will_heal: The model will be fine-tuned afterwards. Training makes up for errors where they reach far
            more than where they do not, so layers are then weighed more alike (by the square root). ``"long"``, for
            several passes over the training data, prefers forms of high matrix rank over those of small error.
        task: What the model gives: ``"classify"``, ``"multi-label"``, ``"regress"``, ``"causal-lm"``, ``"seq2seq"`` or
            ``"embed"``; found out from the data when None. The plan says which.
        output: What the model is judged by: the name or number of one of its outputs, a callable on what it returns, or
            one on ``(model, batch)``; all tensors that it returns when None.

    Returns:
        CompressionPlan: Print it, save it as JSON, or hand it to ``apply_plan_``.

    Raises:
        BudgetError: The budget cannot be read or not be reached.
        FilterError: A pattern matches no layer.
        NonFiniteError: A weight holds NaN or Inf.

    Cost: singular values of every candidate matricization, plus ``n_batches`` forward passes and one per layer.
    """
    observer = observer or Silent()
    check_output(output)
    check_task_name(task.kind if isinstance(task, Task) else task)
    model = uncompiled(model)
    layers, left = find_layers(model, include=include, exclude=exclude)
    if not layers:
        raise nothing_to_compress(model, left)
    if data is not None or example_inputs is not None:
        check_reachable(model, layers, budget, formats)  # before the passes over the data
    judged, data = _task(model, data, task, output)
    calibration = _calibration(model, layers, data, example_inputs, n_batches, output, judged, observer)
    costs = {layer.name: dense_cost(layer, calibration, batch_size) for layer in layers}
    total = count_params(model)
    flops = sum(cost.flops or 0 for cost in costs.values()) if calibration is not None else None
    limit = read_budget(budget, params=total, flops=flops)
    reach = _HEALED_REACH if will_heal else 1.0
    weights, unseen = _weights(layers, calibration, narrowed=output is not None)
    weights = {name: weight**reach for name, weight in weights.items()}
    long = will_heal == "long"
    for growth in _GROWTHS:
        menus = _menus(layers, calibration, formats, growth, long, observer)
        chooser = _Chooser(layers, menus, weights, costs, calibration, limit, total, batch_size, allow_slower, long)
        chooser.beyond_reach = partial(what_stands_in_the_way, model, layers, left)
        plans = chooser.choose()
        if chooser.spent(plans) >= _SPENT * limit.limit:
            break
    after = total - sum(layer.params_before - layer.params_after for layer in plans)
    notes = [*(judged.notes if judged else ()), *(calibration.notes if calibration else ()), *unseen]
    full = total if limit.measure == "params" else flops or 0
    slower = [name for name, families in chooser.banned.items() if families]
    unspent = unspent_note(limit, chooser.spent(plans), full=full, slower=slower)
    notes += [unspent] if unspent else []
    outputs = judged.outputs if judged else ()
    words = str(judged) if judged else ""
    return CompressionPlan(
        tuple(plans), limit.text, total, after, tuple(left), calibration, words, outputs, tuple(notes)
    )


def _task(
    model: nn.Module, data: Iterable[Any] | None, task: TaskName | Task | None, output: Output | None
) -> tuple[Task | None, Iterable[Any] | None]:
    """How the model is judged, None without data; and the data, complete again where it can be read only once."""
    if data is None or isinstance(task, Task):
        return (task if isinstance(task, Task) else None), data
    seen = take(data, _FIRST)
    first = next((batch for batch in seen if n_examples(batch)), None)
    if isinstance(data, Iterator):
        data = itertools.chain(seen, data)
    if first is None:
        return None, data  # the calibration says what is wrong
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.no_grad(), preserved(model):
        model.eval()
        return decide_task(model, to_device(first, device), task=task, output=output), data


def check_reachable(
    model: nn.Module, layers: Sequence[FoundLayer], budget: BudgetLike, formats: Sequence[str] = DEFAULT_FORMATS
) -> None:
    """Raise now what shapes alone tell about a budget.

    Raises:
        BudgetError: The budget cannot be read, or has fewer parameters than the smallest form of the model.
    """
    total = count_params(model)
    limit = read_budget(budget, params=total, flops=_FLOPS_NOT_KNOWN_YET)
    least = total - sum(layer.weight.n_params - least_params(layer.weight, formats) for layer in layers)
    if limit.measure == "params" and limit.limit < least:
        raise BudgetError(
            f"a budget must be reachable: {limit.text} allows {limit.limit:,} parameters, but no form of this model "
            f"has fewer than {least:,}.{what_stands_in_the_way(model, layers)} Ask for more."
        )


def _calibration(
    model: nn.Module,
    layers: Sequence[FoundLayer],
    data: Iterable[Any] | None,
    example_inputs: Any,
    n_batches: int,
    output: Output | None,
    task: Task | None,
    observer: Observer,
) -> Calibration | None:
    if data is not None:
        return calibrate(
            model,
            layers,
            data,
            n_batches=n_batches,
            output=output,
            with_labels=task is not None and task.with_labels,
            observer=observer,
        )
    if example_inputs is not None:
        return calibrate(model, layers, [example_inputs], n_batches=1, grams=False, observer=observer)
    return None


def _menus(
    layers: Sequence[FoundLayer],
    calibration: Calibration | None,
    formats: Sequence[str],
    growth: float,
    wide: bool,
    observer: Observer,
) -> dict[str, list[Candidate]]:
    for name in formats:
        get_format(name)  # an unknown name is an error before the work starts
    menus = {}
    observer.on_start("candidates", len(layers))
    for k, layer in enumerate(layers):
        weighting = Weighting(*calibration.weighing(layer.name)) if calibration else PLAIN
        structure = calibration.structures.get(layer.name) if calibration else None
        menus[layer.name] = candidates(
            layer, formats=formats, weighting=weighting, structure=structure, growth=growth, wide=wide
        )
        observer.on_step(k + 1)
    observer.on_end()
    return menus


def _weights(
    layers: Sequence[FoundLayer], calibration: Calibration | None, *, narrowed: bool
) -> tuple[dict[str, float], list[str]]:
    """What losing a layer wholly would change: a relative squared error times this adds up over layers.

    With gradients, the mean square of the model's output that the layer carries; else all layers count alike. A layer
    that no row or no gradient came to counts as the median one does: nothing is known of it, which is no reason to
    cut it away. One that an output named by the user does not depend on counts a hundredth of that.
    """
    if calibration is None or not (calibration.output_grams or _missing(layers, calibration)):
        return {layer.name: 1.0 for layer in layers}, []
    found = {layer.name: _carried(layer, calibration) for layer in layers}
    known = sorted(weight for weight in found.values() if 0 < weight < math.inf)
    usual = known[len(known) // 2] if known else 1.0
    unknown = dict.fromkeys(calibration.grams, usual * (_OFF_THE_PATH if narrowed else 1.0))
    unknown |= {name: max(1.0, usual) for name in calibration.unmeasured}  # the output, as of layers in sequence
    weights = {name: weight if 0 < weight < math.inf else unknown.get(name, usual) for name, weight in found.items()}
    return weights, _unseen_notes(layers, found, calibration)


def _missing(layers: Sequence[FoundLayer], calibration: Calibration) -> bool:
    """Whether some layers have input statistics and some have none."""
    return len(calibration.grams) < len(layers) and bool(calibration.grams or calibration.unseen)


def _carried(layer: FoundLayer, calibration: Calibration) -> float:
    weighting = Weighting(*calibration.weighing(layer.name))
    if weighting.is_plain:
        return 0.0
    if not calibration.output_grams:
        return 1.0
    if weighting.outputs is None:
        return 0.0
    matrix = layer.kernel.flatten(1)
    matrix = matrix.T if layer.weight.kind == "embedding" else matrix
    return weighting.energy(matrix) / calibration.output_scale


def _unseen_notes(layers: Sequence[FoundLayer], found: Mapping[str, float], calibration: Calibration) -> list[str]:
    without = [layer for layer in layers if not 0 < found[layer.name] < math.inf]
    rows = [layer.name for layer in without if layer.name in calibration.unseen]
    gradients = [layer.name for layer in without if layer.name in calibration.grams]
    notes = []
    if calibration.unmeasured:
        notes.append(f"Input moments are not taken of {_named(calibration.unmeasured)}: judged by the weights alone.")
    if rows:
        notes.append(f"No rows of the data (or only equal ones) came to {_named(rows)}: judged by the weights alone.")
    if gradients:
        notes.append(
            f"No output that counts depends on {_named(gradients)}, as far as gradients tell: judged by the "
            "weights and inputs alone."
        )
    return notes


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown


_Banned = dict[str, dict[tuple[Any, ...], int]]


@dataclass
class _Chooser:
    """Allocation, then a check of every choice's speed; what fails is struck off the menu and it goes again."""

    layers: Sequence[FoundLayer]
    menus: Mapping[str, list[Candidate]]
    weights: Mapping[str, float]
    costs: Mapping[str, LayerCost]
    calibration: Calibration | None
    budget: Budget
    total_params: int
    batch_size: int | None
    allow_slower: bool
    long_healing: bool
    known: dict[tuple[str, FactorSpec], LayerCost] = field(default_factory=dict)
    banned: _Banned = field(default_factory=dict)
    beyond_reach: Callable[[], str] = str  # who holds the parameters that no plan reaches, for a message

    def choose(self) -> list[LayerPlan]:
        # Per layer: formats and modes that are too slow from so many parameters on.
        banned = self.banned = {layer.name: {} for layer in self.layers}
        while True:
            picks = self._allocate(banned)
            slower = [] if self.allow_slower else self._slower(picks)
            if not slower:
                return [
                    self._plan(layer, pick, bool(banned[layer.name]))
                    for layer, pick in zip(self.layers, picks, strict=True)
                ]
            for layer, candidate in slower:
                banned[layer.name][_family(candidate)] = candidate.point.n_params

    def spent(self, plans: Sequence[LayerPlan]) -> int:
        """What of the budget the plans use."""
        if self.budget.measure == "flops":
            return sum(plan.flops_after or 0 for plan in plans)
        return self.total_params - sum(plan.params_before - plan.params_after for plan in plans)

    def _allocate(self, banned: _Banned) -> list[Candidate | None]:
        menus = []
        for layer in self.layers:
            options = [Option(self._price(layer, None), 0.0, None)]
            errors = self._expected_errors(layer)
            for candidate, error in zip(self.menus[layer.name], errors, strict=True):
                if candidate.point.n_params < banned[layer.name].get(_family(candidate), math.inf):
                    loss = self.weights[layer.name] * error
                    options.append(Option(self._price(layer, candidate), loss, candidate))
            menus.append(options)
        try:
            picks = allocate(menus, self.budget.limit - self._fixed())
        except BudgetError as error:
            raise self._unreachable(menus, banned) from error
        return [pick.choice for pick in picks]

    def _expected_errors(self, layer: FoundLayer) -> list[float]:
        """Relative squared errors of a layer's candidates, as far as healing will leave them."""
        menu = self.menus[layer.name]
        own = [candidate.point.rel_error**2 for candidate in menu]
        if not self.long_healing:
            return own
        full = min(layer.weight.one_group().out_features, layer.weight.in_features)
        widths = [get_format(c.spec.format).max_matrix_rank(c.spec) / full for c in menu]
        best = _running_best([candidate.point.n_params for candidate in menu], own)
        return [
            (1 - width) * error + width * (_TRAINED_ERROR * least + _TRAINED_OWN_ERROR * error)
            for width, error, least in zip(widths, own, best, strict=True)
        ]

    def _fixed(self) -> int:
        """What the model costs outside the weights that can be chosen."""
        if self.budget.measure == "flops":
            return 0
        return self.total_params - sum(layer.weight.n_params for layer in self.layers)

    def _price(self, layer: FoundLayer, candidate: Candidate | None) -> int:
        if self.budget.measure == "params":
            return layer.weight.n_params if candidate is None else candidate.point.n_params
        if candidate is None:
            return self.costs[layer.name].flops or 0
        return self._cost(layer, candidate).flops or 0

    def _cost(self, layer: FoundLayer, candidate: Candidate) -> LayerCost:
        """Milliseconds to predict, so each is predicted once."""
        key = layer.name, candidate.spec
        if key not in self.known:
            self.known[key] = spec_cost(layer, candidate.spec, self.calibration, self.batch_size)
        return self.known[key]

    def _slower(self, picks: Sequence[Candidate | None]) -> list[tuple[FoundLayer, Candidate]]:
        slack = _SLACK * sum(cost.seconds for cost in self.costs.values())
        slower = []
        for layer, pick in zip(self.layers, picks, strict=True):
            if pick is None:
                continue
            if self._cost(layer, pick).seconds > self.costs[layer.name].seconds + slack:
                slower.append((layer, pick))
        return slower

    def _unreachable(self, menus: Sequence[Sequence[Option]], banned: _Banned) -> BudgetError:
        least = self._fixed() + sum(min(option.cost for option in menu) for menu in menus)
        cause = ""
        if any(banned.values()):
            names = [name for name, families in banned.items() if families]
            cause = f" {len(names)} layers would become slower (such as {names[0]!r}); allow_slower=True admits them."
        return BudgetError(
            f"a budget must be reachable: {self.budget.text} allows {self.budget.limit:,} {self.budget.measure}, but "
            f"the smallest that this model can be made is {least:,}.{cause}{self.beyond_reach()} "
            f"Ask for at least {least:,}."
        )

    def _plan(self, layer: FoundLayer, pick: Candidate | None, was_slower: bool) -> LayerPlan:
        cost = self.costs[layer.name]
        common: dict[str, Any] = {
            "names": layer.names,
            "kind": layer.kind,
            "shape": layer.weight.dense_shape,
            "params_before": layer.n_params,
            "flops_before": cost.flops,
        }
        if pick is None:
            slow = "every form that fits is predicted slower at this batch size; allow_slower=True admits them"
            return LayerPlan(
                **common,
                spec=None,
                params_after=layer.n_params,
                flops_after=cost.flops,
                rel_error=None,
                decision=f"left dense: {slow if was_slower else 'worth its parameters'}",
            )
        return LayerPlan(
            **common,
            spec=pick.spec,
            params_after=layer.n_params - layer.weight.n_params + pick.point.n_params,
            flops_after=self._cost(layer, pick).flops,
            rel_error=pick.point.rel_error,
            decision="compressed",
            # A budget in flops is only kept if the layer really runs core by core.
            implementation="factorized" if self.budget.measure == "flops" else "auto",
            spectra=pick.spectra,
        )


def _running_best(sizes: Sequence[int], errors: Sequence[float]) -> list[float]:
    """For every entry the least error of those that are no larger."""
    best, least = [0.0] * len(sizes), math.inf
    for k in sorted(range(len(sizes)), key=lambda k: (sizes[k], errors[k])):
        least = min(least, errors[k])
        best[k] = least
    return best


def _family(candidate: Candidate) -> tuple[Any, ...]:
    """Format and modes: within them, higher ranks are not faster."""
    spec = candidate.spec
    return (spec.format, spec.out_modes, spec.in_modes)


def _row(layer: LayerPlan, width: int) -> str:
    spec = layer.spec
    modes = "" if spec is None else f"{_by(spec.out_modes)} x {_by(spec.in_modes)}"
    ranks = "" if spec is None else ",".join(map(str, get_format(spec.format).inner_ranks(spec)))
    error = "" if layer.rel_error is None else f"{layer.rel_error:.3f}"
    params = f"{layer.params_before:,} -> {layer.params_after:,}"
    return f"{layer.name:<{width}}  {layer.format:<9} {modes:<28} {ranks:<22} {params:>23} {error:>7}"


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("a list of texts is none")
    return tuple(values)


def _by(modes: Sequence[int]) -> str:
    return "(" + ",".join(map(str, modes)) + ")"


def _layer_to_dict(layer: LayerPlan) -> dict[str, Any]:
    data = {name: getattr(layer, name) for name in LayerPlan.__dataclass_fields__}
    return {**data, "spec": None if layer.spec is None else layer.spec.to_dict()}


def _layer_from_dict(data: Mapping[str, Any]) -> LayerPlan:
    spec = None if data["spec"] is None else FactorSpec.from_dict(data["spec"])
    fields = {
        **data,
        "spec": spec,
        "names": tuple(data["names"]),
        "shape": tuple(data["shape"]),
        "spectra": tuple(tuple(values) for values in data["spectra"]),
    }
    layer = LayerPlan(**fields)
    if not _is_sound(layer) or isinstance(data["names"], str):
        raise ValueError(f"layer {data['names']!r} has values of the wrong type")
    return layer


def _is_sound(layer: LayerPlan) -> bool:
    """Whether values that were read have their types; JSON does not see to that."""
    texts = (layer.kind, layer.decision, *layer.names)
    flops = (count for count in (layer.flops_before, layer.flops_after) if count is not None)
    counts = (layer.params_before, layer.params_after, *flops, *layer.shape)
    error = 0.0 if layer.rel_error is None else layer.rel_error
    numbers = (error, *(value for values in layer.spectra for value in values))
    return (
        len(layer.names) > 0
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(count, int) for count in counts)
        and all(isinstance(number, (int, float)) for number in numbers)
        and layer.implementation in get_args(Implementation)
    )
