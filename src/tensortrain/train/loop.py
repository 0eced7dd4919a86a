"""One training loop, for dense training and for healing, that goes on after a kill to the same result."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from tensortrain.errors import CheckpointError, DataError, KindError, NonFiniteError, RankError
from tensortrain.system.checkpoint import (
    check_state_fits,
    loader_parts,
    read_checkpoint,
    rng_state,
    same_start,
    set_rng_state,
    start_signature,
    write_checkpoint,
)
from tensortrain.system.observer import Observer, Silent
from tensortrain.train.batches import length_of, n_examples, opened, read_batch, run, to_device
from tensortrain.train.losses import Loss, cross_entropy_loss, distillation_loss, feature_loss
from tensortrain.train.masters import float32_masters
from tensortrain.train.outputs import judged_outputs
from tensortrain.train.preserve import modes_kept
from tensortrain.train.task import IGNORED, task_of_outputs

__all__ = [
    "FitResult",
    "Loss",
    "cross_entropy_loss",
    "distillation_loss",
    "evaluate_accuracy",
    "feature_loss",
    "fit",
    "reestimate_batchnorm_",
]

ScheduleName = Literal["cosine", "onecycle", "constant"]
OptimizerFactory = Callable[..., torch.optim.Optimizer]
Evaluate = Callable[[nn.Module], "float | Mapping[str, float]"]

_ONECYCLE_RISE, _ONECYCLE_START = 0.3, 1 / 25
_STEPS_BETWEEN_SYNCS = 25  # on an accelerator the losses are read this seldom, so that the host runs ahead


@dataclass(frozen=True)
class FitResult:
    """What a training run did.

    Attributes:
        history: One dict per epoch: ``epoch``, ``step`` (steps done), ``loss`` (mean over the epoch), ``lr``,
            ``seconds`` (of all training so far), and the figures of ``evaluate``.
        steps: Optimizer steps done, those before a resume included.
        seconds: Wall time of training and evaluation, that before a resume included.
        resumed_from: Step that a checkpoint gave back; 0 for a run from the start.
        notes: Sentences on what went another way than asked.
    """

    history: list[dict[str, float]]
    steps: int
    seconds: float
    resumed_from: int = 0
    notes: tuple[str, ...] = ()


class Monitor(Protocol):
    """Somebody who watches a run, may end it, and takes its errors: what was learnt then is not lost."""

    def due(self, step: int, total: int) -> bool:
        """Whether to look at the model after this step."""

    def look(self, model: nn.Module, step: int) -> bool:
        """Look; True ends the run."""

    def failed(self, error: BaseException, step: int) -> None:
        """The run ends after this step by an error or by Ctrl-C."""

    def unsaved(self, error: Exception, step: int) -> None:
        """The checkpoint could not be written; the run goes on without one."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


