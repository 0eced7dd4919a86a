"""What the version before wrote still loads, and gives what it gave: models, plans, reports, halted runs, pickles."""

from __future__ import annotations

import json
import pickle
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression import CompressionPlan, Report, compress, cross_entropy_loss, fit

FILES = Path(__file__).parents[1] / "data_files" / "before_levels"
MAKE = runpy.run_path(str(FILES / "make.py"))
EXPECTED = load_file(FILES / "expected.safetensors")
FIGURES = json.loads((FILES / "expected.json").read_text())
numbers, ids, outputs = MAKE["numbers"], MAKE["ids"], MAKE["outputs"]

# Names of modules that have moved answer with a warning.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.usefixtures("fixed_plans")]


def assert_as_before(found: Tensor, name: str) -> None:
    torch.testing.assert_close(found, EXPECTED[name], rtol=1e-5, atol=1e-5)  # float32, on any machine


@pytest.mark.parametrize("name, cls, shape", [("mlp", "MLP", (4, 16)), ("conv-fc", "ConvFC", (2, 1, 8, 8))])
def test_registry_models(name: str, cls: str, shape: tuple[int, ...]) -> None:
    model = tt.load_pretrained(FILES / name)
    assert type(model) is getattr(tt.networks, cls)
    assert any(isinstance(layer, tt.nn.FactorizedLayer) for layer in model.modules())
    assert_as_before(outputs(model, (numbers(*shape),)), name)


@pytest.fixture(scope="module")
def layers() -> nn.Module:
    dense = nn.ModuleDict({name: make()[0].to_dense() for name, make in MAKE["LAYERS"].items()})
    return tt.load_pretrained(FILES / "layers", dense)


@pytest.mark.parametrize("name", MAKE["LAYERS"])
def test_layers(layers: Any, name: str) -> None:
    built, inputs = MAKE["LAYERS"][name]()
    assert type(layers[name]) is type(built)
    assert_as_before(outputs(layers[name], inputs), f"layers/{name}")
    stored = load_file(FILES / "layers" / "model.safetensors")
    built.load_state_dict({key.removeprefix(f"{name}."): stored[key] for key in stored if key.startswith(f"{name}.")})
    assert_as_before(outputs(built, inputs), f"layers/{name}")


def test_shared_tables_and_blocks() -> None:
    model = tt.load_pretrained(FILES / "tied", MAKE["Language"])
    assert isinstance(model.table, tt.nn.Embedding)
    assert model.head.embedding is model.table
    assert model.again is model.block
    assert_as_before(outputs(model, (ids(3, 4),)), "tied")


@pytest.mark.parametrize("kind", MAKE["CONSTRAINED"])
def test_state_dicts_of_constrained_cores(kind: str) -> None:
    states = load_file(FILES / "state_dicts.safetensors")
    layer, inputs = MAKE["constrained"](kind)
    layer.load_state_dict({key.split("/")[1]: states[key] for key in states if key.startswith(f"{kind}/")})
    assert_as_before(outputs(layer, inputs), f"state_dicts/{kind}")


def test_plans() -> None:
    text = (FILES / "plan.json").read_text()
    plan = CompressionPlan.from_json(text)
    assert plan.to_json() == text
    assert str(plan) == FIGURES["plan"]
    assert CompressionPlan.from_json((FILES / "plan_version_1.json").read_text()).layers == plan.layers
    pickled = pickle.loads((FILES / "plan.pickle").read_bytes())
    assert pickled == plan
    for name, one in (("applied", pickled), ("read and applied", plan)):
        model = tt.apply_plan_(MAKE["compress_options"]()["model"], one)
        assert_as_before(outputs(model, (numbers(4, 16),)), name)


def test_report() -> None:
    text = (FILES / "report.json").read_text()
    assert Report.from_json(text).to_json() == text


def assert_same_history(found: Any, name: str) -> None:
    assert len(found) == len(FIGURES[name])
    for row, exact in zip(found, FIGURES[name], strict=True):
        assert {key: row[key] for key in exact} == pytest.approx(exact, rel=1e-4)


def test_a_halted_training_goes_on(tmp_path: Path) -> None:
    path = Path(shutil.copy(FILES / "fit.checkpoint", tmp_path))
    model = MAKE["trained"]()
    result = fit(model, **MAKE["fit_options"](fit, cross_entropy_loss), checkpoint=path)
    assert result.resumed_from == 6
    assert_same_history(result.history, "fit")
    assert_as_before(outputs(model, (numbers(4, 6),)), "fit")


def test_a_halted_healing_is_read_and_tells_why_it_starts_over(tmp_path: Path) -> None:
    path, observer = Path(shutil.copy(FILES / "compress.checkpoint", tmp_path)), MAKE["StopAt"]()
    result = compress(**MAKE["compress_options"](), checkpoint=path, observer=observer)
    # Ranks are chosen otherwise today: the file is understood, and is of a run that began with other cores.
    assert any("has other parameter groups" in text for text in observer.said)
    assert [row["step"] for row in result.report.healing] == [row["step"] for row in FIGURES["compress"]]
    again = MAKE["StopAt"]()
    compress(**MAKE["compress_options"](), checkpoint=path, observer=again)
    assert not any("has other" in text for text in again.said)


@pytest.mark.parametrize("name", MAKE["PICKLED"])
def test_pickled_layers(name: str) -> None:
    layer = torch.load(FILES / "pickles" / f"{name.replace(' ', '_')}.pt", weights_only=False)
    built, inputs = MAKE["LAYERS"][name]()
    assert type(layer) is type(built)
    assert_as_before(outputs(layer, inputs), f"pickles/{name}")


def test_pickled_models_and_values() -> None:
    model = torch.load(FILES / "pickles" / "mlp.pt", weights_only=False)
    assert type(model) is tt.networks.MLP
    assert_as_before(outputs(model, (numbers(4, 16),)), "mlp")
    others = torch.load(FILES / "pickles" / "others.pt", weights_only=False)
    assert_as_before(others["train"].to_dense(), "train")
    assert_as_before(others["parameter"].value.to_dense(), "train")
    assert_as_before(others["rounded"].value.to_dense() / 2, "train")
    assert_as_before(others["matrix"].to_dense(), "matrix")
    assert others["matrix"].center == (1, 1)
    layer, _ = MAKE["LAYERS"]["linear tt"]()
    assert others["spec"] == layer.spec
    assert str(others["plan"]) == str(layer.plan(4))
    x = numbers(4, layer.in_features)
    torch.testing.assert_close(
        others["plan"].execute(x, list(layer.cores)), layer.plan(4).execute(x, list(layer.cores))
    )
