"""The registry: build, describe, and what is said of unknown names."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from tensortrain.errors import KindError
from tensortrain.networks import ConvFC, build, describe, names, register


def test_names():
    assert {"conv-fc", "mlp"} <= set(names())


@pytest.mark.parametrize(
    "name, kwargs",
    [("conv-fc", {"image_size": 12, "width": 0.1, "hidden": (8, 4)}), ("mlp", {"hidden": (5,)})],
)
def test_describe_goes_through_json_and_back(name, kwargs):
    model = build(name, **kwargs)
    said = json.loads(json.dumps(describe(model)))
    again = build(said["name"], **said["kwargs"])
    assert describe(again) == said
    assert said["name"] == name
    again.load_state_dict(model.state_dict())


def test_describe_holds_for_direct_construction_copies_and_surgery():
    model = ConvFC(width=0.1, hidden=(8, 4))
    said = describe(model)
    model.classifier[0] = nn.Identity()
    assert describe(copy.deepcopy(model)) == said == {"name": "conv-fc", "kwargs": model.config}


def test_describe_of_others_is_none():
    class Special(ConvFC):
        pass

    assert describe(nn.Linear(2, 2)) is None
    assert describe(Special(width=0.1, hidden=(8, 4))) is None


def test_unknown_name_lists_the_names():
    with pytest.raises(KindError, match="expected one of conv-fc, mlp"):
        build("resnet")


def test_unknown_argument_is_named():
    with pytest.raises(KindError, match="depth"):
        build("mlp", depth=3)


def test_a_taken_name_is_refused():
    with pytest.raises(KindError, match="must be free"):
        register("mlp")(ConvFC)
    assert build("mlp")(torch.zeros(1, 784)).shape == (1, 10)