def fit(
    model: nn.Module,
    data: Iterable[Any],
    *,
    loss: Loss,
    epochs: int | None = None,
    steps: int | None = None,
    optimizer: Literal["adamw", "sgd"] | OptimizerFactory = "adamw",
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    schedule: ScheduleName = "cosine",
    warmup: float = 0.05,
    grad_clip: float | None = None,
    param_groups: Sequence[dict[str, Any]] | None = None,
    evaluate: Evaluate | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every_s: float = 20.0,
    seed: int | None = None,
    observer: Observer | None = None,
    autocast_dtype: torch.dtype | None = None,
    label: str = "train",
    monitor: Monitor | None = None,
) -> FitResult:
    """Train a model in place.

    With ``checkpoint`` the run can be killed at any moment: the same call on the same starting model goes on
    where the file left off and ends with the same bits (on one process, the same machine and number of
    threads, and without ``persistent_workers``). After the end, the same call loads the result and returns at
    once. A file that is damaged, or of other settings, another length of data or another starting model, is
    not used: the run starts over, says so to the observer, and writes over it.

    Args:
        model: Trained in train mode; the modes it had are put back. In a model that is in train mode already, parts
            that the user put into eval mode stay in it; batch norms whose weights are frozen keep their statistics.
            Weights in half or bfloat16 are trained as float32 copies, under autocast, and come back in their dtype.
        data: Re-iterable; gives batches as ``batches`` reads them, moved to the model's device.
            ``set_epoch`` is called on it and on its sampler where they have one.
        loss: ``(model, batch) -> scalar tensor``; it does the forward pass. None passes the batch over.
        epochs: Passes over ``data``, which then needs a length.
        steps: Optimizer steps; give this or ``epochs``.
        optimizer: A name, or a factory called as ``factory(params, lr=lr)``.
        lr: Largest learning rate.
        weight_decay: For weights with two or more axes; biases and norm layers get none. Not used with a
            factory or with ``param_groups``.
        momentum: Of SGD (Nesterov's).
        schedule: ``"cosine"`` to zero, ``"onecycle"`` (rise over the first 30 %, then cosine to zero) or
            ``"constant"``.
        warmup: Share of the steps with rising rate, in ``[0, 1)``; not used by ``"onecycle"``.
        grad_clip: Largest norm of the whole gradient.
        param_groups: Groups in the manner of torch.optim, in place of the model's parameters.
        evaluate: ``model -> figure or dict of figures``, called in eval mode after each epoch.
        checkpoint: File to keep the state in.
        checkpoint_every_s: Least time between two writes, in seconds; the end of the run always writes.
        seed: Seeds torch for this run and puts the caller's generators back; None leaves them as they are.
        observer: Gets the progress.
        autocast_dtype: ``torch.bfloat16`` for mixed precision.
        label: What the observer is told that this work is.
        monitor: Looks at the model now and then; errors and Ctrl-C then end the run without being raised.

    Returns:
        FitResult: history, steps, seconds.

    Raises:
        NonFiniteError: The loss is NaN or Inf; the last checkpoint stays as it was.
        DataError: The data gives no batches, or has no length where one is needed.
        KindError: An unknown name, or a combination of arguments that says nothing.

    Example:
        >>> batches = [(torch.randn(8, 784), torch.randint(0, 10, (8,)))]
        >>> fit(nn.Linear(784, 10), batches, loss=cross_entropy_loss(), steps=3).steps
        3
    """
    total = _total_steps(data, epochs, steps)
    _check_options(schedule, warmup, autocast_dtype)
    with torch.inference_mode(False), torch.enable_grad(), float32_masters(model) as low_dtype:
        trainer = _Trainer(
            model=model,
            data=data,
            loss=loss,
            total=total,
            optimizer=_make_optimizer(model, optimizer, param_groups, lr, weight_decay, momentum),
            schedule=schedule,
            warmup=warmup,
            grad_clip=grad_clip,
            evaluate=evaluate,
            checkpoint=None if checkpoint is None else Path(checkpoint),
            checkpoint_every_s=checkpoint_every_s,
            seed=seed,
            observer=observer or Silent(),
            autocast_dtype=autocast_dtype or low_dtype,
            label=label,
            monitor=monitor,
        )
        with _seeded(seed, trainer.device), modes_kept(model):
            return trainer.run()


def evaluate_accuracy(model: nn.Module, data: Iterable[Any]) -> float:
    """Return the share of right answers, a fraction in ``[0, 1]``.

    Args:
        model: Gives logits ``(b, c)``; run in eval mode, the modes it had are put back.
        data: Gives ``(x, y)`` or dicts with ``"labels"``.

    Raises:
        DataError: The data gives no labelled batch.
    """
    device, n = _device_of(model), 0
    right = torch.zeros((), dtype=torch.int64, device=device)
    with torch.no_grad(), modes_kept(model), opened(data) as batches:
        model.eval()
        for batch in batches:
            batch = to_device(batch, device)
            labels = read_batch(model, batch).labels
            if isinstance(labels, Tensor) and labels.numel():
                hits = _hits(model, batch, labels)
                right, n = right + hits.sum(), n + hits.numel()
    if n == 0:
        raise DataError(
            "accuracy must be measured on labelled examples: data has none, expected (x, y) batches. "
            "Pass a re-iterable loader with labels."
        )
    return int(right) / n


def _hits(model: nn.Module, batch: Any, labels: Tensor) -> Tensor:
    """Which labels that count are the likeliest class."""
    tensors, _ = judged_outputs(model, batch)
    task = task_of_outputs(model, batch, tensors, labels)
    y = tensors[task.main]
    if task.labels == "shares":
        labels = labels.reshape(y.shape).argmax(task.class_axis)
    found = y.argmax(task.class_axis if task.labels != "none" else -1)
    labels = labels.reshape(found.shape)
    return found[labels != IGNORED] == labels[labels != IGNORED]


