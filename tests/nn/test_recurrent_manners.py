"""Composite layers behave as modules do: conversions, copies, state dicts, errors, compilers, checkpoints."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recurrent_reference import flat
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import tensortrain as tt
from tensortrain.errors import DTypeError, KindError, NonFiniteError, RankError, ShapeError
from tensortrain.nn.recurrent import layers as recurrent
from tensortrain.nn.recurrent import ways
from tensortrain.system.native import python_only
from tensortrain.testing import rel_error

# Torch's layer, ours, and an input.
PAIRS: dict[str, tuple[Callable[..., nn.Module], type[Any], Callable[[], tuple[Tensor, ...]]]] = {
    "rnn": (lambda **o: nn.RNN(6, 8, 2, "relu", **o), tt.nn.RNN, lambda: (torch.randn(4, 3, 6),)),
    "gru": (lambda **o: nn.GRU(6, 8, 2, bidirectional=True, **o), tt.nn.GRU, lambda: (torch.randn(4, 3, 6),)),
    "gru, no bias": (lambda **o: nn.GRU(6, 8, bias=False, **o), tt.nn.GRU, lambda: (torch.randn(4, 3, 6),)),
    "lstm": (
        lambda **o: nn.LSTM(6, 8, batch_first=True, proj_size=4, **o),
        tt.nn.LSTM,
        lambda: (torch.randn(4, 3, 6),),
    ),
    "rnn cell": (lambda **o: nn.RNNCell(6, 8, nonlinearity="relu", **o), tt.nn.RNNCell, lambda: (torch.randn(3, 6),)),
    "gru cell": (lambda **o: nn.GRUCell(6, 8, **o), tt.nn.GRUCell, lambda: (torch.randn(3, 6),)),
    "lstm cell": (lambda **o: nn.LSTMCell(6, 8, bias=False, **o), tt.nn.LSTMCell, lambda: (torch.randn(3, 6),)),
    "attention": (
        lambda **o: nn.MultiheadAttention(12, 3, kdim=6, add_bias_kv=True, **o),
        tt.nn.MultiheadAttention,
        lambda: (torch.randn(4, 3, 12), torch.randn(5, 3, 6), torch.randn(5, 3, 12)),
    ),
    "encoder layer": (
        lambda **o: nn.TransformerEncoderLayer(12, 3, 20, 0.1, nn.GELU(), norm_first=True, **o).eval(),
        tt.nn.TransformerEncoderLayer,
        lambda: (torch.randn(4, 3, 12),),
    ),
}
RECURRENT = [name for name in PAIRS if name not in ("attention", "encoder layer")]
every_pair = pytest.mark.parametrize("name", PAIRS)


def make(name: str, **options: Any) -> tuple[nn.Module, Any, tuple[Tensor, ...]]:
    build, ours, inputs = PAIRS[name]
    dense = build()
    options = {"compress": "both", **options} if name in RECURRENT else options
    return dense, ours.from_dense(dense, **options), inputs()


# -- to and from torch's layers -----------------------------------------------------------------------


@every_pair
def test_there_and_back(name: str) -> None:
    dense, layer, inputs = make(name)
    dense.requires_grad_(False)
    frozen = type(layer).from_dense(dense)
    with torch.no_grad():
        back, frozen_back = layer.to_dense(), frozen.to_dense()
    assert type(back) is type(dense)
    assert back.training == layer.training == dense.training
    assert set(back.state_dict()) == set(dense.state_dict())
    for key, value in dense.state_dict().items():
        assert rel_error(back.state_dict()[key], value) <= 1e-13, key
    assert all(p.requires_grad for p in (*layer.parameters(), *back.parameters()))
    assert not any(p.requires_grad for p in (*frozen.parameters(), *frozen_back.parameters()))
    for mine, theirs in zip(flat(layer(*inputs)), flat(back(*inputs)), strict=True):
        assert rel_error(mine, theirs) <= 1e-12


@every_pair
def test_options_dtype_and_mode_carry_over(name: str) -> None:
    build, ours, _ = PAIRS[name]
    dense = build(dtype=torch.float32).eval()
    layer = ours.from_dense(dense)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert not layer.training
    assert not any(module.training for module in layer.modules())
    assert repr(layer.to_dense()) == repr(dense)
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


@every_pair
def test_rank_and_eps(name: str) -> None:
    dense, exact, _ = make(name)
    _, small, _ = make(name, rank=2)
    assert small.n_params < exact.n_params
    loose = type(exact).from_dense(dense, eps=0.5)
    whole = nn.utils.parameters_to_vector([p for p in dense.parameters() if p.ndim > 1])
    found = nn.utils.parameters_to_vector([p for p in loose.to_dense().parameters() if p.ndim > 1])
    assert 0 < rel_error(found, whole) <= 0.5


@pytest.mark.parametrize("compress", ["input", "hidden", "both"])
@pytest.mark.parametrize("name", RECURRENT)
def test_compress_says_which_maps(name: str, compress: str) -> None:
    _, layer, _ = make(name, compress=compress)
    for key, one in layer.named_maps():
        factorized = compress == "both" or (compress == "input") == key.endswith("ih")
        assert type(one) is (tt.nn.Linear if factorized and not key.endswith("hr") else nn.Linear), key


def test_input_gram_weighs_the_first_layer() -> None:
    dense = nn.GRU(12, 8, 2, bidirectional=True)
    gram = torch.diag(torch.tensor([1e6] * 3 + [1e-6] * 9))
    plain = tt.nn.GRU.from_dense(dense, rank=2, format="low_rank")
    weighed = tt.nn.GRU.from_dense(dense, rank=2, format="low_rank", input_gram=gram)
    for name in ("l0", "l0_reverse"):
        exact = getattr(dense, f"weight_ih_{name}")[:, :3]
        errors = [rel_error(layer.get_submodule(name).ih.weight[:, :3], exact) for layer in (plain, weighed)]
        assert errors[1] < 0.9 * errors[0]
    assert torch.equal(plain.l1.ih.weight, weighed.l1.ih.weight)


def test_a_gru_that_torch_does_not_have() -> None:
    for layer in (tt.nn.GRU(6, 8, reset_after=False), tt.nn.GRUCell(6, 8, reset_after=False)):
        with pytest.raises(KindError, match="resets after the hidden product"):
            layer.to_dense()
        assert "reset_after=False" in repr(layer)
    with pytest.raises(KindError, match="LSTMCell has no projection"):
        tt.nn.LSTMCell(6, 8, proj_size=3).to_dense()


@pytest.mark.parametrize("name", ["rnn", "lstm cell", "attention", "encoder layer"])
def test_other_kinds_are_refused(name: str) -> None:
    ours = PAIRS[name][1]
    with pytest.raises(KindError, match=f"{ours.__name__}.from_dense takes a torch.nn.{ours.__name__}"):
        ours.from_dense(nn.Linear(3, 3))


# -- cells --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["auto", "factorized", "dense"])
@pytest.mark.parametrize("name", ["rnn cell", "gru cell", "lstm cell"])
def test_cells_equal_torch(name: str, implementation: str) -> None:
    dense, layer, (x,) = make(name, implementation=implementation)
    h, c = torch.randn(2, 3, 8).unbind(0)
    state: Any = (h, c) if name == "lstm cell" else h
    one: Any = (h[0], c[0]) if name == "lstm cell" else h[0]
    for arguments in ((x,), (x, state), (x[0],), (x[0], one), (x[:0],)):
        found, exact = flat(layer(*arguments)), flat(dense(*arguments))
        for mine, theirs in zip(found, exact, strict=True):
            assert mine.shape == theirs.shape
            assert rel_error(mine, theirs) <= 1e-12


@pytest.mark.parametrize("name", ["rnn cell", "gru cell", "lstm cell"])
def test_cells_are_the_steps_of_the_layer(name: str) -> None:
    kind = {"rnn cell": tt.nn.RNN, "gru cell": tt.nn.GRU, "lstm cell": tt.nn.LSTM}[name]
    layer = kind(6, 8, rank=2, compress="both", **({"reset_after": False} if kind is tt.nn.GRU else {}))
    x, state, steps = torch.randn(4, 3, 6), None, []
    for x_t in x:
        state = layer.l0(x_t, state)
        steps.append(flat(state)[0])
    assert rel_error(layer(x)[0], torch.stack(steps)) <= 1e-12


# -- what runs ----------------------------------------------------------------------------------------


def test_state_carries_over() -> None:
    layer = tt.nn.LSTM(6, 8, 2, rank=2, compress="both", implementation="factorized")
    x = torch.randn(7, 3, 6)
    whole, end = layer(x)
    first, state = layer(x[:4])
    second, state = layer(x[4:], state)
    assert rel_error(torch.cat((first, second)), whole) <= 1e-12
    for mine, theirs in zip(state, end, strict=True):
        assert rel_error(mine, theirs) <= 1e-12


def test_factorized_maps_run_once_per_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = tt.nn.GRU(6, 8, rank=2, compress="both", implementation="factorized")
    calls, forward = {"ih": 0, "hh": 0}, tt.nn.Linear.forward
    names = {id(layer.l0.get_submodule(name)): name for name in calls}

    def count(one: tt.nn.Linear, input: Tensor) -> Tensor:
        calls[names[id(one)]] += 1
        return forward(one, input)

    # On the class: a forward on the instance is somebody's who wants to be called at every step, and is.
    monkeypatch.setattr(tt.nn.Linear, "forward", count)
    prepared = []
    plan = type(layer.l0.hh.plan(3)).prepare
    monkeypatch.setattr(
        type(layer.l0.hh.plan(3)), "prepare", lambda self, cores: (prepared.append(self.chain), plan(self, cores))[1]
    )
    with python_only():  # the kernels call neither
        layer(torch.randn(50, 3, 6))
    assert calls == {"ih": 1, "hh": 0}
    assert prepared.count(layer.l0.hh.format.chain(layer.l0.hh.spec)) == 1


def test_torchs_kernel_runs_where_all_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    kernel = recurrent._torch_kernel
    monkeypatch.setattr(recurrent, "_torch_kernel", lambda *a: (seen.append(len(a[0])), kernel(*a))[1])
    monkeypatch.setattr(recurrent, "fastest_way", lambda *a: ways.KERNEL)  # than our own kernels, where they are
    x = torch.randn(5, 3, 6)
    tt.nn.GRU(6, 8, 2, bidirectional=True, implementation="dense")(x)
    assert seen == [2, 2]
    tt.nn.GRU(6, 8, implementation="factorized")(x)
    tt.nn.GRU(6, 8, implementation="dense", reset_after=False)(x)
    watched = tt.nn.GRU(6, 8, implementation="dense")
    inputs: list[Tensor] = []
    watched.l0.hh.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    watched(x)
    assert seen == [2, 2]
    assert len(inputs) == 5  # hooks see every step


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("reset_after", [True, False])
def test_maps_with_a_forward_of_their_own_are_called(reset_after: bool) -> None:
    layer = tt.nn.GRU(6, 8, implementation="dense", reset_after=reset_after)
    doubled = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in doubled.l0.hh.parameters():
            parameter.mul_(2)
    own = Doubled(8, 24)
    own.load_state_dict(layer.l0.hh.state_dict())
    layer.l0.hh = own
    x = torch.randn(5, 3, 6)
    assert rel_error(layer(x)[0], doubled(x)[0]) <= 1e-12


def test_parametrized_maps() -> None:
    dense = nn.GRU(6, 8)
    layer = tt.nn.GRU.from_dense(dense, implementation="factorized")
    nn.utils.parametrizations.weight_norm(layer.l0.hh)
    x = torch.randn(5, 3, 6)
    assert rel_error(layer(x)[0], dense(x)[0]) <= 1e-12
    nn.utils.parametrizations.weight_norm(dense, "weight_ih_l0")
    assert rel_error(tt.nn.GRU.from_dense(dense)(x)[0], dense(x)[0]) <= 1e-12


def test_weights_are_read_anew() -> None:
    for implementation in ("auto", "factorized", "dense"):
        layer = tt.nn.GRU(6, 8, rank=2, compress="both", implementation=implementation)
        x = torch.randn(5, 3, 6)
        with torch.no_grad():
            before = layer(x)[0]
            layer.l0.hh.cores[0].mul_(2)
            assert rel_error(layer(x)[0], layer.to_dense()(x)[0]) <= 1e-12
            assert rel_error(layer(x)[0], before) > 1e-3


def test_dropout_between_layers_in_training_alone() -> None:
    layer = tt.nn.LSTM(6, 8, 2, dropout=0.5)
    x = torch.randn(5, 3, 6)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    packed = pack_sequence([x[:, 0], x[:3, 1]])
    assert not torch.equal(layer(packed)[0].data, layer(packed)[0].data)
    layer.eval()
    assert rel_error(layer(x)[0], layer.to_dense()(x)[0]) <= 1e-12
    with pytest.warns(UserWarning, match="dropout acts between layers"):
        tt.nn.LSTM(6, 8, dropout=0.5)


def test_trains() -> None:
    torch.manual_seed(1)
    layer, head = tt.nn.GRU(8, 16, rank=3, compress="both", batch_first=True), nn.Linear(16, 2)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=2e-2)
    x = torch.randn(64, 6, 8)
    y = (x[:, 0, 0] > 0).long()  # to be remembered over six steps
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(head(layer(x)[1][0]), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_initial_variance_is_torchs(kind: str) -> None:
    layer = getattr(tt.nn, kind)(48, 64, rank=8, compress="both")
    for name, one in layer.named_maps():
        assert float(one.weight.detach().square().mean()) * 3 * 64 == pytest.approx(1, rel=1e-6), name
        assert float(one.bias.detach().abs().max()) <= 1 / 8
        assert float(one.bias.detach().square().mean()) * 3 * 64 == pytest.approx(1, rel=0.3), name
    other = getattr(tt.nn, kind)(48, 64, rank=8, init=0.05)
    assert float(other.l0.ih.weight.detach().square().mean()) == pytest.approx(0.05**2, rel=1e-6)


# -- errors -------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "compress": (lambda: tt.nn.GRU(6, 8, compress="all"), ShapeError, "compress must be one of .* 'all'"),
    "option": (lambda: tt.nn.GRU(6, 8, ranks=3), TypeError, "ranks"),
    "projected gru": (lambda: tt.nn.GRU(6, 8, proj_size=3), TypeError, "proj_size"),
    "size": (lambda: tt.nn.LSTM(6, 0), ShapeError, "hidden_size must be .* 0"),
    "layers": (lambda: tt.nn.LSTM(6, 8, 0), ShapeError, "num_layers must be .* 0"),
    "projection": (lambda: tt.nn.LSTM(6, 8, proj_size=8), ShapeError, "proj_size must be .* 8"),
    "dropout": (lambda: tt.nn.RNN(6, 8, 2, dropout=1.5), ShapeError, "dropout must be .* 1.5"),
    "nonlinearity": (lambda: tt.nn.RNN(6, 8, 2, "sin"), ShapeError, "nonlinearity must be .* 'sin'"),
    "format": (lambda: tt.nn.GRU(6, 8, format="no"), ShapeError, "a format must be registered"),
    "modes": (lambda: tt.nn.GRU(6, 8, out_modes=(3, 3)), ShapeError, "multiply to exactly 8"),
    "ranks": (lambda: tt.nn.GRU(6, 8, rank=0), RankError, "rank"),
    "implementation": (lambda: tt.nn.GRU(6, 8, implementation="fast"), ShapeError, "'fast'"),
    "features": (lambda: tt.nn.GRU(6, 8)(torch.zeros(4, 3, 5)), ShapeError, r"N = 6: found \(4, 3, 5\)"),
    "axes": (lambda: tt.nn.GRU(6, 8)(torch.zeros(6)), ShapeError, r"found \(6,\)"),
    "no steps": (lambda: tt.nn.GRU(6, 8)(torch.zeros(0, 3, 6)), ShapeError, "at least one time step"),
    "dtype": (lambda: tt.nn.GRU(6, 8)(torch.zeros(4, 3, 6).float()), DTypeError, "float32, expected torch.float64"),
    "state": (
        lambda: tt.nn.GRU(6, 8, 2)(torch.zeros(4, 3, 6), torch.zeros(1, 3, 8)),
        ShapeError,
        r"found \[\(1, 3, 8\)\], expected \[\(2, 3, 8\)\]",
    ),
    "state without batch": (
        lambda: tt.nn.GRU(6, 8)(torch.zeros(4, 6), torch.zeros(1, 1, 8)),
        ShapeError,
        r"expected \[\(1, 8\)\]",
    ),
    "state in a tuple": (
        lambda: tt.nn.GRU(6, 8)(torch.zeros(4, 3, 6), (torch.zeros(1, 3, 8),)),  # type: ignore[arg-type]
        ShapeError,
        "found .*tuple",
    ),
    "half a state": (
        lambda: tt.nn.LSTM(6, 8)(torch.zeros(4, 3, 6), torch.zeros(1, 3, 8)),  # type: ignore[arg-type]
        ShapeError,
        r"expected \[\(1, 3, 8\), \(1, 3, 8\)\]",
    ),
    "packed state": (
        lambda: tt.nn.GRU(6, 8)(pack_sequence([torch.zeros(4, 6)] * 2, enforce_sorted=False), torch.zeros(1, 3, 8)),
        ShapeError,
        r"expected \[\(1, 2, 8\)\]",
    ),
    "cell input": (lambda: tt.nn.GRUCell(6, 8)(torch.zeros(4, 3, 6)), ShapeError, r"\(b, 6\) or \(6,\)"),
    "cell state": (
        lambda: tt.nn.GRUCell(6, 8)(torch.zeros(3, 6), torch.zeros(8)),
        ShapeError,
        r"expected \[\(3, 8\)\]",
    ),
    "not finite": (
        lambda: tt.nn.GRUCell.from_dense(_broken(), rank=2),
        NonFiniteError,
        "a weight must be finite",
    ),
}


def _broken() -> nn.Module:
    cell = nn.GRUCell(6, 8)
    nn.init.constant_(cell.weight_ih, float("nan"))
    return cell


@pytest.mark.parametrize("case", WRONG)
def test_errors(case: str) -> None:
    call, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        call()


def test_on_the_meta_device() -> None:
    layer = tt.nn.LSTM(6, 8, 2, rank=2, device="meta")
    assert layer(torch.zeros(4, 3, 6, device="meta"))[0].shape == (4, 3, 8)


# -- copies and files ---------------------------------------------------------------------------------


@every_pair
def test_deepcopy_and_state_dict(name: str) -> None:
    _, layer, inputs = make(name, rank=2)
    before = flat(layer.eval()(*inputs))
    twin = copy.deepcopy(layer)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in (*twin.parameters(), *other.parameters()):
            parameter.add_(torch.randn_like(parameter))
    assert all(torch.equal(a, b) for a, b in zip(flat(layer(*inputs)), before, strict=True))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(flat(other(*inputs)), before, strict=True))
    assert dict(layer.named_buffers()) == {}


def test_parameter_names() -> None:
    layer = tt.nn.LSTM(24, 16, 2, bidirectional=True, proj_size=4, in_modes=(4, 6))
    names = set(layer.state_dict())
    assert {"l0.ih.cores.0", "l0.ih.cores.1", "l0.ih.bias", "l1_reverse.hh.weight", "l0.hh.bias"} <= names
    assert "l0_reverse.hr.weight" in names
    assert set(layer.dense_weights()) == set(layer.to_dense().state_dict())


class Tagger(nn.Module):
    """Everything composite in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 12)
        self.rnn = tt.nn.GRU(12, 8, 2, bidirectional=True, batch_first=True, rank=2)
        self.encoder = tt.nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, rank=2)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.rnn(self.table(ids))[0]))


