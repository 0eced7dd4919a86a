"""Thirty small models as people write them, each taken through all that the library does with a model.

A new model is a function of about ten lines in one of the gallery_*.py; what must hold is in gallery_checks.py.
"""

from __future__ import annotations

from pathlib import Path

import gallery_general  # noqa: F401  # hang their models in the gallery
import gallery_images  # noqa: F401
import gallery_text  # noqa: F401
import pytest
from gallery_case import CASES
from gallery_checks import CHECKS, Run, Unavailable

from tensortrain.contract import CostModel, use_cost_model
from tensortrain.errors import TTError


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_what_must_hold(name: str, tmp_path: Path) -> None:
    make, missing = CASES[name]
    if missing is not None:
        pytest.skip(f"needs {missing}")
    with use_cost_model(CostModel.reference("cpu")):
        run = Run(make(), tmp_path)
        if run.case.refuses is not None:
            with pytest.raises(TTError, match=run.case.refuses):
                run.healed  # noqa: B018
            assert not run.touched, "; ".join(run.touched)
            return
        faults = [f"{what}: {fault}" for what in CHECKS if (fault := _fault(run, what))]
    if faults:
        pytest.fail("\n".join([name, *faults]), pytrace=False)


def _fault(run: Run, what: str) -> str:
    """What is wrong, in one line; all checks are tried, so that one run tells everything."""
    try:
        CHECKS[what](run)
    except Unavailable:
        return ""
    except Exception as error:
        first = str(error).strip().partition("\n")[0]  # pytest goes on with what it compared
        return f"{type(error).__name__}: {first:.300}"
    return ""


def test_the_gallery_is_large() -> None:
    assert len(CASES) >= 30
