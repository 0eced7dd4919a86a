"""Convolutions, embeddings and recurrent layers of the random grid: ours in every format, dense, and the peers."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import layers
import torch
from conv_cases import FORMATS, ConvCase, dense_of, layer_of
from grid_cases import LookupCase, RecurrentCase
from layer_extras import NaiveEmbedding
from layer_peers import DENSE, OURS, Way
from timing import Rates, take_turns
from torch import Tensor, nn

import tensortrain as tt

__all__ = ["time_grid_layer"]

TOL = 2e-5  # relative, of float32 against the dense twin in float64: long sums of a convolution round more than a row


class Problem:
    """An input, and what is timed on it."""

    def __init__(self, x: Tensor, out_shape: Sequence[int], training: bool) -> None:
        self.training = training
        self.x = x.requires_grad_(training and x.is_floating_point())
        self.g = torch.randn(*out_shape)

    def run(self, way: Way) -> Callable[[], Any]:
        """The timed call: a forward pass, or forward and backward to the input and all parameters."""
        x, g, forward = self.x, self.g, way.forward
        if not self.training:
            return lambda: forward(x)
        inputs = [*([x] if x.requires_grad else []), *way.module.parameters()]
        return lambda: torch.autograd.grad(forward(x), inputs, g, allow_unused=True)


def time_grid_layer(kind: str, case: Any, phase: str, rates: Rates, args: Any) -> dict[str, Any]:
    """One case in one phase: check, then time, everything that can run it."""
    training = phase == layers.PHASES[1]
    torch.manual_seed(args.seed)
    make_input, out_shape, builders, floor = _KINDS[kind](case, training)
    ways, skipped = _built(builders, args.peers)
    problem = Problem(make_input(), out_shape, training)
    errors: dict[str, float] = {}
    broken = ""
    with torch.set_grad_enabled(training):
        for way in list(ways):
            way.module.train(training)
            reason = _fault(way, problem, errors)
            if reason:
                ways.remove(way)
                skipped[way.name] = reason
                broken = broken or (reason if way.library == OURS else "")
        times = layers.turns_of(ways, problem, args)
        take_turns(times, seed=args.seed)
        predicted = {way.name: _predicted_ms(way, case, problem.x) for way in ways}
    n_bytes, flops = floor
    flops = min([flops, *((3 if training else 1) * n for way in ways for n in _flops(way, case, problem.x))])
    return {
        "kind": kind,
        "case": case.name,
        "phase": phase,
        "floor": {
            "bytes": n_bytes,
            "flops": flops,
            "ms": max(n_bytes / rates.bandwidth, flops / rates.of(torch.float32)) * 1e3,
        },
        "contestants": {
            way.name: {
                "library": way.library,
                **times[way.name].facts(),
                "rel_error": errors.get(way.name),
                "predicted_ms": predicted[way.name],
                "n_params": sum(p.numel() for p in way.module.parameters()),
            }
            for way in ways
        },
        "skipped": skipped,
        "broken": broken,
    }


def _built(builders: Iterator[Callable[[], Way]], peers: str) -> tuple[list[Way], dict[str, str]]:
    ways, skipped = [], {}
    for build in builders:
        name = build.keywords["name"]  # type: ignore[attr-defined]
        library = name.partition(",")[0]
        if library not in (OURS, DENSE) and peers != "all" and library not in peers.split(","):
            continue
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # tednet prints
                warnings.simplefilter("ignore")
                ways.append(build())
        except Exception as error:  # a library that is missing, or cannot be given these sizes
            skipped[name] = _words(error)
    return ways, skipped


def _fault(way: Way, problem: Problem, errors: dict[str, float]) -> str:
    """Why a way is not timed, or "". Ours are compared with their dense twin, peers hold weights of their own."""
    try:
        y = way.forward(problem.x)
        if problem.training:
            problem.run(way)()
    except Exception as error:  # a peer may fail in any way; that must not end the run
        return _words(error)
    if tuple(y.shape) != tuple(problem.g.shape) or not bool(y.isfinite().all()):
        return f"gives {tuple(y.shape)}, expected finite {tuple(problem.g.shape)}"
    if way.library != OURS:
        return ""
    x = problem.x.detach()
    with torch.no_grad():
        twin = way.module.to_dense().double().train(False)  # type: ignore[operator]
        expected = _first(twin(x.double() if x.is_floating_point() else x))
    errors[way.name] = float((y.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    return "" if errors[way.name] <= TOL else f"differs from its dense twin by {errors[way.name]:.2g}"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def _first(y: Any) -> Tensor:
    return y[0] if isinstance(y, tuple) else y


def _predicted_ms(way: Way, case: Any, x: Tensor) -> float | None:
    """What the layer's plan says of this call, where it has one."""
    if way.library != OURS or not isinstance(case, (ConvCase, LookupCase)):
        return None
    if isinstance(case, LookupCase) and torch.is_grad_enabled():
        return None  # plans of lookups speak of the forward pass alone
    module: Any = way.module
    plan = module.plan(x.shape[0], tuple(x.shape[2:])) if isinstance(case, ConvCase) else module.plan(x.numel())
    seconds = getattr(plan, "predicted_s", None)
    return seconds and seconds * 1e3