def reestimate_batchnorm_(model: nn.Module, data: Iterable[Any], *, n_batches: int | None = None) -> int:
    """Set the running mean and variance of every batch norm anew, as the plain mean over batches.

    Compression shifts the statistics of activations; this puts most of the lost accuracy back for the price
    of some forward passes. Only batch norms run in train mode, so dropout stays off.

    Args:
        model: Changed in place; modes and momenta are put back. An error leaves the old statistics.
        data: Gives batches as for :func:`fit`; labels are not used.
        n_batches: Stop after this many; all when None.

    Returns:
        int: Batches used; 0 when the model has no batch norm with running statistics.

    Raises:
        DataError: The data gives no batches.
    """
    found: list[Any] = [m for m in model.modules() if _is_norm(m) and m.track_running_stats]
    norms = [norm for norm in found if not is_frozen_norm(model, norm)]
    if not norms:
        return 0
    before = [(norm, norm.momentum, {k: b.clone() for k, b in norm.named_buffers()}) for norm in norms]
    used = 0
    try:
        with torch.no_grad(), modes_kept(model):
            model.eval()
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # torch then takes the plain mean over batches
                norm.train()
            used = _forward_batches(model, data, n_batches)
    finally:
        for norm, momentum, buffers in before:
            norm.momentum = momentum
            if used == 0:
                norm.load_state_dict(buffers, strict=False)
    if used == 0:
        raise _no_batches("reestimate_batchnorm_")
    return used


def _forward_batches(model: nn.Module, data: Iterable[Any], n_batches: int | None) -> int:
    """Run batches through; those of no or one example have no variance and are passed over."""
    device, used, seen = _device_of(model), 0, 0
    with opened(data) as batches:
        for batch in batches:
            if used == n_batches or seen == 2 * (n_batches or math.inf):
                break
            seen += 1
            if n_examples(batch) > 1:
                run(model, to_device(batch, device))
                used += 1
    return used


def _is_norm(module: nn.Module) -> Any:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def is_frozen_norm(model: nn.Module, norm: nn.Module) -> bool:
    """Whether the user keeps a batch norm from learning: in eval mode within a model in train mode, or its weights."""
    if model.training and not norm.training:
        return True
    own = list(norm.parameters(recurse=False))
    frozen = bool(own) and not any(p.requires_grad for p in own)
    return frozen and any(p.requires_grad for p in model.parameters())


class _TrainModes:
    """The modes a model is trained in: the user's own where it is in train mode, else train mode."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.own = [(module, module.training) for module in model.modules()] if model.training else None
        self.frozen = [m for m in model.modules() if _is_norm(m) and is_frozen_norm(model, m)]
        self.norms = [m for m in model.modules() if _is_norm(m) and m not in self.frozen]

    def set(self) -> None:
        self.model.train()
        for module, training in self.own or ():
            module.training = training
        for norm in self.frozen:
            norm.training = False

    @contextlib.contextmanager
    def fitting(self, batch: Any) -> Iterator[None]:
        """One example has no variance: batch norms then use their running statistics."""
        norms = [norm for norm in self.norms if norm.training] if n_examples(batch) == 1 else []
        for norm in norms:
            norm.training = False
        try:
            yield
        finally:
            for norm in norms:
                norm.training = True


@dataclass
class _Progress:
    """The counters of a run; all of it goes into the checkpoint."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    loss_sum: float = 0.0  # over the settled steps of this epoch
    n_losses: int = 0  # of this epoch; batches that were passed over have none
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    stopped: bool = False  # by the monitor


