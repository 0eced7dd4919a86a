"""The layers that are timed, every plan of a layer, and the floor of its time.

The floor is ``max(bytes / bandwidth, flops / GEMM rate)`` with both rates measured in the same run: bytes of input,
cores and output (and of their gradients in training), flops of the leanest plan there is, the dense one included.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import torch

import tensortrain as tt
from tensortrain.contract import (
    Chain,
    ContractionPlan,
    CostModel,
    cost_model,
)
from tensortrain.contract.chain_plan import Direction

# Not public: a plan cannot be asked for by its merges and forms.
from tensortrain.contract.price_chain import ChainPricer, Path
from tensortrain.system import (
    native as kernels,
)

__all__ = ["FIXED", "GRID", "PHASES", "Case", "every_plan", "floor", "plan_key"]

INFERENCE, TRAINING = PHASES = ("inference", "training step")
Modes = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One layer and batch size.

    Attributes:
        targets: Least speed over ``nn.Linear`` in each phase.
    """

    in_modes: Modes
    out_modes: Modes
    rank: int
    batch: int
    targets: dict[str, float] = field(default_factory=dict, compare=False)

    @property
    def layer_name(self) -> str:
        return (
            f"{prod(self.in_modes)} -> {prod(self.out_modes)}, {_brief(self.in_modes, self.out_modes)}, r {self.rank}"
        )

    @property
    def name(self) -> str:
        return f"{self.layer_name}, b {self.batch}"

    def build(self, implementation: str = "auto") -> tt.nn.Linear:
        """The public layer; ranks beyond what the modes allow are clipped."""
        return tt.nn.Linear(
            prod(self.in_modes),
            prod(self.out_modes),
            in_modes=self.in_modes,
            out_modes=self.out_modes,
            rank=self.rank,
            implementation=implementation,  # type: ignore[arg-type]
            dtype=torch.float32,
        )


def _brief(in_modes: Modes, out_modes: Modes) -> str:
    both = [
        f"{modes[0]}^{len(modes)}" if len(set(modes)) == 1 else "x".join(map(str, modes))
        for modes in (in_modes, out_modes)
    ]
    return f"({both[0]} -> {both[1]})"


def _fixed() -> Iterator[Case]:
    """The layers of the papers with targets of their own."""
    vgg = ((2, 7, 8, 8, 7, 4), (4, 4, 4, 4, 4, 4), 4)
    fc = ((8, 20, 20, 18), (4, 4, 4, 4), 4)
    square = ((16, 16, 16), (16, 16, 16), 16)
    targets: tuple[tuple[tuple[Modes, Modes, int], int, float, float], ...] = (
        (vgg, 1, 100, 200),
        (vgg, 100, 20, 18),
        (fc, 1, 12, 30),
        (fc, 100, 3.5, 3),
        (square, 1, 10, 35),
        (square, 100, 1.1, 1),
    )
    for layer, batch, inference, training in targets:
        yield Case(*layer, batch, {INFERENCE: inference, TRAINING: training})


GRID_SEED, GRID_SIZE = 0, 40
GRID_TARGETS = {INFERENCE: 0.95, TRAINING: 0.5}
_WIDTHS = (10, 16, 64, 100, 128, 256, 300, 384, 512, 625, 768, 784, 1000, 1024, 1536, 2048, 2304, 3072, 4096)
_RANKS = (2, 4, 8, 16, 32)
_BATCHES = tuple(2**k for k in range(11))


def _grid() -> Iterator[Case]:
    """Seven layers known to be hard, and others drawn from a fixed seed."""
    wide: tuple[Modes, Modes] = ((4, 8, 8, 4), (4, 8, 8, 4))
    up: tuple[Modes, Modes] = ((8, 8, 12), (12, 16, 16))
    yield Case((4, 4), (2, 5), 4, 32, GRID_TARGETS)  # 16 -> 10
    for (in_modes, out_modes), rank in ((wide, 8), (wide, 32), (up, 32)):
        for batch in (1, 100):
            yield Case(in_modes, out_modes, rank, batch, GRID_TARGETS)
    draw = random.Random(GRID_SEED)
    for _ in range(GRID_SIZE - 7):
        in_features, out_features = draw.choice(_WIDTHS), draw.choice(_WIDTHS)
        order = draw.randint(2, 4)
        in_modes = tt.nn.suggest_modes(in_features, order)
        out_modes = tt.nn.suggest_modes(out_features, order)[::-1]
        yield Case(in_modes, out_modes, draw.choice(_RANKS), draw.choice(_BATCHES), GRID_TARGETS)


FIXED = tuple(_fixed())
GRID = tuple(_grid())


# -- plans --------------------------------------------------------------------------------------------


def every_plan(
    chain: Chain, batch: int, training: bool, dtype: torch.dtype = torch.float32, model: CostModel | None = None
) -> Iterator[ContractionPlan]:
    """Both sweeps with all merges of neighbours in all forms, and the dense weight."""
    measured = cost_model("cpu") if model is None else model
    pricer = ChainPricer(chain, batch, dtype, "cpu", training, measured, by_kernels=kernels.library() is not None)
    yield pricer.dense()
    directions: tuple[Direction, ...] = ("left-to-right", "right-to-left")
    for direction in directions:
        for path in _paths(pricer, direction, 0, Path(0.0, (), 0, False)):
            yield pricer.finish(direction, path)


def _paths(pricer: ChainPricer, direction: Direction, done: int, path: Path) -> Iterator[Path]:
    """All ways to go on after ``done`` cores."""
    order = pricer.shape.order
    if done == order:
        seconds = path.seconds + pricer.copy_s(path.pending_bytes)
        yield Path(seconds, path.steps, 0, path.has_merge)
        return
    for stop in range(done + 1, order + 1):
        if stop - done == order > 1:
            continue  # all cores merged is the dense weight
        span = (done, stop) if direction == "left-to-right" else (order - stop, order - done)
        for step in pricer.steps(direction, *span, path.pending_bytes):
            pending = 2 * step.state_bytes if step.kind == "copied" else 0
            has_merge = path.has_merge or stop - done > 1
            longer = Path(path.seconds + step.predicted_s, (*path.steps, step), pending, has_merge)
            yield from _paths(pricer, direction, stop, longer)


def plan_key(plan: ContractionPlan) -> str:
    """Tells plans of one layer apart, such as ``"right-to-left [0][1 2] linear batched"``."""
    if plan.uses_dense:
        return "dense"
    merged = "".join("[" + " ".join(map(str, range(*group))) + "]" for group in plan.groups)
    return " ".join((str(plan.direction), merged, *(step.kind for step in plan.steps)))


def floor(chain: Chain, batch: int, training: bool) -> tuple[int, int]:
    """Bytes that must move, and flops of the leanest plan."""
    numel = batch * (chain.in_features + chain.out_features) + chain.n_params
    flops = min(plan.flops for plan in every_plan(chain, batch, training))
    return 4 * numel * (2 if training else 1), flops
