"""What ``compress`` is asked for: its options as one record, checked before anything is done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tensortrain.compression.choose.options import PlanOptions
from tensortrain.errors import CheckpointError, DataError, KindError

__all__ = ["CompressOptions"]


@dataclass(frozen=True, kw_only=True)
class CompressOptions(PlanOptions):
    """The keywords of ``compress``, which explains them, but for those that say what the stages are."""

    metric_name: str = "metric"
    inplace: bool = False
    checkpoint: str | Path | None = None
    measure: bool = True
    seed: int | None = 0
    name: str | None = None

    def __post_init__(self) -> None:
        _check_data(self.data)
        _check_checkpoint(self.checkpoint)
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool)):
            raise KindError(f"a seed must be a whole number: found {self.seed!r}, expected an int or None. Pass 0.")
        super().__post_init__()


def _check_data(data: object) -> None:
    if data is not None and not isinstance(data, Iterable):
        raise DataError(
            f"data must give batches: found {type(data).__name__}, expected a list, a DataLoader or another iterable. "
            "Pass one."
        )


def _check_checkpoint(checkpoint: object) -> None:
    if checkpoint is not None and (not isinstance(checkpoint, (str, Path)) or Path(checkpoint).is_dir()):
        raise CheckpointError(
            f"a training checkpoint must be a file: checkpoint has {checkpoint!r}, expected the path of a file. "
            "Name one inside the folder."
        )
