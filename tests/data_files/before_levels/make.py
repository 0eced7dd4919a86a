"""The files beside this script, as the version before the levels (commit 6ef5176) wrote them.

``PYTHONPATH=<that version>/src python make.py`` writes them again. What is built below is what the tests build too, to
load the files into; so this script uses names that both versions have.
"""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

import tensortrain as tt

HERE = Path(__file__).parent


def numbers(*shape: int, start: int = 1) -> Tensor:
    """The same on every machine."""
    k = torch.arange(start, start + math.prod(shape), dtype=torch.float64)
    return torch.sin(0.7 * k * k).float().reshape(shape)  # squares, or matrices of them would have rank two


def ids(*shape: int, n: int = 20) -> Tensor:
    return (torch.arange(math.prod(shape)) * 7 % n).reshape(shape)


# -- layers: name -> the layer and an input --------------------------------------------------------------

Made = tuple[nn.Module, tuple[Tensor, ...]]


def _linear(format: str, **options: Any) -> Made:
    return tt.nn.Linear(12, 10, format=format, **{"rank": 3, **options}), (numbers(4, 12),)


def _conv(format: str, **options: Any) -> Made:
    return tt.nn.Conv2d(4, 6, 3, padding=1, format=format, **{"rank": 3, **options}), (numbers(2, 4, 5, 5),)


def _table(format: str = "tt", **options: Any) -> Made:
    return tt.nn.Embedding(20, 6, format=format, **{"rank": 3, **options}), (ids(3, 4),)


_EVERYWHERE = ("block_term", "btt", "cp", "kronecker", "low_rank", "ring", "tt", "tt_separate", "tucker")

LAYERS: dict[str, Callable[[], Made]] = {
    **{f"linear {name}": lambda name=name: _linear(name) for name in _EVERYWHERE},
    **{f"conv {name}": lambda name=name: _conv(name) for name in (*_EVERYWHERE, "tt-naive", "tucker2")},
    **{f"table {name}": lambda name=name: _table(name) for name in ("btt", "low_rank", "tt")},
    "linear modes": lambda: _linear("tt", in_modes=(3, 4), out_modes=(5, 2), bias=False),
    "linear padded": lambda: (
        tt.nn.Linear(11, 13, in_modes=(3, 4), out_modes=(7, 2), rank=2),
        (numbers(4, 11),),
    ),
    "linear of a share": lambda: _linear("tt", rank=0.5),
    "linear held dense": lambda: _linear("tt", implementation="dense"),
    "linear in double": lambda: (tt.nn.Linear(12, 10, rank=3, dtype=torch.float64), (numbers(4, 12).double(),)),
    "conv1d": lambda: (
        tt.nn.Conv1d(4, 6, 3, stride=2, padding=1, padding_mode="circular", rank=2),
        (numbers(2, 4, 7),),
    ),
    "conv groups": lambda: _conv("tt", groups=2, dilation=2),
    "conv3d": lambda: (tt.nn.Conv3d(2, 4, 2, rank=2), (numbers(1, 2, 3, 3, 3),)),
    "transpose1d": lambda: (tt.nn.ConvTranspose1d(4, 6, 3, stride=2, rank=2), (numbers(2, 4, 5),)),
    "transpose2d": lambda: (
        tt.nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2, rank=2),
        (numbers(2, 4, 3, 3),),
    ),
    "hot rows": lambda: _table(hot_rows=3),
    "padding row": lambda: _table(padding_idx=2, max_norm=1.5, has_padding_row=True),
    "bag": lambda: (
        tt.nn.EmbeddingBag(20, 6, mode="sum", include_last_offset=True, rank=3),
        (ids(8), torch.tensor([0, 3, 8])),
    ),
    "rnn": lambda: (tt.nn.RNN(5, 6, nonlinearity="relu", rank=2), (numbers(4, 2, 5),)),
    "gru": lambda: (tt.nn.GRU(5, 6, batch_first=True, rank=2), (numbers(2, 4, 5),)),
    "lstm": lambda: (tt.nn.LSTM(5, 6, 2, bidirectional=True, rank=2), (numbers(4, 2, 5),)),
    "lstm cell": lambda: (tt.nn.LSTMCell(5, 6, rank=2), (numbers(2, 5),)),
    "attention": lambda: (tt.nn.MultiheadAttention(8, 2, rank=2), (numbers(3, 2, 8),) * 3),
    "encoder layer": lambda: (tt.nn.TransformerEncoderLayer(8, 2, 12, rank=2), (numbers(3, 2, 8),)),
}


