"""Pictures of networks: every size stands in them, they are written whole, and nothing global is touched."""

from __future__ import annotations

import doctest
import itertools
from pathlib import Path
from types import SimpleNamespace

import fresh
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import tensortrain as tt
from tensortrain.errors import KindError, ShapeError
from tensortrain.formats import WeightShape, format_names, get_format
from tensortrain.testing.compare import check_refused
from tensortrain.viz.draw import door, notation

LINEAR, CONV = WeightShape("linear", 64, 96), WeightShape("conv", 64, 32, (3, 3))
TREE = (1, (4, (3, (2, 0), (5, 1)), (6, (2, 2), (7, 3))), (8, (2, 4), (2, 5)))


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def has_all(figure: Figure, *sizes: int) -> bool:
    left = [part for words in texts(figure) if set(words) <= set("0123456789·") for part in words.split("·")]
    for size in sizes:
        if str(size) not in left:
            return False
        left.remove(str(size))
    return True


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of words that are painted over each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in figure.axes[0].texts]
    pairs = itertools.combinations(boxes, 2)
    return [(a, b) for (a, box), (b, other) in pairs if box.shrunk(0.9, 0.9).overlaps(other)]


def modules() -> dict[str, nn.Module]:
    return {
        "linear": tt.nn.Linear(64, 64, rank=4),
        "conv": tt.nn.Conv2d(16, 32, 3, format="tucker2", rank=5),
        "embedding": tt.nn.Embedding(1000, 64, rank=3),
        "lstm": tt.nn.LSTM(16, 16, rank=2),
        "model": nn.Sequential(tt.nn.Linear(16, 16, rank=2), nn.ReLU(), tt.nn.Linear(16, 25, format="cp", rank=7)),
        "born": tt.models.BornMachine(6, bond_dim=3),
        "purified": tt.models.BornMachine(4, bond_dim=3, kind="purified"),
        "classifier": tt.models.MPSClassifier(9, 3, bond_dim=4),
        "long classifier": tt.models.MPSClassifier(64, 10, bond_dim=8, label=21),
        "per class": tt.models.MPSClassifier(40, 10, bond_dim=8, label="per-class"),
        "chunks": tt.models.NonlinearTT((7, 8, 9), 10, rank=6),
        "modes": tt.models.NonlinearTT((4, 7, 4), 10, rank=5, reading="modes", activation="tanh", residual=True),
        "long chunks": tt.models.NonlinearTT((14,) * 28, 10, rank=tuple(range(101, 128))),
        "exponential": tt.models.ExponentialMachine(5, rank=3),
        "score tt": tt.models.ScoreNetwork(6, 4, 10, rank=3, n_features=5),
        "score middle": tt.models.ScoreNetwork(6, 4, 10, rank=3, n_features=5, label="middle"),
        "score cp": tt.models.ScoreNetwork(20, 4, 10, format="cp", rank=3, n_features=5),
        "score ht": tt.models.ScoreNetwork(5, 4, 10, format="ht", rank=3, n_features=7, product="rectify"),
        "score of one": tt.models.ScoreNetwork(1, 4, 10, format="ht", rank=3, n_features=7),
        "arithmetic": tt.models.RecurrentArithmeticCircuit(3, 5, 2, n_outputs=4),
        "cell": tt.models.HOTTRNNCell(1, 4, n_lags=2, degree=3, rank=5),
        "forecaster": tt.models.Forecaster(tt.models.HOTTLSTMCell(1, 4, n_lags=2, degree=3, rank=5), 1),
        "unitary tree": tt.quantum.UnitaryClassifier(7, 3),
        "unitary chain": tt.quantum.UnitaryClassifier(7, 3, structure="chain"),
        "linear network": tt.models.NonlinearTT((7, 8, 9), 10, rank=6, activation="identity"),
    }


def test_trains_show_all_sizes() -> None:
    assert has_all(tt.draw(tt.randn((4, 5, 6, 17), (1, 2, 9, 8, 1))), 4, 5, 6, 17, 2, 9, 8)
    assert has_all(tt.draw(tt.randn_matrix((4, 5), (6, 7), 3)), 4, 5, 6, 7, 3)
    assert has_all(tt.draw(tt.ones((3,))), 3)
    batch = tt.TensorTrain([torch.ones(12, 1, 3, 2), torch.ones(12, 2, 4, 1)])
    assert has_all(tt.draw(batch), 3, 4, 2)
    assert any("batch of 12" in words for words in texts(tt.draw(batch)))


def test_long_trains_are_shortened() -> None:
    ranks = (1, *range(11, 40), 1)
    figure = tt.draw(tt.randn((2,) * 30, ranks))
    assert has_all(figure, *ranks[1:6], *ranks[25:30])
    assert texts(figure).count("···") == 1
    assert texts(figure).count("2") == 10
    assert figure.get_size_inches()[0] < 12


def test_orthonormal_cores_point_to_the_center() -> None:
    figure = tt.draw(tt.randn((4, 5, 6, 7), 3).orthogonalize(2))
    markers = [line.get_marker() for line in figure.axes[0].lines]
    assert [mark for mark in markers if mark in "<>o"] == [">", ">", "o", "<"]


@pytest.mark.parametrize("name", format_names())
@pytest.mark.parametrize("weight", [LINEAR, CONV], ids=["linear", "conv"])
def test_formats_show_modes_and_ranks(name: str, weight: WeightShape) -> None:
    form = get_format(name)
    if weight.kind not in form.kinds:
        return
    spec = form.spec(weight, rank=3)
    figure = tt.draw(spec)
    assert has_all(figure, *spec.out_modes, *spec.in_modes), texts(figure)
    assert set(map(str, form.inner_ranks(spec))) <= set(texts(figure))
    assert overlaps(figure) == []


