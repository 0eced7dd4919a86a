"""From a train to a circuit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tensortrain.cores.scaling import work_dtype
from tensortrain.cores.tolerance import compute_dtype, default_eps
from tensortrain.errors import DataError, KindError, NonFiniteError, RankError, ShapeError
from tensortrain.models.checks import check_choice
from tensortrain.models.quantum.circuit import Circuit
from tensortrain.models.quantum.gates import Operation
from tensortrain.models.quantum.holographic import holographic
from tensortrain.models.quantum.shallow import shallow
from tensortrain.models.quantum.staircase import blocks_of, cores_of_blocks, staircase
from tensortrain.tensor import TensorTrain, dot

__all__ = ["circuit"]


def circuit(
    train: TensorTrain,
    *,
    kind: Literal["staircase", "holographic"] | str = "staircase",
    n_layers: int | None = None,
    n_sweeps: int = 0,
) -> Circuit:
    """A circuit that prepares, or samples, the state whose amplitudes are the entries of a train.

    Gates are ``rz``, ``ry`` and ``cx``. Bonds take ``q = ceil(log2 r)`` qubits, also where r is no power of two.

    Args:
        train: Modes of size 2, real or complex; normalised first. Mode 0 is the most significant qubit.
        kind: ``"staircase"``: site k is qubit k. ``"holographic"``: ``q + 1`` qubits; site k is measured into bit k,
            and its qubit used again.
        n_layers: Of a staircase: so many layers of two-qubit gates at most, which prepare the train about, see
            ``fidelity``; by default it is exact.
        n_sweeps: Through all gates of layers, after each that is added, in which every gate becomes the best one beside
            the others: a larger ``fidelity`` for time. It ends early when a sweep gains nothing.

    Returns:
        Circuit: ``n_qubits``, ``n_gates``, ``n_cnots``, ``depth``, ``fidelity``; ``to_qasm``, ``statevector``,
        ``sample``.

    Raises:
        KindError: It is no train, or the kind is not known, or has no layers.
        ShapeError: Some modes are not 2, or there is a batch axis.
        DataError: The train is zero.

    Cost: for every site a few 4^q gates: at most 2, 15, 77 cx for q = 1, 2, 3.

    Source: Schoen et al. 2005; Shende, Bullock and Markov 2006 (gates); Ran 2020 (layers); Evenbly
        and Vidal 2009 (sweeps).

    Example:
        >>> found = tensortrain.quantum.circuit(tensortrain.ones((2, 2, 2)))
        >>> found.n_qubits, found.n_cnots, round(found.fidelity, 12)
        (3, 0, 1.0)
    """
    check_choice(kind, ("staircase", "holographic"), "kind")
    if n_layers is not None and kind != "staircase":
        raise KindError("layers must be those of a staircase: kind is 'holographic'. Leave n_layers out.")
    if n_layers is not None and (not isinstance(n_layers, int) or n_layers < 0):
        raise RankError(f"layers must be counted: n_layers has {n_layers!r}, expected a whole number from 0. Pass one.")
    if not isinstance(n_sweeps, int) or n_sweeps < 0 or (n_sweeps and n_layers is None):
        raise RankError(
            f"sweeps must be through layers: n_sweeps has {n_sweeps!r} with n_layers={n_layers}, expected a whole "
            "number from 0, and layers. Pass n_layers as well."
        )
    target = _normalised(train)
    if n_layers is not None:
        operations, cores = shallow(target.cores, n_layers, n_sweeps)
        return _told(target, operations, cores, target.order, 0)
    blocks = blocks_of(target.cores)
    cores = cores_of_blocks(blocks)
    if kind == "staircase":
        return _told(target, staircase(blocks), cores, target.order, 0)
    operations, n_qubits = holographic(blocks)
    return _told(target, operations, cores, n_qubits, target.order)


def _told(
    target: TensorTrain, operations: Sequence[Operation], cores: Sequence[Tensor], n_qubits: int, n_bits: int
) -> Circuit:
    state = TensorTrain(tuple(cores))
    overlap = float(dot(target.to(torch.complex128), state).abs())
    return Circuit(n_qubits, tuple(operations), n_bits, min(overlap, 1.0), state)


def _normalised(train: TensorTrain) -> TensorTrain:
    """In double precision, of norm 1 and without ranks that are not needed, on the CPU."""
    if not isinstance(train, TensorTrain):
        raise KindError(
            f"a circuit must be made from a train: train has a {type(train).__name__}, expected a TensorTrain. Pass "
            "TensorTrain.from_dense(x), or the state of a BornMachine."
        )
    if train.batch_shape or set(train.shape) != {2}:
        raise ShapeError(
            f"every site must be a qubit: train has shape {train.shape} and batch {train.batch_shape}, expected modes "
            "of 2 and no batch. Split modes that are powers of two with train.reshape((2,) * n)."
        )
    wide = compute_dtype(work_dtype(train.dtype))
    cores = [core.detach().to("cpu", wide) for core in train.cores]
    if not all(bool(torch.isfinite(core).all()) for core in cores):
        raise NonFiniteError("a state must be finite: train has NaN or Inf, expected numbers. Build it anew.")
    found = TensorTrain(tuple(cores))
    if not bool(torch.isfinite(found.log_norm())):
        raise DataError("a state must have a norm: train is zero, expected some entry that is not. Build it anew.")
    return found.normalize().round(eps=default_eps(train.dtype, train.order)).normalize()