def constrained(kind: str) -> Made:
    """Layers whose state_dict alone is saved: orthogonal, pruned."""
    layer, inputs = _linear("tt", in_modes=(3, 2, 2), out_modes=(5, 2, 1), rank=2)
    if kind == "pruned":
        prune.l1_unstructured(layer.cores, "0", amount=0.5)
        return layer, inputs
    return tt.nn.orthogonal(layer, kind), inputs  # type: ignore[arg-type]


CONSTRAINED = ("slice", "left", "spectral", "pruned")


class Language(nn.Module):
    """A table, its tied head, and a block used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.block = nn.Linear(6, 6)
        self.again = self.block
        self.head = tt.nn.tied_head(self.table, bias=True)
        self.register_buffer("scale", torch.arange(6.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(torch.tanh(self.block(self.table(x) * self.scale))))


def outputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """All numbers that a module gives, in one row."""
    with torch.no_grad():
        found = module.eval()(*inputs)
    parts: list[Tensor] = []
    while isinstance(found, (tuple, list)):  # (output, state), (output, (h, c)), (output, weights)
        parts, found = [*parts, found[0]], found[1:] if len(found) > 2 else found[1]
    return torch.cat([part.flatten().float() for part in (*parts, found) if isinstance(part, Tensor)])


# -- runs that are stopped half-way ----------------------------------------------------------------------


class Stopped(Exception):
    """Raised by an observer, where a run is to end."""


class StopAt:
    """An observer that ends a run at a step, or never."""

    def __init__(self, label: str = "", step: int | None = None) -> None:
        self.label, self.step, self.now = label, step, ""
        self.said: list[str] = []

    def on_start(self, name: str, total: int | None) -> None:
        self.now = name

    def on_step(self, n: int, **figures: float) -> None:
        if self.now == self.label and n == self.step:
            raise Stopped

    def on_end(self) -> None:
        pass

    def message(self, text: str) -> None:
        self.said.append(text)


def trained() -> nn.Module:
    """A model with noise and batch norm, that is made anew for every run."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(numbers(*parameter.shape))
    model[3] = tt.nn.Linear.from_dense(model[3], format="low_rank", rank=2)
    return model


def fit_options(fit: Callable[..., Any], cross_entropy_loss: Callable[..., Any]) -> dict[str, Any]:
    data = torch.utils.data.TensorDataset(numbers(32, 6), ids(32, n=3))
    loader = torch.utils.data.DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(3))
    return {"data": loader, "loss": cross_entropy_loss(), "epochs": 3, "lr": 0.05, "seed": 1}


