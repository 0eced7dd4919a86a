"""Born machines: trains whose squared entries are the probabilities of strings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensortrain.errors import DataError, KindError
from tensortrain.models.base import TensorModel
from tensortrain.models.born_fit import BornFit
from tensortrain.models.checks import (
    chain_ranks,
    check_between,
    check_choice,
    checked_count,
    checked_dtype,
    checked_sizes,
    checked_values,
)
from tensortrain.models.distribution import BornDistribution
from tensortrain.models.from_samples import cores_from_samples
from tensortrain.models.laws import LAWS, Law
from tensortrain.models.lengths import checked_lengths, filled, is_ended, of_length, only_ended
from tensortrain.networks import register
from tensortrain.system.history import History
from tensortrain.tensor import TensorTrain

__all__ = ["BornMachine"]

Kind = Literal["real", "complex", "positive", "purified"]


@register("born-machine", needs_arguments=True)
class BornMachine(TensorModel):
    r"""A train as a law on strings: :math:`P(x) = |\psi(x)|^2 / Z`, whose sum :math:`Z` is exact.

    Every number that other models of densities estimate is computed here: likelihoods, marginals, conditionals,
    entropies; samples are exact and independent. Any parameters make a valid law.

    Args:
        n_sites: Length of the strings.
        n_values: Values of a site, ``0 .. n_values - 1``.
        bond_dim: Ranks between sites, one for all or ``n_sites - 1`` of them.
        kind: ``"real"`` and ``"complex"`` amplitudes; ``"positive"``: non-negative cores whose entries are the
            probabilities, a hidden Markov model; ``"purified"``: amplitudes with a second index at every site that is
            summed out.
        purification: Size of that index.
        variable_length: A law on strings of 0 to ``n_sites`` values, see ``lengths`` in the methods. Sites behind a
            string hold ``end``, one value more, and the law is that of ``n_sites`` sites with it under the condition
            that nothing follows an end; over all strings of all lengths it sums up to 1.
        generator: Of the first parameters: near the uniform law.
        device, dtype: As in torch; ``dtype`` is real for every kind.

    Shapes: strings ``(b, n_sites)`` int64; parameters ``cores`` of ``(r, n_values, s)``.

    Cost: O(b n_sites r^2) flops for ``log_prob``, O(n_sites r^3) for the sum, O(n r^2 n_sites) for n samples.

    Source: Han et al., Phys. Rev. X 8, 031012 (2018); Glasser et al., NeurIPS 2019, arXiv:1907.03741 (purified).

    Example:
        >>> model = BornMachine(4, bond_dim=2, generator=torch.Generator().manual_seed(0))
        >>> history = model.fit(torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]), n_sweeps=8)
        >>> round(history.nll[-1], 4), model.ranks  # ln 2: each string has one half
        (0.6931, (1, 2, 2, 2, 1))
    """

    def __init__(
        self,
        n_sites: int,
        n_values: int = 2,
        *,
        bond_dim: int | Sequence[int] = 2,
        kind: Kind | str = "real",
        purification: int = 2,
        variable_length: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice(kind, tuple(LAWS), "kind")
        dtype = checked_dtype(dtype)
        self.n_sites, self.n_values = checked_sizes(n_sites=n_sites, n_values=n_values)
        self.kind = str(kind)
        (purification,) = checked_sizes(purification=purification)
        self.purification = purification if kind == "purified" else 1
        self.variable_length = bool(variable_length)
        modes = [self._n_symbols * self.purification] * self.n_sites
        shapes = zip(chain_ranks(bond_dim, modes), modes, chain_ranks(bond_dim, modes)[1:], strict=False)
        made = [_near_uniform(*shape, generator, dtype, device) for shape in shapes]
        self._take([core.to(self._law.dtype(dtype)) for core in made])

    @classmethod
    def from_train(cls, x: TensorTrain, *, kind: Kind | str = "real", variable_length: bool = False) -> BornMachine:
        """The law of a train: of its squared moduli, or with ``kind="positive"`` of its entries.

        Args:
            x: Equal modes; for ``"positive"`` cores without negative entries.
            kind: As for the class.
            variable_length: Whether the last value of every mode is the end of a string.

        Raises:
            DataError: It has modes of several sizes, a negative core where none may be, or no law: zero, NaN.
            KindError: It is no train, or of whole numbers.
        """
        if not isinstance(x, TensorTrain) or not (x.dtype.is_floating_point or x.dtype.is_complex):
            found = x.dtype if isinstance(x, TensorTrain) else type(x).__name__
            raise KindError(
                f"a law is that of a train: x has {found}, expected a TensorTrain of floating numbers. Pass "
                "TensorTrain.from_dense(x)."
            )
        if len(set(x.shape)) != 1 or x.batch_shape:
            raise DataError(
                f"a Born machine has one alphabet: the train has modes {x.shape}, expected equal ones and no batch. "
                "Pad the modes with tensortrain.pad."
            )
        if kind == "positive" and any(core.is_complex() or bool((core < 0).any()) for core in x.cores):
            raise DataError("a hidden Markov model has no negative cores: the train has some. Use kind='real'.")
        if not math.isfinite(float(x.log_norm())):
            raise DataError(
                "a law must have a sum: the train is zero, or has NaN or Inf, expected finite numbers that are not "
                "all zero. Build it anew."
            )
        kind = "complex" if x.dtype.is_complex and kind == "real" else kind
        real = x.cores[0].real.dtype if x.dtype.is_complex else x.dtype
        n_values = x.shape[0] - bool(variable_length)
        options: dict[str, Any] = {"kind": kind, "purification": 1, "variable_length": variable_length}
        model = cls(len(x.shape), n_values, **options, dtype=real, device="meta")
        model._take(model._law.parameters([core.to(model._law.dtype(real)) for core in x.cores], x.shape[0]))
        return model

    @classmethod
    def from_samples(
        cls,
        x: Tensor,
        *,
        max_bond: int,
        n_values: int = 2,
        lengths: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> BornMachine:
        """A law from samples in one pass, without gradients, by the largest eigenvectors of reduced densities.

        Without a cut it is the empirical law; a small ``max_bond`` generalizes to strings with the same structure.

        Args:
            x: ``(b, n_sites)`` int64.
            max_bond: Cap on every rank, and what decides how much is memorized.
            n_values: Values of a site.
            lengths: ``(b,)`` int64, of strings of unequal length; what stands behind them is not read.
            dtype: Real, of the cores.

        Raises:
            DataError: ``x`` is empty or has values outside the alphabet.
            RankError: ``max_bond`` is below 1.

        Cost: O(b n_sites r) flops, and an eigenvalue problem of size ``n_values r`` for every site.
        Source: Bradley, Stoudenmire, Terilla, arXiv:1910.07425.

        Example:
            >>> even = torch.cartesian_prod(*[torch.arange(2)] * 6)
            >>> even = even[even.sum(1) % 2 == 0]
            >>> model = BornMachine.from_samples(even[torch.arange(16) * 5 % 32], max_bond=2)  # half of them
            >>> model.ranks
            (1, 2, 2, 2, 2, 2, 1)
        """
        n_sites = x.shape[1] if isinstance(x, Tensor) and x.ndim == 2 else 0
        is_open = lengths is not None
        if lengths is None:
            values = checked_values(x, n_sites, n_values)
        else:
            values = _filled(x, lengths, n_sites, n_values)
        if values.numel() == 0:
            raise DataError("a law from samples must have some: x has none, expected (b, n_sites) with b of 1 or more.")
        max_bond, n_values = checked_sizes(max_bond=max_bond, n_values=n_values)
        made = cores_from_samples(values, n_values + is_open, max_bond, checked_dtype(dtype))
        return cls.from_train(TensorTrain(tuple(made)), variable_length=is_open)

    @property
    def config(self) -> dict[str, Any]:
        return {
            "n_sites": self.n_sites,
            "n_values": self.n_values,
            "bond_dim": list(self.ranks),
            "kind": self.kind,
            "purification": self.purification,
            "variable_length": self.variable_length,
        }

    @property
    def ranks(self) -> tuple[int, ...]:
        """With a 1 at both ends."""
        return (1, *(core.shape[-1] for core in self.cores))

    @property
    def state(self) -> TensorTrain:
        """The train behind it: of norm 1, or for ``"positive"`` the probabilities up to a factor."""
        cores = [core.detach() for core in self._chain()]
        train = TensorTrain(tuple(cores))
        return train if self.kind == "positive" else train.normalize()

    def entropy(self, bond: int) -> Tensor:
        """Entanglement entropy, in nats, with ``bond`` sites to the left, ``1 .. n_sites - 1``."""
        return self.state.normalize().entropy(bond)

    @property
    def end(self) -> int | None:
        """What fills the sites behind a string of a law with ``variable_length``: ``n_values``."""
        return self.n_values if self.variable_length else None

    def lengths(self, x: Tensor) -> Tensor:
        """Lengths ``(b,)`` of strings ``(b, n_sites)`` that are filled with ``end``, such as samples."""
        return (
            checked_values(x, self.n_sites, self._n_symbols)
            .ne(self._n_symbols if self.end is None else self.end)
            .sum(1)
        )

    def log_prob(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logarithms of probabilities, in nats.

        Args:
            x: ``(b, n_sites)`` int64; of ``variable_length`` filled with ``end``.
            lengths: ``(b,)`` int64, of ``variable_length``: the strings are ``x[:, :length]``, of which there may be
                fewer than ``n_sites`` columns, and what stands behind them is not read.

        Returns:
            Tensor: ``(b,)``, differentiable in the cores; minus infinity where there is no mass, never NaN.

        Raises:
            DataError: ``x`` has another shape, or a value outside the alphabet.
        """
        return self._log_prob(self._values(x, lengths))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``log_prob(x, lengths)``."""
        return self.log_prob(x, lengths)

    def nll(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The mean of ``-log_prob(x, lengths)``, in nats."""
        return -self.log_prob(x, lengths).mean()

    def log_marginal(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logarithms of the probabilities of parts of strings.

        Args:
            x: ``(b, n_sites)`` int64, with -1 where a site is summed out.
            lengths: ``(b,)`` int64, of ``variable_length``: the strings have these lengths. Without them an open site
                may also be behind the end.

        Returns:
            Tensor: ``(b,)``, differentiable in the cores.

        Cost: O(b n_sites r^3) flops for amplitudes.
        """
        values = self._values(x, lengths, least=-1)
        if not bool((values < 0).any()):
            return self._log_prob(values)
        chain = self._chain()
        # Strings of one length need no further condition, and the chain without it has half the ranks.
        cores = chain if lengths is None else self._law.cores(list(self.cores))
        weight = self._law.log_sum(cores, values.to(cores[0].device), self._n_symbols, lengths)
        return _share(weight, self._law.log_total(chain))

    def length_log_probs(self) -> Tensor:
        """Logarithms of the probabilities of the lengths 0 .. ``n_sites``, ``(n_sites + 1,)``, in nats.

        Raises:
            KindError: All strings have one length.
        """
        self._check_variable("the law of lengths")
        lengths = torch.arange(self.n_sites + 1, device=self.cores[0].device)
        return self.log_marginal(torch.full((self.n_sites + 1, self.n_sites), -1, device=lengths.device), lengths)

    def sample(
        self,
        n: int,
        *,
        given: Tensor | None = None,
        lengths: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw exact, independent strings.

        Args:
            n: How many.
            given: ``(n_sites,)`` or ``(n, n_sites)`` int64: a condition, with -1 where a site is free.
            lengths: One or ``(n,)`` int64, of ``variable_length``: a condition too.
            generator: Of the random numbers.

        Returns:
            Tensor: ``(n, n_sites)`` int64; of ``variable_length`` filled with ``end``.

        Raises:
            DataError: The condition has probability zero, or a value outside the alphabet; ``n`` is negative.

        Cost: O(n n_sites r^2) flops; O(n n_sites r^3) where every sample has a condition of its own.
        """
        n = checked_count(n)
        if given is not None:
            rows = given if isinstance(given, Tensor) and given.ndim == 2 else _as_row(given)
            given = checked_values(rows, self.n_sites, self._n_symbols, least=-1, name="given")
            given = given.to(self.cores[0].device)
            if given.shape[0] not in (1, n):
                raise DataError(
                    f"a condition must be one for all samples or one each: given has {given.shape[0]} rows, expected 1 "
                    f"or {n}. Pass (n_sites,) or (n, n_sites)."
                )
        with torch.no_grad():
            if lengths is None:
                return self._law.sample(self._chain(), n, given, self._n_symbols, generator)
            return self._samples_of_lengths(n, given, lengths, generator)

    def fit(
        self,
        x: Tensor,
        *,
        lengths: Tensor | None = None,
        method: Literal["two-site", "adam"] | str | None = None,
        max_bond: int | None = None,
        cutoff: float = 1e-3,
        n_sweeps: int = 10,
        n_steps: int = 10,
        lr: float | None = None,
        batch_size: int | None = None,
        validation: Tensor | tuple[Tensor, Tensor] | None = None,
        patience: int | None = None,
        checkpoint: str | Path | None = None,
        observer: Callable[[History], object] | None = None,
        generator: torch.Generator | None = None,
    ) -> History:
        """Learn from strings, in place, by maximum likelihood.

        Args:
            x: ``(b, n_sites)`` int64, the training data.
            lengths: ``(b,)`` int64, of ``variable_length``, as for ``log_prob``.
            method: ``"two-site"`` (real and complex; the default there): sweeps there and back that improve two
                neighbouring sites at a time, and choose the ranks by singular values. ``"adam"``: all cores at once,
                at fixed ranks.
            max_bond: Cap on every rank, all along.
            cutoff: Of two-site sweeps: largest root-sum-square of the singular values that a split cuts, a share of
                the norm.
            n_sweeps: Sweeps, or passes over the data.
            n_steps: Of two-site sweeps: steps at every pair of sites.
            lr: Length of a step; 0.05 for two sites and 0.01 for Adam by default.
            batch_size: Of Adam; all of ``x`` by default.
            validation: Strings whose likelihood is watched, or these and their lengths.
            patience: End after so many sweeps in which ``validation`` did not get better.
            checkpoint: File with which the same call on the same starting model goes on after a kill, to equal bits.
            observer: Called with the history after every sweep; what it raises passes through.
            generator: Decides the order of batches.

        Returns:
            History: for every sweep ``nll`` and ``validation_nll``, means in nats, and ``ranks``.

        Raises:
            DataError: ``x`` is empty, or has values outside the alphabet.
            KindError: The method is not known, or not for this kind.
            RankError: An option outside its range.

        Source: Han et al. 2018, section III (two-site gradients; adaptive bonds).
        """
        data, held = self._strings(x, lengths), None
        if validation is not None:
            is_pair = isinstance(validation, (tuple, list)) and len(validation) == 2
            watched, their_lengths = validation if is_pair else (validation, None)
            held = self._strings(watched, their_lengths, "validation")
        method = method or ("two-site" if self._law.takes_sweeps else "adam")
        check_choice(method, ("two-site", "adam"), "method")
        if method == "two-site" and not self._law.takes_sweeps:
            raise KindError(
                f"two-site sweeps need amplitudes without a sum inside: kind has {self.kind!r}, expected 'real' or "
                "'complex'. Use method='adam'."
            )
        lr = {"two-site": 0.05, "adam": 0.01}[method] if lr is None else lr
        check_between(0.0, lr=lr)
        check_between(0.0, 1.0, cutoff=cutoff)
        (n_steps,) = checked_sizes(n_steps=n_steps)
        device = self.cores[0].device
        job = BornFit(
            self,
            data.to(device),
            None if held is None else held.to(device),
            max_bond=max_bond,
            n_sweeps=n_sweeps,
            patience=patience,
            checkpoint=None if checkpoint is None else Path(checkpoint),
            observer=observer,
            generator=generator,
        )
        if method == "adam":
            return job.by_adam(lr, batch_size)
        return job.by_sweeps(cutoff, n_steps, lr)

    def distribution(self) -> BornDistribution:
        """The law as one of ``torch.distributions``, with the present parameters."""
        return BornDistribution(self)

    @property
    def _law(self) -> Law:
        return LAWS[self.kind]

    def _take(self, parameters: Sequence[Tensor]) -> None:
        """Put parameters ``(r, n, s)``, or with a purification in the modes, in place of those there are."""
        if self._law.n_axes == 4 and parameters[0].ndim == 3:
            parameters = [core.unflatten(1, (self._n_symbols, self.purification)) for core in parameters]
        self.cores = nn.ParameterList([nn.Parameter(core) for core in parameters])

    @property
    def _n_symbols(self) -> int:
        """Values of a site, with the end."""
        return self.n_values + self.variable_length

    def _chain(self) -> list[Tensor]:
        """The chain of all strings that there are."""
        cores = self._law.cores(list(self.cores))
        return only_ended(cores, self.purification) if self.variable_length else cores

    def _log_prob(self, x: Tensor) -> Tensor:
        cores = self._law.cores(list(self.cores))
        x = x.to(cores[0].device)
        if self.kind == "purified":
            weight = self._law.log_sum(cores, x, self._n_symbols)
        else:
            weight = self._law.log_weight(cores, x)
        if not self.variable_length:
            return _share(weight, self._law.log_total(cores))
        log = _share(weight, self._law.log_total(self._chain()))
        return log.where(is_ended(x, self.n_values), -math.inf)

    def _values(
        self, x: Tensor, lengths: Tensor | None, *, least: int = 0, name: str = "x", is_possible: bool = False
    ) -> Tensor:
        """Strings ``(b, n_sites)`` of all symbols, checked; ``is_possible``: no value may follow an end."""
        if lengths is not None:
            self._check_variable("lengths")
            return _filled(x, lengths, self.n_sites, self.n_values, least, name)
        found = checked_values(x, self.n_sites, self._n_symbols, least=least, name=name)
        if is_possible and self.variable_length and not bool(is_ended(found, self.n_values).all()):
            raise DataError(
                f"nothing may follow the end of a string: {name} has values behind {self.end}, expected {self.end} "
                "alone. Fill what lies behind, or pass lengths=."
            )
        return found

    def _strings(self, x: Any, lengths: Tensor | None, name: str = "x") -> Tensor:
        """Strings to learn from, or to watch."""
        found = self._values(x, lengths, name=name, is_possible=True)
        if found.shape[0] == 0:
            raise DataError(f"a fit must have data: {name} has no strings, expected one or more. Pass (b, n_sites).")
        return found

    def _check_variable(self, what: str) -> None:
        if not self.variable_length:
            raise KindError(
                f"{what} must have strings of unequal length: the model has {self.n_sites} sites in all of them, "
                "expected variable_length=True. Build it with that."
            )

    def _samples_of_lengths(
        self, n: int, given: Tensor | None, lengths: Tensor | int, generator: torch.Generator | None
    ) -> Tensor:
        """Strings ``(n, n_sites)``: one law for every length."""
        self._check_variable("lengths")
        each = torch.full((n,), lengths) if isinstance(lengths, int) else lengths
        each = checked_lengths(each, n, self.n_sites)
        cores, device = self._law.cores(list(self.cores)), self.cores[0].device
        found = torch.full((n, self.n_sites), self.n_values, device=device)
        for length in each.unique().tolist():
            rows = torch.nonzero(each == length)[:, 0].to(device)
            here = given if given is None or given.shape[0] == 1 else given[rows]
            chain = of_length(cores, self.purification, length)
            if not bool(self._law.log_total(chain) > -math.inf):
                raise DataError(
                    f"a condition must have a probability: lengths has {length}, which no string has, expected others. "
                    "See length_log_probs()."
                )
            found[rows] = self._law.sample(chain, len(rows), here, self._n_symbols, generator)
        return found

    def extra_repr(self) -> str:
        """What a print of the model shows."""
        return f"n_sites={self.n_sites}, n_values={self.n_values}, kind={self.kind!r}, max_rank={max(self.ranks)}"


def _filled(x: Tensor, lengths: Tensor, n_sites: int, n_values: int, least: int = 0, name: str = "x") -> Tensor:
    """Strings of some lengths ``(b, n_sites)``, ``n_values`` behind them; checked are these strings alone.

    Raises:
        DataError: They do not fit.
    """
    n_columns = min(x.shape[1], n_sites) if isinstance(x, Tensor) and x.ndim == 2 else n_sites
    n_strings = x.shape[0] if isinstance(x, Tensor) and x.ndim else 0
    checked = checked_lengths(lengths, n_strings, n_columns)
    if isinstance(x, Tensor) and x.ndim == 2 and x.dtype != torch.bool:
        behind = torch.arange(n_columns, device=x.device) >= checked.to(x.device)[:, None]
        x = x[:, :n_columns].masked_fill(behind, 0)
    return filled(checked_values(x, n_columns, n_values, least=least, name=name), checked, n_sites, n_values)


def _share(weight: Tensor, total: Tensor) -> Tensor:
    """Minus infinity where there is no weight, also in a law that has none at all."""
    return (weight - total).where(weight != -math.inf, -math.inf)


def _as_row(given: Any) -> Any:
    return given.unsqueeze(0) if isinstance(given, Tensor) and given.ndim == 1 else given


def _near_uniform(
    r: int, n: int, s: int, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device | str | None
) -> Tensor:
    """A core near the identity in every slice, with positive noise that is small beside it in sum."""
    noise = torch.rand(r, n, s, generator=generator, dtype=dtype, device=device) * (0.5 / max(r, s))
    eye = torch.eye(r, s, dtype=dtype, device=device)
    if r == 1 or s == 1:
        eye = torch.ones(r, s, dtype=dtype, device=device) / math.sqrt(max(r, s))
    return (eye[:, None] + noise) / math.sqrt(n)
