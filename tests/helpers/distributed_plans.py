"""Plans, compressions and trainings of several processes that each see a part of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fresh
import torch
from small_models import ConvNet, Tagger, batches, decay_, mlp
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression import CompressionPlan, alone, plan_compression
from tensortrain.compression.stages import Factorize, HealLocally, Refit
from tensortrain.train.loop import fit
from tensortrain.train.losses import cross_entropy_loss

N_BATCHES = 6


class Experts(nn.Module):
    """Two layers of which every batch meets one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(16, 24), nn.Linear(16, 24)])
        self.head = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.experts[int(x.flatten()[0] > 0)](x)))


def tagged() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(60, (4, 9), generator=generator) for _ in range(N_BATCHES)]
    return [{"input_ids": each, "attention_mask": (each > 5).long()} for each in ids]


def for_experts(n_rows: int = 5) -> list[Tensor]:
    """Batches of which the first process's meet one of them, those of the second process the other."""
    generator = torch.Generator().manual_seed(6)
    found = [torch.randn(n_rows, 16, generator=generator, dtype=torch.float64) for _ in range(N_BATCHES)]
    for k, batch in enumerate(found):
        batch[0, 0] = 1.0 if k % 2 else -1.0
    return found


CASES: dict[str, tuple[Any, Any]] = {
    "units": (lambda: mlp(20, 48, 40, 6), lambda: batches(N_BATCHES, 9, 20)),
    "convolutions": (ConvNet, lambda: batches(N_BATCHES, 5, 3, 8, 8)),
    "texts": (Tagger, tagged),
    "experts": (Experts, for_experts),
}


def made(case: str) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    build, data = CASES[case]
    return decay_(build()), data()


def planned(case: str, rank: int = 0, n: int = 1, **keywords: Any) -> CompressionPlan:
    model, data = made(case)
    return plan_compression(model, budget="1.5x", data=data[rank::n], **keywords)


def whole_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(8, 12, generator=generator, dtype=torch.float64),
            torch.randint(5, (8,), generator=generator),
        )
        for _ in range(5)
    ]


def trained(rank: int = 0, n: int = 1, **keywords: Any) -> dict[str, Tensor]:
    torch.manual_seed(rank)  # the first process's model counts
    model = mlp(12, 9, 5)
    data = [(x[rank::n], y[rank::n]) for x, y in whole_batches()]
    fit(model, data, loss=cross_entropy_loss(), epochs=2, lr=0.05, optimizer="sgd", grad_clip=1.0, **keywords)
    return model.state_dict()


# Of spectra that do not fall off: there is much to mend.
FIT_CASES: dict[str, tuple[Any, Any]] = {
    "units": (lambda: mlp(20, 24, 20, 6), lambda: batches(N_BATCHES, 120, 20)),
    "convolutions": (ConvNet, CASES["convolutions"][1]),
    "texts": CASES["texts"],
    "experts": (Experts, lambda: for_experts(80)),
}
FITS: dict[str, tuple[str, Any]] = {
    "refit of units": ("units", Refit(n_batches=4, n_held_back=2)),
    "refit of texts": ("texts", Refit(n_batches=5, n_held_back=1)),
    "refit of what few batches meet": ("experts", Refit(n_batches=4, n_held_back=2)),
    "healing of units": ("units", HealLocally(lr=3e-3, steps=7, n_batches=4, n_held_back=2)),
    "healing of convolutions": ("convolutions", HealLocally(lr=3e-3, steps=5, n_batches=3, n_held_back=1)),
    "healing of texts": ("texts", HealLocally(lr=3e-3, steps=6, n_batches=5, n_held_back=1)),
    "healing of what few batches meet": ("experts", HealLocally(lr=3e-3, steps=6, n_batches=4, n_held_back=2)),
}


def fitted(name: str, rank: int = 0, n: int = 1) -> dict[str, Any]:
    """A model after a fit to the original's outputs, with the notes on it."""
    case, settings = FITS[name]
    build, batches_of = FIT_CASES[case]
    torch.manual_seed(0)
    model, data = build(), batches_of()
    found = tt.compress(
        model,
        budget="4x",
        data=data[rank::n],
        stages=[Factorize(), settings],
        formats=["low_rank"],
        measure=False,
    )
    return {"numbers": found.model.state_dict(), "notes": list(found.report.notes)}


def work_together(rank: int, n: int, folder: str, timeout_s: float) -> None:
    """What each process does; it saves what came out."""
    torch.set_default_dtype(torch.float64)
    with fresh.process_group(rank, n, folder, timeout_s):
        torch.save(_found(rank, n, Path(folder)), Path(folder) / f"{rank}.pt")


def _found(rank: int, n: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case in CASES:
        plan = planned(case, rank, n)
        assert plan.calibration is not None
        found[case] = {"plan": plan.to_json(), "grams": plan.calibration.grams, "rows": plan.calibration.calls}
        found[case]["output_grams"] = plan.calibration.output_grams
    found["kept"] = [planned("units", rank, n, work_dir=folder / "work").to_json() for _ in range(2)]
    found["trained"] = trained(rank, n, joined=True)
    found |= {name: fitted(name, rank, n) for name in FITS}
    model, data = made("convolutions")
    healed = tt.compress(model, budget="1.5x", data=data[rank::n], heal={"steps": 3}, measure=False)
    found["healed"] = healed.model.state_dict()
    found["losses"] = healed.report.healing
    if rank == 0:  # the other one is not asked
        with alone():
            found["alone"] = planned("units").to_json()
    return found
