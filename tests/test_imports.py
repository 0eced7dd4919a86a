"""Importing the package is quiet and light, and changes nothing for the program that imports it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tensortrain

_HEAVY = ("matplotlib", "transformers", "typer", "rich", "sklearn", "tensorly", "onnx")


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


def test_import_is_quiet_and_light_and_sets_nothing() -> None:
    done = _run(
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
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_module_imports_quietly() -> None:
    done = _run(
        "import importlib, pkgutil, tensortrain\n"
        "for found in pkgutil.walk_packages(tensortrain.__path__, 'tensortrain.'):\n"
        "    if not found.name.endswith('__main__'):\n"
        "        importlib.import_module(found.name)"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", tensortrain.__all__)
def test_public_name_exists(name: str) -> None:
    assert getattr(tensortrain, name) is not None


def test_public_names_are_sorted_and_unique() -> None:
    assert len(set(tensortrain.__all__)) == len(tensortrain.__all__)
    assert tensortrain.__all__ == sorted(tensortrain.__all__)