def test_a_checkpoint_knows_the_maps(tmp_path: Path) -> None:
    model = Tagger()
    model.rnn = tt.nn.GRU.from_dense(nn.GRU(12, 8, 2, bidirectional=True, batch_first=True), eps=0.2)
    ranks = [one.ranks for _, one in model.rnn.named_maps() if isinstance(one, tt.nn.Linear)]
    model.eval()
    tt.save_pretrained(model, tmp_path)
    again = tt.load_pretrained(tmp_path, model=Tagger)
    assert [one.ranks for _, one in again.rnn.named_maps() if isinstance(one, tt.nn.Linear)] == ranks
    ids = torch.randint(20, (2, 5))
    assert torch.equal(again(ids), model(ids))


def test_surgery_goes_through_the_maps() -> None:
    model = Tagger().eval()
    ids = torch.randint(20, (2, 5))
    before = model(ids)
    tt.to_dense_(model)
    assert not any(isinstance(module, tt.nn.Linear) for module in model.modules())
    assert rel_error(model(ids), before) <= 1e-12
    assert type(model.rnn) is nn.GRU  # of which all maps are dense by now
    plan = tt.plan_compression(model, budget="2x", data=[ids], allow_slower=True)
    assert "rnn.l0.hh" in {entry.name for entry in plan.layers}  # seen by its hooks at every step
    tt.apply_plan_(model, plan)
    assert model(ids).shape == before.shape


# -- compilers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rnn cell", "gru cell", "lstm cell", "attention", "encoder layer"])
def test_compiles_to_one_graph(name: str) -> None:
    torch._dynamo.reset()
    _, layer, inputs = make(name, rank=2, implementation="factorized")
    layer.eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found, exact = flat(compiled(*inputs)), flat(layer(*inputs))
    grads = [torch.autograd.grad(sum(y.square().sum() for y in ys), list(layer.parameters())) for ys in (found, exact)]
    for mine, theirs in zip((*found, *grads[0]), (*exact, *grads[1]), strict=True):
        # Keys' biases have no gradient: what is there is rounding, and differs.
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["gru cell", "attention", "encoder layer", "lstm"])
def test_exports(name: str) -> None:
    _, layer, inputs = make(name, rank=2, implementation="factorized")
    program = torch.export.export(layer.eval(), inputs)
    for mine, theirs in zip(flat(program.module()(*inputs)), flat(layer(*inputs)), strict=True):
        assert rel_error(mine, theirs) <= 1e-12