@pytest.mark.parametrize("name", modules())
@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_layers_and_models_are_written(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture.{suffix}"
    figure = tt.draw(modules()[name], path=path)
    assert path.read_bytes()[:5] == (b"<?xml" if suffix == "svg" else b"\x89PNG\r")
    assert overlaps(figure) == []
    assert len(texts(figure)) > 2


def test_models_show_their_sizes() -> None:
    made = modules()
    assert has_all(tt.draw(made["classifier"]), *[2] * 9, *[4] * 8, 3)
    assert has_all(tt.draw(made["long classifier"]), 10)
    assert has_all(tt.draw(made["chunks"]), 7, 8, 9, 6, 6, 10)
    assert has_all(tt.draw(made["modes"]), 4, 7, 4, 5, 5, 10)
    assert has_all(tt.draw(made["linear network"]), 7, 8, 9, 6, 6, 10)
    assert has_all(tt.draw(made["long chunks"]), 101, 105, 123, 127)
    assert has_all(tt.draw(made["model"]), 2, 7)
    assert has_all(tt.draw(made["score tt"]), *[5] * 6, *[3] * 5, 10)
    assert has_all(tt.draw(made["score ht"]), *[7] * 5, *[3] * 8, 10)
    assert has_all(tt.draw(made["score cp"]), *[5] * 16, 3, 10)
    assert has_all(tt.draw(made["arithmetic"]), *[3] * 4, *[5] * 10, 4)
    assert has_all(tt.draw(made["forecaster"]), 9, 9, 9, 5, 5, 16)
    assert has_all(tt.draw(made["unitary tree"]), *[2] * 8, *[4] * 6, 3)


def test_trees() -> None:
    figure = tt.draw(TREE)
    assert has_all(figure, 4, 3, 6, 8, 2, 2, 2, 2, 5, 7)
    assert overlaps(figure) == []


def test_anything_with_gates_is_a_circuit() -> None:
    gates = [SimpleNamespace(name="h", qubits=(0,)), SimpleNamespace(name="cx", qubits=(0, 2)), ("rz", (1,))]
    figure = tt.draw(SimpleNamespace(n_qubits=3, gates=gates))
    assert {"h", "rz", "+", "q0", "q1", "q2"} <= set(texts(figure))
    long = SimpleNamespace(n_qubits=2, operations=[SimpleNamespace(name="x", qubits=(0,))] * 100)
    assert any("first 60" in words for words in texts(tt.draw(long)))


def test_circuits_of_trains() -> None:
    train = tt.randn((2,) * 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    figure = tt.draw(tt.quantum.circuit(train))
    assert {"q0", "q1", "q2", "q3", "+"} <= set(texts(figure))


def test_models_of_ones_own_are_drawn_by_their_cores() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cores = nn.ParameterList([torch.ones(1, 4, 3), torch.ones(3, 5, 7)])

    assert has_all(tt.draw(Chain()), 4, 3, 5, 7)


@pytest.mark.parametrize("plot", [tt.plot_spectrum, tt.plot_ranks, tt.plot_entropy])
def test_plots(plot, tmp_path: Path) -> None:
    made = modules()
    everything = [
        tt.randn((4, 5, 6, 7), 3),
        tt.randn_matrix((4, 5), (6, 7), 3),
        torch.randn(8, 9),
        tt.ones((3,)),
        tt.zeros((2, 2)),
        tt.randn((2,) * 40, 4),
        tt.nn.Conv2d(16, 32, 3, format="tt", rank=5),
        *(made[name] for name in ("linear", "embedding", "born", "classifier", "long classifier")),
    ]
    for k, one in enumerate(everything):
        assert isinstance(plot(one, path=tmp_path / f"{k}.svg"), Figure)
        assert (tmp_path / f"{k}.svg").stat().st_size > 1000
    for bad in (made["chunks"], made["per class"], made["conv"], 3):
        check_refused(KindError, plot, bad)
    check_refused(ShapeError, plot, tt.TensorTrain([torch.ones(2, 1, 3, 1)]))


def test_plots_show_the_numbers() -> None:
    x = tt.randn((4, 5, 6, 7), 3, generator=torch.Generator().manual_seed(0))
    ranks, entropies = (plot(x).axes[0].lines[0].get_ydata() for plot in (tt.plot_ranks, tt.plot_entropy))
    assert list(ranks) == [3, 3, 3]
    assert list(entropies) == pytest.approx([float(x.entropy(k)) for k in (1, 2, 3)])
    values = x.singular_values(2)
    assert list(tt.plot_spectrum(x).axes[0].lines[1].get_ydata()) == pytest.approx((values / values[0]).tolist())


def test_what_has_no_picture_is_refused(tmp_path: Path) -> None:
    x = tt.ones((2, 2))
    check_refused(KindError, tt.draw, 3)
    check_refused(KindError, tt.draw, torch.ones(3, 3))
    check_refused(KindError, tt.draw, nn.Linear(2, 2))
    check_refused(KindError, lambda: tt.draw(x, path=tmp_path / "picture.doc"))
    assert list(tmp_path.iterdir()) == []


def test_nothing_global_is_touched() -> None:
    done = fresh.run(
        "import sys, tensortrain as tt\n"
        "assert 'matplotlib' not in sys.modules\n"
        "tt.draw(tt.ones((4, 5)))\n"
        "tt.plot_ranks(tt.ones((4, 5)))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_examples() -> None:
    assert doctest.testmod(door).failed == 0
    assert notation.sizes_text(range(20)) == "0·1·2·3·…·16·17·18·19"
