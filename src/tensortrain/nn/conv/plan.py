"""How a factorized layer that is no plain chain runs, and what that is predicted to cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tensortrain.nn.conv.options import ConvOptions
from tensortrain.nn.conv.ways import Way

__all__ = ["ConvPlan", "LookupPlan"]


@dataclass(frozen=True)
class ConvPlan:
    """Either the dense kernel (rebuilt, kept while the cores do not change) or core by core.

    Attributes:
        is_measured: Whether the seconds were measured on this machine; else they are predicted.
        way: What runs.
        options: Of the convolution.
        key: What the layer keeps the plan under.
    """

    kind: str
    batch: int
    spatial: tuple[int, ...]
    factorized_flops: int
    dense_flops: int
    factorized_s: float
    dense_s: float
    peak_bytes: int
    is_measured: bool = False
    way: Way | None = field(default=None, compare=False, repr=False)
    options: ConvOptions | None = field(default=None, compare=False, repr=False)
    key: Any = field(default=None, compare=False, repr=False)

    @property
    def uses_dense(self) -> bool:
        return self.kind == "dense"

    @property
    def predicted_s(self) -> float:
        return self.dense_s if self.uses_dense else self.factorized_s

    @property
    def flops(self) -> int:
        return self.dense_flops if self.uses_dense else self.factorized_flops

    @property
    def words(self) -> str:
        """How the layer runs, in a few words."""
        if self.way is None:
            return "dense, kept" if self.uses_dense else "core by core"
        return self.way.words

    def __str__(self) -> str:
        how = "the dense kernel, kept" if self.uses_dense else self.words
        told = "measured " if self.is_measured else "predicted"
        return "\n".join(
            [
                f"Convolution of {self.batch} x {'x'.join(map(str, self.spatial))}: {how}",
                f"  flops      {self.flops:,} (dense {self.dense_flops:,})",
                f"  {told}  {self.predicted_s * 1e6:,.0f} us (dense {self.dense_s * 1e6:,.0f} us, "
                f"core by core {self.factorized_s * 1e6:,.0f} us)",
                f"  peak       {self.peak_bytes:,} bytes between the steps",
            ]
        )


@dataclass(frozen=True)
class LookupPlan:
    """Either rows of a dense table or rows multiplied together from the cores."""

    kind: str
    n_ids: int
    flops: int
    row_bytes: int
    factorized_s: float
    dense_s: float

    @property
    def uses_dense(self) -> bool:
        return self.kind == "dense"

    @property
    def predicted_s(self) -> float:
        return self.dense_s if self.uses_dense else self.factorized_s

    def __str__(self) -> str:
        how = "rows of the dense table, kept" if self.uses_dense else "rows from the cores, repeated ids once"
        return "\n".join(
            [
                f"Lookup of {self.n_ids} ids: {how}",
                f"  flops      {self.flops:,}",
                f"  predicted  {self.predicted_s * 1e6:,.0f} us (dense {self.dense_s * 1e6:,.0f} us)",
                f"  output     {self.row_bytes:,} bytes",
            ]
        )


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Positions along one axis after a convolution."""
    return max(0, (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)


def transposed_out_size(size: int, kernel: int, stride: int, padding: int, dilation: int, output_padding: int) -> int:
    """Positions along one axis after a transposed convolution."""
    return (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1 + output_padding
