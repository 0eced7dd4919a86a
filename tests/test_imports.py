"""Importing the package is quiet and light, and changes nothing for the program that imports it; names stay."""

from __future__ import annotations

import importlib
from pathlib import Path

import fresh
import pytest

import tensortrain

_HEAVY = ("matplotlib", "transformers", "typer", "rich", "sklearn", "tensorly", "onnx")

# One line a module of the version before, with what it made public. Its files lie beside it.
_BEFORE = Path(__file__).parent / "data_files" / "before_levels" / "names.txt"
_NAMES_BEFORE = {
    module: names.split() for module, _, names in (line.partition(":") for line in _BEFORE.read_text().splitlines())
}


# What users build on: these folders' public names are those of the version before, and what is new.
_NEW_NAMES: dict[str, set[str]] = {
    "tensortrain": {
        "Pareto",
        "draw",
        "mutual_information",
        "networks",
        "order_sites",
        "pareto",
        "plot_entropy",
        "plot_ranks",
        "plot_spectrum",
        "quantum",
    },
    "tensortrain.contract": {"ChainPlan", "ChainShape", "Plan"},
    "tensortrain.data": set(),
    "tensortrain.errors": {"ProcessError"},
    "tensortrain.formats": {"PLAIN", "Fit", "Weighting"},
    "tensortrain.io": set(),
    "tensortrain.manifold": {"descend"},
    "tensortrain.nn": {"PartialLinear", "RankGates", "RankPrior", "SVGD", "evbmf", "grow_ranks_", "prune_ranks_"},
    "tensortrain.tensor": set(),
    "tensortrain.viz": set(),
}


def _ran_silently(code: str) -> None:
    done = fresh.run(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_is_quiet_and_light_and_sets_nothing() -> None:
    _ran_silently(
        "import sys, warnings, torch\n"
        "warnings.simplefilter('error')\n"
        "def state():\n"
        "    return (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),\n"
        "            torch.initial_seed(), torch.get_rng_state().tolist(), torch.cuda.is_initialized())\n"
        "before = state()\n"
        "import tensortrain\n"
        "assert state() == before, 'the import changed a global setting of torch'\n"
        f"loaded = [name for name in {_HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, f'the import loads {loaded}'"
    )


def test_every_module_imports_quietly() -> None:
    _ran_silently(
        "import importlib, pkgutil, tensortrain, warnings\n"
        "warnings.filterwarnings('error', message='tensortrain')  # no module of ours asks for an old name\n"
        "for found in pkgutil.walk_packages(tensortrain.__path__, 'tensortrain.'):\n"
        "    if not found.name.endswith('__main__'):\n"
        "        importlib.import_module(found.name)"
    )


def test_every_module_of_the_version_before_answers() -> None:
    _ran_silently(
        "import importlib, tensortrain, torch, warnings\n"
        "from tensortrain._moved import MOVED\n"
        f"for module, names in {_NAMES_BEFORE!r}.items():\n"
        "    has_moved = module.removeprefix('tensortrain.') in MOVED\n"
        "    with warnings.catch_warnings(record=True) as heard:\n"
        "        warnings.simplefilter('always')\n"
        "        found = importlib.import_module(module)\n"
        "        missing = [name for name in names if not hasattr(found, name)]\n"
        "    told = any(str(one.message).startswith(f'{module} has moved') for one in heard)\n"
        "    if missing or told != has_moved:\n"
        "        print(module, 'lacks', missing, 'warned', told)\n"
        "import tensortrain.compress.report as report\n"
        "import tensortrain.compress as folder\n"
        "from tensortrain.compress import Heal\n"
        "assert report.Report is tensortrain.Report and Heal is tensortrain.Heal\n"
        "import pickle\n"
        "assert pickle.loads(pickle.dumps(tensortrain.compress)) is folder\n"
        "for compress in (tensortrain.compress, folder):  # the function, whatever was imported by its old name\n"
        "    small = compress(torch.nn.Linear(8, 8), budget='2x', measure=False)\n"
        "    assert isinstance(small, tensortrain.CompressionResult)"
    )


@pytest.mark.parametrize("module", _NEW_NAMES)
def test_public_names(module: str) -> None:
    expected = set(_NAMES_BEFORE[module]) | _NEW_NAMES[module]
    found = importlib.import_module(module)
    assert set(found.__all__) == expected
    assert len(found.__all__) == len(expected)
    assert all(getattr(found, name) is not None for name in expected)


def test_unknown_names_are_unknown() -> None:
    _ran_silently(
        "import importlib, pkgutil, tensortrain\n"
        "for found in pkgutil.walk_packages(tensortrain.__path__, 'tensortrain.'):\n"
        "    if not found.name.endswith('__main__'):\n"
        "        assert not hasattr(importlib.import_module(found.name), 'Perceptron'), found.name"
    )


def test_public_names_are_sorted() -> None:
    assert tensortrain.__all__ == sorted(tensortrain.__all__)


@pytest.mark.parametrize("name", _NAMES_BEFORE["tensortrain.models"])
def test_example_networks_answer_under_their_old_name(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"models.{name} has moved to tensortrain.networks.{name}"):
        found = getattr(tensortrain.models, name)
    assert found is getattr(tensortrain.networks, name)
    assert name not in tensortrain.models.__all__
