"""What every test starts from: one seed, torch's default dtype, one thread per worker."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tensortrain.system.seeds import seed_all

# A machine that is busy with the other workers makes single examples slow at random.
settings.register_profile("tensortrain", deadline=None)
settings.load_profile("tensortrain")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What is loaded by now stays: no collection of garbage has to look through all of it again."""
    gc.collect()
    gc.freeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module with ``BOTH_DEFAULTS = True`` runs under both default dtypes of torch, where its folder sets one."""
    if getattr(metafunc.module, "BOTH_DEFAULTS", False) and "default_dtype" in metafunc.fixturenames:
        names = [f"default {dtype}".replace("torch.", "") for dtype in (torch.float64, torch.float32)]
        metafunc.parametrize("default_dtype", [torch.float64, torch.float32], indirect=True, ids=names)


@pytest.fixture
def default_dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Torch's default dtype in the tests of tensors, formats, manifolds and layers: float64 if not asked for both."""
    return getattr(request, "param", torch.float64)


@pytest.fixture
def double() -> None:
    """Double precision for one test."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def fixed_plans() -> Iterator[None]:
    """Plans from constants that do not depend on the machine."""
    from tensortrain.contract import CostModel, use_cost_model

    with use_cost_model(CostModel.reference("cpu")):
        yield


@pytest.fixture(autouse=True, scope="session")
def _plans_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What earlier runs found out about plans would hide what happens at a first call."""
    from tensortrain.contract import trials

    folder = tmp_path_factory.mktemp("plans")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "known_file", lambda name, key: folder / f"{name}.json")
        patch.setattr(trials, "_MOST_ROUNDS", 3)  # which of the fastest plans is taken matters to no test
        patch.setattr(trials, "_MOST_TURNS", 1)
        yield


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    seed_all(0)
    yield
    torch.set_default_dtype(dtype)