@dataclass
class _Trainer:
    model: nn.Module
    data: Iterable[Any]
    loss: Loss
    total: int
    optimizer: torch.optim.Optimizer
    schedule: ScheduleName
    warmup: float
    grad_clip: float | None
    evaluate: Evaluate | None
    checkpoint: Path | None
    checkpoint_every_s: float
    seed: int | None
    observer: Observer
    autocast_dtype: torch.dtype | None
    label: str
    monitor: Monitor | None = None

    def __post_init__(self) -> None:
        self.device = _device_of(self.model)
        self.modes = _TrainModes(self.model)
        half = self.autocast_dtype is torch.float16  # whose small gradients would vanish
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.progress = _Progress()
        self.resumed_rng: dict[str, Any] | None = None
        self.epoch_rng: dict[str, Any] = {}
        self.unsettled: list[tuple[int, Tensor]] = []
        self.last_loss = math.nan
        self.steps_between_syncs = 1 if self.device.type == "cpu" else _STEPS_BETWEEN_SYNCS
        if self.checkpoint is not None:
            self.settings = self._settings()
            self.start = start_signature(self.model)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def run(self) -> FitResult:
        resumed_from = self._resume()
        self.observer.on_start(self.label, self.total)
        self.mark = self.last_save = time.perf_counter()
        try:
            self._run_epochs()
        except (Exception, KeyboardInterrupt) as error:
            if self.monitor is None:  # nobody takes it
                raise
            self.monitor.failed(error, self.progress.step)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            self.observer.on_end()
        done = self.progress
        return FitResult(done.history, done.step, done.seconds, resumed_from)

    def _run_epochs(self) -> None:
        while self.progress.step < self.total and not self.progress.stopped:
            self.modes.set()
            self._run_epoch()
            self._end_epoch()

    def _run_epoch(self) -> None:
        with self._batches() as batches:
            for batch in batches:
                self._step(to_device(batch, self.device))
                if self.monitor is not None and self.monitor.due(self.progress.step, self.total):
                    self._settle()
                    with self._autocast():
                        self.progress.stopped = self.monitor.look(self.model, self.progress.step)
                if self.progress.step == self.total or self.progress.stopped:
                    break
                if self.checkpoint and self._due():
                    self._save()
        if self.progress.step_in_epoch == 0:
            raise _no_batches(f"epoch {self.progress.epoch}")

    @contextlib.contextmanager
    def _batches(self) -> Iterator[Iterator[Any]]:
        """Start an epoch's pass; after a resume, take it to the batch that the checkpoint was at.

        The loader draws its order when the pass starts, from generators that the model may share. So they
        are first set as they were then, and after the replay as they were at the checkpoint.
        """
        for part in loader_parts(self.data):
            if hasattr(part, "set_epoch"):
                part.set_epoch(self.progress.epoch)
        resumed, self.resumed_rng = self.resumed_rng, None
        if resumed is not None:
            set_rng_state(resumed["epoch"], self.data, self.device)
        self.epoch_rng = rng_state(self.data, self.device)
        with opened(self.data) as batches:
            for _ in range(self.progress.step_in_epoch):
                next(batches, None)
            if resumed is not None and self.progress.step_in_epoch > 0:
                set_rng_state(resumed["now"], self.data, self.device)
            yield batches

    def _step(self, batch: Any) -> None:
        self._set_lr()
        with self._autocast(), self.modes.fitting(batch):
            loss = self.loss(self.model, batch)
        if loss is not None:
            self._learn(loss)
        self.progress.step += 1
        self.progress.step_in_epoch += 1
        self._tell()

    def _tell(self) -> None:
        try:
            self.observer.on_step(self.progress.step, loss=self.last_loss, lr=self._lr())
        except Exception:
            self.monitor = None  # whoever watches wants the run to end, and by this error
            raise

    def _learn(self, loss: Tensor) -> None:
        _check_loss(loss)
        self.unsettled.append((self.progress.step, loss.detach()))
        if len(self.unsettled) >= self.steps_between_syncs:
            self._settle()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if self.grad_clip is not None:
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(params, self.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _settle(self) -> None:
        """Read the losses that are still on the device, in one transfer; refuse any that is not finite."""
        if not self.unsettled:
            return
        values = torch.stack([loss for _, loss in self.unsettled]).tolist()
        for (step, _), value in zip(self.unsettled, values, strict=True):
            if not math.isfinite(value):
                raise self._not_finite(step, value)
            self.progress.loss_sum += value
            self.progress.n_losses += 1
        self.last_loss = values[-1]
        self.unsettled.clear()

    def _not_finite(self, step: int, value: float) -> NonFiniteError:
        kept = f" The checkpoint {self.checkpoint} is as before." if self.checkpoint else ""
        return NonFiniteError(
            f"the loss must be finite: step {step} (epoch {self.progress.epoch}) has {value}, expected a "
            f"finite number. Lower lr (now {self._lr():.3g}), set grad_clip=1.0, or leave out "
            f"autocast_dtype.{kept}"
        )

    def _end_epoch(self) -> None:
        self._settle()
        done = self.progress
        row = {
            "epoch": done.epoch,
            "step": done.step,
            "loss": done.loss_sum / done.n_losses if done.n_losses else math.nan,
            "lr": self._lr(),
        }
        row |= self._figures()
        self._count_time()
        row["seconds"] = done.seconds
        done.history.append(row)
        done.epoch, done.step_in_epoch, done.loss_sum, done.n_losses = done.epoch + 1, 0, 0.0, 0
        if self.checkpoint and (done.step == self.total or done.stopped or self._due()):
            self._save()

    def _figures(self) -> dict[str, float]:
        if self.evaluate is None:
            return {}
        with torch.no_grad(), self._autocast():
            self.model.eval()
            figures = self.evaluate(self.model)
        named = figures if isinstance(figures, Mapping) else {"metric": figures}
        return {name: float(figure) for name, figure in named.items()}

    def _set_lr(self) -> None:
        share = _SCHEDULES[self.schedule](self.progress.step, self.total, self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share

    def _lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def _due(self) -> bool:
        return time.perf_counter() - self.last_save >= self.checkpoint_every_s

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self.mark
        self.mark = now

    def _save(self) -> None:
        assert self.checkpoint is not None
        self._settle()
        self._count_time()
        try:
            write_checkpoint(self.checkpoint, self._content())
        except (OSError, CheckpointError) as error:
            if self.monitor is None:
                raise
            self.monitor.unsaved(error, self.progress.step)
            self.checkpoint = None
        self.last_save = time.perf_counter()

    def _content(self) -> dict[str, Any]:
        finished = self.progress.step == self.total or self.progress.stopped
        now = rng_state(self.data, self.device)
        return {
            "settings": self.settings,
            "start": self.start,
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "optimizer": None if finished else self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "monitor": None if self.monitor is None else self.monitor.state(),
            "rng": {"now": now, "epoch": self.epoch_rng if self.progress.step_in_epoch else now},
        }

    def _resume(self) -> int:
        """Take over the checkpoint if it is this run's; return the step it was at."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return 0
        try:
            content = read_checkpoint(self.checkpoint)
            self._check_is_this_run(content)
            check_state_fits(self.model, content["model"], self.checkpoint)
            progress = _Progress(**content["progress"])
            if progress.step < self.total and not progress.stopped:
                self.optimizer.load_state_dict(content["optimizer"])
                self.scaler.load_state_dict(content.get("scaler") or {})
            if self.monitor is not None:
                self.monitor.load(content["monitor"])
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            self.observer.message(f"Starting over: {error}")
            return 0
        self.model.load_state_dict(content["model"])
        self.progress, self.resumed_rng = progress, content["rng"]
        self.observer.message(f"Going on from step {progress.step} of {self.total} ({self.checkpoint}).")
        return progress.step

    def _check_is_this_run(self, content: Mapping[str, Any]) -> None:
        saved = content["settings"]
        if not isinstance(saved, dict):
            raise TypeError("settings are not a dict")
        odd = sorted(k for k in self.settings.keys() | saved.keys() if self.settings.get(k) != saved.get(k))
        if not odd and not same_start(content["start"], self.start):
            odd = ["starting weights"]
        if odd:
            raise CheckpointError(
                f"a training checkpoint must be of the same run: {self.checkpoint} has other "
                f"{', '.join(odd)}, expected those of this call. Use another file to keep both."
            )

    def _settings(self) -> dict[str, str]:
        """Return what decides the result, as text: another value means another run."""
        groups = [
            {k: v for k, v in group.items() if k not in ("params", "initial_lr")}
            | {"shapes": [tuple(p.shape) for p in group["params"]]}
            for group in self.optimizer.param_groups
        ]
        settings = {
            "optimizer": type(self.optimizer).__qualname__,
            "parameter groups": groups,
            "loss": _name_of(self.loss),
            "steps": self.total,
            "schedule": (self.schedule, self.warmup),
            "grad_clip": self.grad_clip,
            "seed": self.seed,
            "autocast_dtype": self.autocast_dtype,
            "data length": length_of(self.data),
            "batch size": getattr(self.data, "batch_size", None),
            "data seed": getattr(self.data, "seed", None),
        }
        return {name: str(value) for name, value in settings.items()}


def _name_of(loss: object) -> str:
    """Return a text that stays the same from one process to the next, unlike a repr with an address."""
    name = getattr(loss, "fingerprint", None) or getattr(loss, "__qualname__", None)
    return str(name or type(loss).__qualname__)


def _cosine(step: int, total: int, warmup: float) -> float:
    rise = round(warmup * total)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def _onecycle(step: int, total: int, warmup: float) -> float:
    rise = _ONECYCLE_RISE * total
    if step < rise:
        return _ONECYCLE_START + (1 - _ONECYCLE_START) * 0.5 * (1 - math.cos(math.pi * step / rise))
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))


def _constant(step: int, total: int, warmup: float) -> float:
    return min(1.0, (step + 1) / (round(warmup * total) + 1))


_SCHEDULES: dict[str, Callable[[int, int, float], float]] = {
    "cosine": _cosine,
    "onecycle": _onecycle,
    "constant": _constant,
}


def _make_optimizer(
    model: nn.Module,
    optimizer: str | OptimizerFactory,
    param_groups: Sequence[dict[str, Any]] | None,
    lr: float,
    weight_decay: float,
    momentum: float,
) -> torch.optim.Optimizer:
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise KindError(
            f"a model must have something to train: {type(model).__name__} has no parameter that requires "
            "grad, expected at least one. Call model.requires_grad_()."
        )
    # The fused update reads and writes each number once; on the CPU too it is several times as fast.
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in params)
    if callable(optimizer):
        return optimizer(param_groups or params, lr=lr)
    groups = param_groups or _decay_groups(params, weight_decay)
    if optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=fused)
    if optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=fused)
    raise KindError(
        f"an optimizer must be known: optimizer has {optimizer!r}, expected 'adamw', 'sgd' or a factory. "
        "Pass a torch.optim class for others."
    )


def _decay_groups(params: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    weights = [p for p in params if p.ndim >= 2]
    others = [p for p in params if p.ndim < 2]
    groups = [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _total_steps(data: Iterable[Any], epochs: int | None, steps: int | None) -> int:
    if (epochs is None) == (steps is None):
        raise KindError(
            f"a run must have one length: epochs has {epochs} and steps has {steps}, expected exactly one of "
            "them. Pass epochs=... or steps=..."
        )
    if steps is None and length_of(data) is None:
        raise DataError(
            f"data must have a length when epochs are counted: {type(data).__name__} has no len(), expected "
            "one. Pass steps=... instead."
        )
    total = steps if epochs is None else epochs * (length_of(data) or 0)
    assert total is not None
    if total < 0:
        raise KindError(
            f"a run cannot be shorter than nothing: {total} steps asked, expected 0 or more. Pass a positive length."
        )
    if total == 0 and (epochs or 0) > 0:
        raise _no_batches("fit")
    return total


def _check_options(schedule: str, warmup: float, autocast_dtype: torch.dtype | None) -> None:
    if schedule not in _SCHEDULES:
        raise KindError(
            f"a schedule must be known: schedule has {schedule!r}, expected one of {', '.join(_SCHEDULES)}. "
            "Choose one of these."
        )
    if not 0 <= warmup < 1:
        raise RankError(
            f"a share must lie between 0 and 1: warmup has {warmup}, expected [0, 1). "
            "Pass the share of the steps, such as 0.05."
        )
    if autocast_dtype not in (None, torch.bfloat16):
        raise KindError(
            f"mixed precision must do without loss scaling: autocast_dtype has {autocast_dtype}, expected "
            "torch.bfloat16 or None. Pass torch.bfloat16."
        )


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__name__}"
        raise KindError(
            f"a loss must give one number with a gradient: the loss has {found}, expected a scalar tensor "
            "that requires grad. Return the mean over the batch."
        )


def _no_batches(where: str) -> DataError:
    return DataError(
        f"data must give batches: {where} has none, expected at least one. Pass a re-iterable such as a list "
        "or a DataLoader, not an iterator that is used up."
    )


def _device_of(model: nn.Module) -> torch.device:
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