def _flops(way: Way, case: Any, x: Tensor) -> list[int]:
    """Of a forward pass by the plans of one of our convolutions: some formats are leaner than a low-rank one."""
    if way.library != OURS or not isinstance(case, ConvCase):
        return []
    with torch.no_grad():
        plan = way.module.plan(x.shape[0], tuple(x.shape[2:]))  # type: ignore[operator]
    names = ("flops", "dense_flops", "factorized_flops")
    return [found for name in names if (found := getattr(plan, name, None))]


def _way(module: nn.Module, *, name: str, forward: Callable[[Tensor], Tensor] | None = None) -> Way:
    library, _, label = name.partition(",")
    return Way(library, label.strip(), module, forward or module, (), torch.empty(0))


def _named(name: str, build: Callable[[], nn.Module], wrap: Callable[[Any], Any] | None = None) -> Callable[[], Way]:
    """A way that is built when it is called; ``wrap`` makes its forward of the module."""

    def made(*, name: str) -> Way:
        module = build()
        return _way(module, name=name, forward=None if wrap is None else wrap(module))

    return partial(made, name=name)


# -- convolutions -------------------------------------------------------------------------------------


def _conv(case: ConvCase, training: bool) -> tuple[Any, ...]:
    options = case.arguments()
    reach = options["padding"] * 2 - options["dilation"] * (case.kernel - 1) - 1
    out = tuple((n + reach) // case.stride + 1 for n in case.spatial)
    out_shape = (case.batch, case.outputs, *out)

    def builders() -> Iterator[Callable[[], Way]]:
        yield _named(DENSE, partial(dense_of, case))
        for name in FORMATS:
            yield _named(f"{OURS}, {name}", partial(layer_of, case, name))
        if case.groups > 1:  # the libraries know none
            return
        for factorization in ("tucker", "cp", "tt"):
            for implementation in ("factorized", "reconstructed"):
                name = f"TensorLy-Torch, {factorization} {implementation}"
                yield _named(name, partial(_tensorly_conv, case, factorization, implementation))
        if len(out) == 2 and case.dilation == 1:
            yield _named("tednet, tt", partial(_tednet_conv, case))

    numel = case.batch * (case.inputs * math.prod(case.spatial) + case.outputs * math.prod(out)) + case.n_params
    floor = ((2 if training else 1) * 4 * numel, (3 if training else 1) * _conv_flops(case, math.prod(out)))
    return case.input, out_shape, builders(), floor


def _conv_flops(case: ConvCase, positions: int) -> int:
    """Of the leaner one of the dense kernel and a low-rank one of this share: filters of rank R, then a 1 x 1."""
    taps, outputs = case.inputs // case.groups * case.kernel ** len(case.spatial), case.outputs // case.groups
    rank = max(1, math.floor(case.share * taps * outputs / (taps + outputs)))
    return 2 * case.batch * positions * case.groups * min(taps * outputs, rank * (taps + outputs))


def _tensorly_conv(case: ConvCase, factorization: str, implementation: str) -> nn.Module:
    import tltorch

    layer = tltorch.FactorizedConv(
        case.inputs,
        case.outputs,
        case.kernel,
        order=len(case.spatial),
        stride=case.stride,
        padding=case.arguments()["padding"],
        dilation=case.dilation,
        bias=True,
        has_bias=True,
        factorization=factorization,
        rank=case.share,
        implementation=implementation,
    )
    for parameter in layer.parameters():  # some begin as whatever lay in the memory
        nn.init.normal_(parameter, std=0.1)
    return layer


def _tednet_conv(case: ConvCase) -> nn.Module:
    from tednet.tnn.tensor_train import TTConv2D

    in_modes, out_modes = (list(tt.nn.suggest_modes(n, 2)) for n in (case.inputs, case.outputs))
    a, c = in_modes[0] * out_modes[0], in_modes[1] * out_modes[1]
    # r r a + r c + k^2 r = n_params, with one rank for both bonds
    b = c + case.kernel**2
    rank = max(1, int((-b + math.sqrt(b * b + 4 * a * case.n_params)) / (2 * a)))
    return TTConv2D(
        in_modes, out_modes, [rank, rank], case.kernel, stride=case.stride, padding=case.arguments()["padding"]
    )


# -- embeddings ---------------------------------------------------------------------------------------


def _embedding(case: LookupCase, training: bool) -> tuple[Any, ...]:
    sizes = (case.vocabulary, case.dim)

    def ours() -> nn.Module:
        return tt.nn.Embedding(*sizes, rank=case.rank)

    def builders() -> Iterator[Callable[[], Way]]:
        yield _named(DENSE, lambda: nn.Embedding(*sizes))
        yield _named(OURS, ours)
        yield _named("gather and bmm", lambda: NaiveEmbedding(ours()))  # type: ignore[arg-type]
        yield _named("TensorLy-Torch, blocktt", partial(_tensorly_embedding, case))

    def make_input() -> Tensor:
        law = 1.0 / torch.arange(1, case.vocabulary + 1, dtype=torch.float64)
        return torch.multinomial(law, case.n_ids, replacement=True)

    n_params = sum(core.numel() for core in ours().parameters())
    n_bytes = 8 * case.n_ids + 4 * case.n_ids * case.dim + 4 * min(n_params, case.n_ids * case.dim)
    return make_input, (case.n_ids, case.dim), builders(), ((2 if training else 1) * n_bytes, 0)


def _tensorly_embedding(case: LookupCase) -> nn.Module:
    import tltorch

    made = tt.nn.Embedding(case.vocabulary, case.dim, rank=case.rank)
    return tltorch.FactorizedEmbedding(
        math.prod(made.in_modes),  # it takes only modes whose product is the vocabulary: rows that are never asked for
        case.dim,
        auto_tensorize=False,
        tensorized_num_embeddings=tuple(made.in_modes),
        tensorized_embedding_dim=tuple(made.out_modes),
        rank=list(made.ranks),
    )


# -- recurrent layers ---------------------------------------------------------------------------------


def _recurrent(case: RecurrentCase, training: bool) -> tuple[Any, ...]:
    sizes, shape = (case.n_inputs, case.n_hidden), (case.n_steps, case.batch)

    def builders() -> Iterator[Callable[[], Way]]:
        yield _named(DENSE, lambda: getattr(nn, case.kind)(*sizes), _output_alone)
        yield _named(OURS, lambda: getattr(tt.nn, case.kind)(*sizes, rank=case.rank), _output_alone)
        if case.kind == "LSTM":
            yield _named("tednet, tt", partial(_tednet_lstm, case), partial(_with_state, case))

    gates = {"LSTM": 4, "GRU": 3}[case.kind]
    made = getattr(tt.nn, case.kind)(*sizes, rank=case.rank)
    n_params = sum(p.numel() for p in made.parameters())
    rows = case.n_steps * case.batch
    # A factorized map multiplies every row by each of its cores at least once, a dense one by the whole weight.
    dense = gates * case.n_hidden * (case.n_inputs + case.n_hidden)
    flops = 2 * rows * min(dense, n_params)
    n_bytes = 4 * (rows * (case.n_inputs + case.n_hidden) + n_params)
    floor = ((2 if training else 1) * n_bytes, (3 if training else 1) * flops)
    return (lambda: torch.randn(*shape, case.n_inputs)), (*shape, case.n_hidden), builders(), floor


def _output_alone(net: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: net(x)[0]


def _tednet_lstm(case: RecurrentCase) -> nn.Module:
    from tednet.tnn.tensor_train.tt_rnn import TTLSTM

    modes = [list(tt.nn.suggest_modes(n, 3)) for n in (case.n_inputs, case.n_hidden)]
    return TTLSTM(*modes, [case.rank, case.rank], drop_ih=0.0, drop_hh=0.0)


def _with_state(case: RecurrentCase, net: Any) -> Callable[[Tensor], Tensor]:
    """Its hidden map stays dense: of the two maps it factorizes the one of the inputs."""
    from tednet.tnn.tn_rnn import LSTMState

    def forward(x: Tensor) -> Tensor:
        zeros = x.new_zeros(case.batch, case.n_hidden)
        return net(x, LSTMState(zeros, zeros))[0]

    return forward


_KINDS: dict[str, Callable[[Any, bool], tuple[Any, ...]]] = {
    "conv": _conv,
    "embedding": _embedding,
    "recurrent": _recurrent,
}
