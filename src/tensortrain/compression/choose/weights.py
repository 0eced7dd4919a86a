"""What losing each layer would change of the model's output: what its errors are weighed by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.moments import Calibration
from tensortrain.compression.words import named

__all__ = ["carried", "weigh_layers"]

_OFF_THE_PATH = 0.01  # of the usual weight: for a layer that the output the user named does not depend on


def weigh_layers(
    layers: Sequence[FoundLayer], calibration: Calibration | None, found: Mapping[str, float], *, narrowed: bool
) -> tuple[dict[str, float], list[str]]:
    """What losing a layer wholly would change: a relative squared error times this adds up over layers.

    With gradients, the mean square of the model's output that the layer carries; else all layers count alike. A layer
    that no row or no gradient came to counts as the median one does: nothing is known of it, which is no reason to
    cut it away. One that an output named by the user does not depend on counts a hundredth of that.

    Args:
        found: What ``carried`` gives for each layer.
    """
    if calibration is None or not (calibration.output_grams or _missing(layers, calibration)):
        return {layer.name: 1.0 for layer in layers}, []
    known = sorted(weight for weight in found.values() if 0 < weight < math.inf)
    usual = known[len(known) // 2] if known else 1.0
    unknown = dict.fromkeys(calibration.grams, usual * (_OFF_THE_PATH if narrowed else 1.0))
    unknown |= {name: max(1.0, usual) for name in calibration.unmeasured}  # the output, as of layers in sequence
    weights = {name: weight if 0 < weight < math.inf else unknown.get(name, usual) for name, weight in found.items()}
    return weights, _unseen_notes(layers, found, calibration)


def _missing(layers: Sequence[FoundLayer], calibration: Calibration) -> bool:
    """Whether some layers have input statistics and some have none."""
    return len(calibration.grams) < len(layers) and bool(calibration.grams or calibration.unseen)


def carried(layer: FoundLayer, calibration: Calibration) -> float:
    """Share of the mean square of the model's output that a layer carries, as gradients tell; 0 where none came."""
    weighting = calibration.of(layer.name).weighting
    if weighting.is_plain:
        return 0.0
    if not calibration.output_grams:
        return 1.0
    if weighting.outputs is None:
        return 0.0
    matrix = layer.kernel.flatten(1)
    matrix = matrix.T if layer.weight.kind == "embedding" else matrix
    return weighting.energy_of_weight(matrix) / calibration.output_scale


def _unseen_notes(layers: Sequence[FoundLayer], found: Mapping[str, float], calibration: Calibration) -> list[str]:
    without = [layer for layer in layers if not 0 < found[layer.name] < math.inf]
    rows = [layer.name for layer in without if layer.name in calibration.unseen]
    gradients = [layer.name for layer in without if layer.name in calibration.grams]
    notes = []
    if calibration.unmeasured:
        notes.append(f"Input moments are not taken of {named(calibration.unmeasured)}: judged by the weights alone.")
    if rows:
        notes.append(f"No rows of the data (or only equal ones) came to {named(rows)}: judged by the weights alone.")
    if gradients:
        notes.append(
            f"No output that counts depends on {named(gradients)}, as far as gradients tell: judged by the "
            "weights and inputs alone."
        )
    return notes
