"""Run by itself: how much memory a compression in place takes, of a model that is large to the library."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression.choose import candidates
from tensortrain.compression.survey import calibrate, fisher
from tensortrain.formats import weighted_rank, weighting
from tensortrain.system import finite, parking

N_WORDS, WIDTH, HIDDEN, N_BLOCKS = 6144, 384, 1024, 8


# What is large, and what is done at once, is smaller here as the model is smaller than those that it stands for.
SMALLER: dict[Any, dict[str, int]] = {
    parking: {"LARGE_BYTES": 2**20, "_HELD_BYTES": 2**20, "_OWN_MAP_BYTES": 2**17, "_WORTH_THE_PAGES": 2**20},
    calibrate: {"_HELD_BYTES": 2**20},
    candidates: {"_LARGE_WEIGHT": 2**18},
    fisher: {"_DOUBLES_AT_ONCE": 2**15},
    finite: {"_AT_ONCE": 2**17},
    weighted_rank: {"_AT_ONCE": 2**16},
    weighting: {"_AT_ONCE": 2**16},
}


class Block(nn.Module):
    """Gated units beside a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(self.norm(x))
        return x + y + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A tied table around some blocks."""

    def __init__(self, n_words: int = N_WORDS, n_blocks: int = N_BLOCKS) -> None:
        super().__init__()
        self.table = nn.Embedding(n_words, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(n_blocks)))
        self.head = nn.Linear(WIDTH, n_words, bias=False)
        self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.table(input_ids)))
        return logits


class Peaks:
    """An observer that notes the highest resident memory of every stage."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.name = "before"
        reset_peak()

    def _close(self, name: str) -> None:
        self.peaks[self.name] = max(self.peaks.get(self.name, 0), resident("VmHWM"))
        self.name = name
        reset_peak()

    def on_start(self, name: str, total: int | None) -> None:
        self._close(name)

    def on_step(self, n: int, **figures: float) -> None: ...

    def on_end(self) -> None:
        self._close(f"after {self.name}")

    def message(self, text: str) -> None: ...


def resident(figure: str) -> int:
    """Bytes, as Linux tells them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{figure}:"))


def reset_peak() -> None:
    """The highest so far is the present one."""
    Path("/proc/self/clear_refs").write_text("5")


def compressed(model: nn.Module, n_words: int) -> Peaks:
    """The peaks of a compression in place."""
    ids = torch.randint(n_words, (3, 1, 48), generator=torch.Generator().manual_seed(0))
    observer = Peaks()
    options: dict[str, Any] = {"heal": False, "inplace": True, "observer": observer}
    tt.compress(model, budget="1.5x", data=[{"input_ids": each} for each in ids], **options)
    observer.on_end()
    return observer


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with contextlib.ExitStack() as stack:
        for module, values in SMALLER.items():
            stack.enter_context(mock.patch.multiple(module, **values))
        compressed(Decoder(256, 1), 256)  # loads what is loaded once
        gc.collect()
        parking.tidy()
        before = resident("VmRSS")
        model = Decoder()
        n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        found = compressed(model, N_WORDS)
    shares = {name: (peak - before) / n_bytes for name, peak in found.peaks.items()}
    json.dump({"n_bytes": n_bytes, "shares": shares}, sys.stdout)


if __name__ == "__main__":
    main()