def compress_options() -> dict[str, Any]:
    torch.manual_seed(6)
    model = nn.Sequential(
        nn.Linear(16, 24), nn.ReLU(), nn.BatchNorm1d(24), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(numbers(*parameter.shape) / 2)
    data = [(numbers(16, 16, start=1000 * k), ids(16, n=4)) for k in range(6)]
    return {
        "model": model,
        "budget": "3x",
        "formats": ("tt",),
        "data": data,
        "heal": {"epochs": 2},
        "measure": False,
        "name": "stack",
    }


@contextlib.contextmanager
def fixed_plans() -> Any:
    with tt.contract.use_cost_model(tt.contract.CostModel.reference("cpu")):
        yield


# -- writing ---------------------------------------------------------------------------------------------


def _registry_model(name: str, inputs: Tensor, kept: dict[str, Tensor], **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = tt.models.build(name, **kwargs)
    model = tt.apply_plan_(model, tt.plan_compression(model, budget="3x", allow_slower=True)).eval()
    tt.save_pretrained(model, HERE / name)
    kept[name] = outputs(model, (inputs,))
    return model


def _write_models(kept: dict[str, Tensor]) -> nn.Module:
    mlp = _registry_model("mlp", numbers(4, 16), kept, in_features=16, hidden=(12, 8), num_classes=4)
    image = numbers(2, 1, 8, 8)
    _registry_model("conv-fc", image, kept, image_size=8, width=0.0625, hidden=(8, 8), num_classes=4)
    torch.manual_seed(0)
    layers = nn.ModuleDict()
    for name, make in LAYERS.items():
        layers[name], inputs = make()
        if name == "hot rows":
            layers[name].populate_hot_rows_(torch.arange(20.0))
            nn.init.ones_(layers[name].hot_weight)
        kept[f"layers/{name}"] = outputs(layers[name], inputs)
    tt.save_pretrained(layers, HERE / "layers")
    language = Language()
    language.table = tt.nn.Embedding.from_dense(language.table, rank=3)
    language.head.embedding = language.table
    language.block = language.again = tt.nn.Linear.from_dense(language.block, rank=2)
    tt.save_pretrained(language, HERE / "tied")
    kept["tied"] = outputs(language, (ids(3, 4),))
    return mlp


def _write_state_dicts(kept: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    states: dict[str, Tensor] = {}
    for kind in CONSTRAINED:
        layer, inputs = constrained(kind)
        states |= {f"{kind}/{name}": value.contiguous() for name, value in layer.state_dict().items()}
        kept[f"state_dicts/{kind}"] = outputs(layer, inputs)
    save_file(states, HERE / "state_dicts.safetensors")


def _write_runs(kept: dict[str, Tensor]) -> Mapping[str, Any]:
    from tensortrain.compress import cross_entropy_loss, fit, training

    options = fit_options(fit, cross_entropy_loss)
    whole = trained()
    history = fit(whole, **options).history
    kept["fit"] = outputs(whole, (numbers(4, 6),))
    with contextlib.suppress(Stopped):
        options = fit_options(fit, cross_entropy_loss)
        stop = StopAt("train", 7)
        fit(trained(), **options, checkpoint=HERE / "fit.checkpoint", checkpoint_every_s=0.0, observer=stop)
    options = compress_options()
    result = tt.compress(**options)
    kept["compress"] = outputs(result.model, (numbers(4, 16),))
    training._Trainer._due = lambda self: True  # type: ignore[method-assign]
    with contextlib.suppress(Stopped):
        tt.compress(**options, checkpoint=HERE / "compress.checkpoint", observer=StopAt("heal", 7))
    (HERE / "plan.json").write_text(result.plan.to_json())
    old = json.loads(result.plan.to_json()) | {"version": 1}
    (HERE / "plan_version_1.json").write_text(
        json.dumps({k: old[k] for k in old if k not in ("task", "outputs", "notes")})
    )
    (HERE / "report.json").write_text(result.report.to_json())
    (HERE / "plan.pickle").write_bytes(pickle.dumps(result.plan))
    figures = [{name: row[name] for name in ("epoch", "step", "loss", "lr")} for row in history]
    healing = [{name: row[name] for name in ("epoch", "step", "loss", "lr")} for row in result.report.healing]
    plans = {"applied": result.plan, "read and applied": type(result.plan).from_json(result.plan.to_json())}
    for name, plan in plans.items():  # the text of a plan has no statistics of the data
        kept[name] = outputs(tt.apply_plan_(compress_options()["model"], plan), (numbers(4, 16),))
    return {"fit": figures, "compress": healing, "plan": str(result.plan)}


PICKLED = ("linear tt", "linear low_rank", "conv tt", "conv tucker2", "transpose2d", "hot rows", "lstm cell", "gru",
           "encoder layer")  # fmt: skip


def _write_pickles(mlp: nn.Module, kept: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    (HERE / "pickles").mkdir()
    for name in PICKLED:
        layer, inputs = LAYERS[name]()
        kept[f"pickles/{name}"] = outputs(layer, inputs)  # and so it has plans, and a cache, when it is pickled
        torch.save(layer, HERE / "pickles" / f"{name.replace(' ', '_')}.pt")
    torch.save(mlp, HERE / "pickles" / "mlp.pt")
    train, matrix = tt.randn((3, 4, 5), 2), tt.randn_matrix((2, 3), (3, 2), 2).orthogonalize(1)
    layer, _ = LAYERS["linear tt"]()
    others = {"train": train, "matrix": matrix, "parameter": tt.manifold.TTParameter(train),
              "rounded": tt.round_tt(train + train, eps=1e-8), "plan": layer.plan(4), "spec": layer.spec}  # fmt: skip
    torch.save(others, HERE / "pickles" / "others.pt")
    kept["train"], kept["matrix"] = (value.to_dense() for value in (train, matrix))


def main() -> None:
    assert not hasattr(tt, "networks"), "these files are to be written by the version before"
    for old in HERE.iterdir():
        if old.name not in (Path(__file__).name, "names.txt"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    kept: dict[str, Tensor] = {}
    with fixed_plans():
        mlp = _write_models(kept)
        _write_state_dicts(kept)
        figures = _write_runs(kept)
        _write_pickles(mlp, kept)
    save_file({name: value.contiguous() for name, value in kept.items()}, HERE / "expected.safetensors")
    (HERE / "expected.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
