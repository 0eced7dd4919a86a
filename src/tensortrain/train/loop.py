"""One training loop for all that learns by steps, which goes on after a kill to the same result.

Dense networks, healing and tensor-network models call ``fit``: what is learnt is in the loss, which takes any model and
any batch, with labels or without.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.errors import CheckpointError, KindError, NonFiniteError
from tensortrain.system.checkpoint import RunFile, start_signature
from tensortrain.system.history import History
from tensortrain.system.observer import Observer, Silent
from tensortrain.system.processes import gathered, together
from tensortrain.system.seeds import seed_all
from tensortrain.train.batches import device_of, length_of, no_batches, opened, to_device
from tensortrain.train.evaluation import Evaluate
from tensortrain.train.joined import mean_gradients_, same_numbers_
from tensortrain.train.losses import Loss
from tensortrain.train.masters import float32_masters
from tensortrain.train.modes import TrainModes, modes_kept
from tensortrain.train.optimizers import OptimizerFactory, OptimizerName, make_optimizer
from tensortrain.train.options import FitOptions, Monitor, total_steps
from tensortrain.train.schedules import SCHEDULES, ScheduleName
from tensortrain.train.state import (
    Progress,
    check_state_fits,
    loader_parts,
    rng_state,
    set_rng_state,
)

__all__ = ["FitResult", "fit"]

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

    history: list[dict[str, Any]]
    steps: int
    seconds: float
    resumed_from: int = 0
    notes: tuple[str, ...] = ()

    @property
    def figures(self) -> History:
        """The history read by name: ``result.figures.loss`` is the list of the losses."""
        return History.from_rows(self.history)


def fit(
    model: nn.Module,
    data: Iterable[Any],
    *,
    loss: Loss,
    epochs: int | None = None,
    steps: int | None = None,
    optimizer: OptimizerName | OptimizerFactory = "adamw",
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
    joined: bool = False,
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
        loss: ``(model, batch) -> scalar tensor``; it does the forward pass. None passes the batch over. Its
            ``fingerprint``, or its name, tells a checkpoint of another loss.
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
        evaluate: ``model -> figure or dict of figures``, called in eval mode after each epoch. A figure is a number,
            or a tuple of numbers such as ranks.
        checkpoint: File to keep the state in.
        checkpoint_every_s: Least time between two writes, in seconds; the end of the run always writes.
        seed: Seeds torch for this run and puts the caller's generators back; None leaves them as they are.
        observer: Gets the progress.
        autocast_dtype: ``torch.bfloat16`` for mixed precision.
        label: What the observer is told that this work is.
        monitor: Looks at the model now and then; errors and Ctrl-C then end the run without being raised.
        joined: Of several processes of ``torch.distributed``, each with data of its own, all take the same steps along
            the mean of their gradients; the model is that of the first one at the start.

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
    options = FitOptions(
        epochs=epochs,
        steps=steps,
        optimizer=optimizer,
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        schedule=schedule,
        warmup=warmup,
        grad_clip=grad_clip,
        param_groups=param_groups,
        evaluate=evaluate,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        checkpoint_every_s=checkpoint_every_s,
        seed=seed,
        observer=observer or Silent(),
        autocast_dtype=autocast_dtype,
        label=label,
        monitor=monitor,
        joined=joined,
    )
    return _fit(model, data, loss, options)


def _fit(model: nn.Module, data: Iterable[Any], loss: Loss, options: FitOptions) -> FitResult:
    with together(options.joined):
        total = total_steps(data, options.epochs, options.steps)
        if options.joined:
            total = min(gathered(total))
            same_numbers_(model)
        with torch.inference_mode(False), torch.enable_grad(), float32_masters(model) as low_dtype:
            trainer = _Trainer(model, data, loss, options, total, options.autocast_dtype or low_dtype)
            with _seeded(options.seed, trainer.device), modes_kept(model):
                return trainer.run()


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_all(seed)
        yield


@dataclass
class _Trainer:
    model: nn.Module
    data: Iterable[Any]
    loss: Loss
    options: FitOptions
    total: int
    autocast_dtype: torch.dtype | None

    def __post_init__(self) -> None:
        options = self.options
        self.optimizer = make_optimizer(
            self.model,
            options.optimizer,
            options.param_groups,
            lr=options.lr,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
        )
        self.observer, self.monitor = options.observer, options.monitor
        self.device = device_of(self.model)
        self.modes = TrainModes(self.model)
        half = self.autocast_dtype is torch.float16  # whose small gradients would vanish
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.progress = Progress()
        self.resumed_rng: dict[str, Any] | None = None
        self.epoch_rng: dict[str, Any] = {}
        self.unsettled: list[tuple[int, Tensor]] = []
        self.last_loss = math.nan
        self.steps_between_syncs = 1 if self.device.type == "cpu" else _STEPS_BETWEEN_SYNCS
        self.file = self._file()
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def run(self) -> FitResult:
        resumed_from = self._resume()
        self.observer.on_start(self.options.label, self.total)
        self.mark = time.perf_counter()
        if self.file is not None:
            self.file.written_at = self.mark
        try:
            with together(self.options.joined):
                self._run_epochs()
        except (Exception, KeyboardInterrupt) as error:
            if self.monitor is None:  # nobody takes it
                raise
            self.monitor.failed(error, self.progress.step)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            self.observer.on_end()
        done = self.progress
        return FitResult(done.history.rows(), done.step, done.seconds, resumed_from)

    def _run_epochs(self) -> None:
        while not self._has_ended():
            self.modes.set()
            self._run_epoch()
            self._end_epoch()

    def _has_ended(self) -> bool:
        return self.progress.step >= self.total or self.progress.stopped

    def _run_epoch(self) -> None:
        with self._batches() as batches:
            for batch in batches:
                self._step(to_device(batch, self.device))
                self._let_monitor_look()
                if self._has_ended():
                    break
                if self._due():
                    self._save()
        if self.progress.step_in_epoch == 0:
            raise no_batches(f"epoch {self.progress.epoch}")

    def _let_monitor_look(self) -> None:
        if self.monitor is not None and self.monitor.due(self.progress.step, self.total):
            self._settle()
            with self._autocast():
                self.progress.stopped = self.monitor.look(self.model, self.progress.step)

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
        if loss is not None or self.options.joined:
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

    def _learn(self, loss: Tensor | None) -> None:
        if loss is not None:
            _check_loss(loss)
            self.unsettled.append((self.progress.step, loss.detach().reshape(())))
            if len(self.unsettled) >= self.steps_between_syncs:
                self._settle()
            self.scaler.scale(loss).backward()
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.options.joined:
            mean_gradients_(params, counts=loss is not None)
        self.scaler.unscale_(self.optimizer)
        if self.options.grad_clip is not None:
            nn.utils.clip_grad_norm_(params, self.options.grad_clip)
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
        kept = f" The checkpoint {self.file.path} is as before." if self.file else ""
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
        done.history.append(**row | {"seconds": done.seconds})
        done.epoch, done.step_in_epoch, done.loss_sum, done.n_losses = done.epoch + 1, 0, 0.0, 0
        if self._has_ended() or self._due():
            self._save()

    def _figures(self) -> dict[str, Any]:
        if self.options.evaluate is None:
            return {}
        with torch.no_grad(), self._autocast():
            self.model.eval()
            figures = self.options.evaluate(self.model)
        named = figures if isinstance(figures, Mapping) else {"metric": figures}
        return {name: figure if isinstance(figure, tuple) else float(figure) for name, figure in named.items()}

    def _set_lr(self) -> None:
        share = SCHEDULES[self.options.schedule](self.progress.step, self.total, self.options.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share

    def _lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self.mark
        self.mark = now

    # -- what a kill leaves

    def _due(self) -> bool:
        return self.file is not None and self.file.due()

    def _save(self) -> None:
        if self.file is None:
            return
        self._settle()
        self._count_time()
        try:
            self.file.write(self._content())
        except (OSError, CheckpointError) as error:
            if self.monitor is None:
                raise
            self.monitor.unsaved(error, self.progress.step)
            self.file = None

    def _content(self) -> dict[str, Any]:
        now = rng_state(self.data, self.device)
        return {
            "progress": self.progress.to_state(),
            "model": self.model.state_dict(),
            "optimizer": None if self._has_ended() else self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "monitor": None if self.monitor is None else self.monitor.state(),
            "rng": {"now": now, "epoch": self.epoch_rng if self.progress.step_in_epoch else now},
        }

    def _resume(self) -> int:
        """Take over the checkpoint if it is this run's; return the step it was at."""
        if self.file is None or not self.file.path.exists():
            return 0
        try:
            content = self.file.read()
            check_state_fits(self.model, content["model"], self.file.path)
            progress = Progress.from_state(content["progress"])
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
        self.observer.message(f"Going on from step {progress.step} of {self.total} ({self.file.path}).")
        return progress.step

    def _file(self) -> RunFile | None:
        """The run's checkpoint, with what decides its result."""
        options = self.options
        if options.checkpoint is None:
            return None
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
            "schedule": (options.schedule, options.warmup),
            "grad_clip": options.grad_clip,
            "seed": options.seed,
            "autocast_dtype": self.autocast_dtype,
            "data length": length_of(self.data),
            "batch size": getattr(self.data, "batch_size", None),
            "data seed": getattr(self.data, "seed", None),
        }
        start = start_signature(self.model.state_dict().values())
        return RunFile(options.checkpoint, options.checkpoint_every_s, settings, start)


def _name_of(loss: object) -> str:
    """Return a text that stays the same from one process to the next, unlike a repr with an address."""
    name = getattr(loss, "fingerprint", None) or getattr(loss, "__qualname__", None)
    return str(name or type(loss).__qualname__)


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__name__}"
        raise KindError(
            f"a loss must give one number with a gradient: the loss has {found}, expected a scalar tensor "
            "that requires grad. Return the mean over the batch."
        )
