"""The exception family: every error is a ``TTError`` and the built-in that a caller would catch.

Messages read: what must hold: where has what was found, expected what. What to do.
"""

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ConvergenceError",
    "DTypeError",
    "DataError",
    "DerivedWeightError",
    "DeviceError",
    "DiskError",
    "FilterError",
    "KernelBuildError",
    "KindError",
    "ModeIndexError",
    "NonFiniteError",
    "OptionalDependencyError",
    "ProcessError",
    "RankError",
    "ShapeError",
    "TTError",
]


class TTError(Exception):
    """Base of all errors raised on purpose by tensortrain."""


class ShapeError(TTError, ValueError):
    """Sizes that do not fit together: cores, modes, inputs."""


class RankError(TTError, ValueError):
    """A rank, share or tolerance outside its range."""


class NonFiniteError(TTError, ValueError):
    """NaN or Inf where finite numbers are needed."""


class DerivedWeightError(TTError, RuntimeError):
    """A write to the dense weight of a factorized layer, which is made from its cores."""


class DeviceError(TTError, ValueError):
    """Tensors of one object on different devices."""


class DTypeError(TTError, TypeError):
    """Tensors of one object with different or unusable dtypes."""


class KindError(TTError, TypeError, ValueError):
    """An operand of a kind that the operation does not take, or an option of no known name."""


class ModeIndexError(TTError, IndexError):
    """An index outside its mode, or too many indices."""


class BudgetError(TTError, ValueError):
    """A compression budget that cannot be read or cannot be met."""


class FilterError(TTError, ValueError):
    """An include or exclude pattern that matches no layer."""


class CheckpointError(TTError, ValueError):
    """A checkpoint that is truncated, edited, or does not fit the model."""


class DiskError(CheckpointError, OSError):
    """A disk that is full, a folder that cannot be written: ``errno`` tells which."""


class DataError(TTError, ValueError):
    """A data set that is missing, damaged, or of the wrong form."""


class ConvergenceError(TTError, RuntimeError):
    """A factorization that failed to converge after every fallback."""


class OptionalDependencyError(TTError, ImportError):
    """A feature that needs an extra which is not installed."""


class KernelBuildError(TTError, RuntimeError):
    """The kernels could not be compiled on this machine."""


class ProcessError(TTError, RuntimeError):
    """Another one of the processes that work together has failed.

    Attributes:
        rank: Which one.
        kind, text: The class and the words of its error.
    """

    def __init__(self, message: str = "", rank: int = 0, kind: str = "", text: str = "") -> None:
        super().__init__(message, rank, kind, text)
        self.rank, self.kind, self.text = rank, kind, text

    def __str__(self) -> str:
        return str(self.args[0])
