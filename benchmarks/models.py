"""Whole models by one call: how long ``compress`` takes, and how fast what it returns runs.

    python benchmarks/models.py --threads 2 --out benchmarks/results/models.json    # the record
    python benchmarks/models.py --quick                                             # does everything work? small models
    python benchmarks/models.py --model bert --budget 2x --keep /tmp/models         # compress now ..
    python benchmarks/models.py --model bert --budget 2x --kept /tmp/models         # .. and time later, alone

Models are of transformers' classes with random weights whose singular values fall like ``k**-0.7`` at the norm that
they are initialised with, as those of trained layers roughly do. They are compressed with default arguments and some
batches of data, not healed, and run beside the dense model in turns, each asleep before its turn: thread pools spin
for a while after a call, and who follows at once pays for it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.system.files import write_text_atomic
from tensortrain.system.observer import Silent
from tensortrain.system.provenance import provenance

DECAY = 0.7
BUDGETS = ("2x", "4x")
BATCHES = (1, 8)
ASLEEP_S = 0.25
FEWEST_TURNS, MOST_TURNS = 7, 60


class Parts(Silent):
    """Seconds of every part of a call that tells an observer of it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[tuple[str, float]] = []

    def on_start(self, name: str, total: int | None) -> None:
        self._open.append((name, time.perf_counter()))

    def on_end(self) -> None:
        name, start = self._open.pop()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


# -- models -------------------------------------------------------------------------------------------------


def resnet18(quick: bool) -> tuple[nn.Module, Callable[[int], dict[str, Tensor]]]:
    """A ResNet-18 on images."""
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = [16, 32] if quick else [64, 128, 256, 512]
    config = ResNetConfig(
        embedding_size=sizes[0],
        hidden_sizes=sizes,
        depths=[2] * len(sizes),
        layer_type="basic",
        num_labels=10 if quick else 1000,
    )
    side = 64 if quick else 224
    return ResNetForImageClassification(config), lambda b: {"pixel_values": torch.randn(b, 3, side, side)}


def vit(quick: bool) -> tuple[nn.Module, Callable[[int], dict[str, Tensor]]]:
    """A vision transformer as wide as the small one, with six layers: 384, patches of 16."""
    from transformers import ViTConfig, ViTForImageClassification

    width, side = (64, 64) if quick else (384, 224)
    config = ViTConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=width // 32 if quick else 6,
        num_hidden_layers=2 if quick else 6,
        image_size=side,
        num_labels=10 if quick else 1000,
    )
    return ViTForImageClassification(config), lambda b: {"pixel_values": torch.randn(b, 3, side, side)}


def bert(quick: bool) -> tuple[nn.Module, Callable[[int], dict[str, Tensor]]]:
    """An encoder of texts with four layers of 512, 128 tokens an example."""
    from transformers import BertConfig, BertForSequenceClassification

    width, n_tokens, vocabulary = (64, 16, 500) if quick else (512, 128, 30522)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=width // 64 if not quick else 2,
        num_hidden_layers=2 if quick else 4,
    )

    def example(b: int) -> dict[str, Tensor]:
        ids = torch.randint(0, vocabulary, (b, n_tokens))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return BertForSequenceClassification(config), example


def wav2vec2(quick: bool) -> tuple[nn.Module, Callable[[int], dict[str, Tensor]]]:
    """An encoder of speech as wide as the base one, with four layers, a second an example."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    small = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "conv_dim": (32,) * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    }
    config = Wav2Vec2Config(**(small if quick else {"num_hidden_layers": 4}))
    return Wav2Vec2Model(config), lambda b: {"input_values": torch.randn(b, 4000 if quick else 16000)}


MODELS = {"resnet18": resnet18, "vit": vit, "bert": bert, "wav2vec2": wav2vec2}


@torch.no_grad()
def let_fall_(model: nn.Module) -> nn.Module:
    """Give every weight matrix singular values like ``k ** -DECAY``, at its norm."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)) and not hasattr(
            module, "parametrizations"
        ):
            weight = module.weight
            n_rows, n_columns = weight.flatten(1).shape
            rank = min(n_rows, n_columns)
            left, right = (torch.linalg.qr(torch.randn(n, rank))[0] for n in (n_rows, n_columns))
            falling = torch.arange(1.0, rank + 1) ** -DECAY
            weight.copy_(((left * (falling * (weight.norm() / falling.norm()))) @ right.T).reshape(weight.shape))
    return model


# -- one cell -----------------------------------------------------------------------------------------------


def build(name: str, args: argparse.Namespace) -> tuple[nn.Module, Callable[[int], dict[str, Tensor]]]:
    torch.manual_seed(args.seed)
    model, example = MODELS[name](args.quick)
    return let_fall_(model).eval(), example


def compressed(name: str, budget: str, args: argparse.Namespace) -> dict[str, Any]:
    """The dense and the compressed model, and how long it took."""
    model, example = build(name, args)
    data = [example(8) for _ in range(4)]
    parts, start, cpu = Parts(), time.perf_counter(), time.process_time()
    result = tt.compress(model, budget=budget, data=data, heal=False, observer=parts)
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    layers = [layer for layer in result.plan.layers if layer.spec is not None]
    errors = [layer.rel_error or 0.0 for layer in layers]
    facts = {
        "model": name,
        "budget": budget,
        "params_before": result.plan.params_before,
        "params_after": result.plan.params_after,
        "n_layers": len(result.plan.layers),
        "n_compressed": len(layers),
        "rms_error": math.sqrt(sum(e * e for e in errors) / max(1, len(errors))),
        "output_error": output_error(model, result.model, example(8)),
        "compress_s": seconds,
        "cpu_s": cpu_s,
        "parts_s": {**parts.seconds, "rest": seconds - sum(parts.seconds.values())},
    }
    return {"dense": model, "compressed": result.model, "plan": str(result.plan), "facts": facts}


@torch.inference_mode()
def output_error(dense: nn.Module, other: nn.Module, x: dict[str, Tensor]) -> float:
    """Relative error of the first output."""
    outputs = [next(iter(model.eval()(**x).values())) for model in (dense, other)]
    return float((outputs[0] - outputs[1]).norm() / outputs[0].norm())


@torch.inference_mode()
def timed(found: dict[str, Any], batch: int, example: Callable[[int], dict[str, Tensor]], limit_s: float) -> Any:
    """Median seconds of both models, which take turns, each asleep before its own."""
    x = example(batch)
    models = {"dense": found["dense"].eval(), "compressed": found["compressed"].eval()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model(**x)
        model(**x)
    start, order = time.perf_counter(), random.Random(0)
    for turn in range(MOST_TURNS):
        if turn >= FEWEST_TURNS and time.perf_counter() - start > limit_s:
            break
        for name in order.sample(list(models), 2):
            time.sleep(ASLEEP_S)
            begun = time.perf_counter()
            models[name](**x)
            seconds[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {f"{name}_ms": 1e3 * median for name, median in medians.items()} | {
        "batch": batch,
        "n_turns": len(seconds["dense"]),
        "speedup": medians["dense"] / medians["compressed"],
    }


def cell(name: str, budget: str, args: argparse.Namespace) -> dict[str, Any]:
    file = f"{name}-{budget}.pt"
    if args.kept:
        found = torch.load(Path(args.kept) / file, weights_only=False)
    else:
        found = compressed(name, budget, args)
    facts: dict[str, Any] = found["facts"]
    if args.plans:
        print(found["plan"])
    if args.keep:
        Path(args.keep).mkdir(parents=True, exist_ok=True)
        torch.save(found, Path(args.keep) / file)
        print(told({**facts, "times": []}), flush=True)
        return facts
    _, example = MODELS[name](args.quick)
    facts["times"] = [timed(found, batch, example, args.seconds) for batch in BATCHES]
    print(told(facts), flush=True)
    return facts


def told(facts: dict[str, Any]) -> str:
    times = "".join(
        f"  b{t['batch']}: {t['dense_ms']:.1f} / {t['compressed_ms']:.1f} ms = {t['speedup']:.2f}x"
        for t in facts["times"]
    )
    parts = " ".join(f"{name} {seconds:.1f}" for name, seconds in facts["parts_s"].items())
    return (
        f"{facts['model']:<9} {facts['budget']:<3} {facts['params_before'] / facts['params_after']:.2f}x fewer, "
        f"{facts['n_compressed']}/{facts['n_layers']} layers, error {facts['rms_error']:.3f}, output "
        f"{facts['output_error']:.3f}, {facts['compress_s']:.1f} s, processors "
        f"{facts['cpu_s']:.1f} s ({parts}){times}"
    )


def beside_others(record: dict[str, Any], file: Path) -> dict[str, Any]:
    """A record with the rows of other models that a file of the same commit holds."""
    if not file.exists():
        return record
    earlier = json.loads(file.read_text())
    if earlier["commit"] != record["commit"] or earlier["quick"] != record["quick"]:
        raise SystemExit(
            f"{file} is of {earlier['commit']}, and this run of {record['commit']}: record all models again"
        )
    new = {(row["model"], row["budget"]) for row in record["rows"]}
    rows = [row for row in earlier["rows"] if (row["model"], row["budget"]) not in new]
    return {**record, "rows": [*rows, *record["rows"]], "wall_s": round(earlier["wall_s"] + record["wall_s"], 1)}


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    record = {**provenance(seed=args.seed), "quick": args.quick, "rows": []}
    for name in args.model or MODELS:
        for budget in args.budget or BUDGETS:
            record["rows"].append(cell(name, budget, args))
    record["wall_s"] = round(time.perf_counter() - began, 1)
    for budget in () if args.keep else args.budget or BUDGETS:
        speedups = [t["speedup"] for row in record["rows"] if row["budget"] == budget for t in row["times"]]
        print(f"{budget}: geometric mean {geometric_mean(speedups):.2f}x, least {min(speedups):.2f}x")
    if args.out:
        record = beside_others(record, Path(args.out)) if args.add else record
        write_text_atomic(args.out, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(MODELS), help="one of them; may be repeated")
    parser.add_argument("--budget", action="append", help="such as 2x; may be repeated")
    parser.add_argument("--quick", action="store_true", help="small models: does everything work?")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=8.0, help="of turns per cell and batch size")
    parser.add_argument("--keep", help="folder to keep both models in, in place of timing them")
    parser.add_argument("--kept", help="folder of models to time, in place of compressing")
    parser.add_argument("--plans", action="store_true", help="print the plans")
    parser.add_argument("--out", help="file of the record")
    parser.add_argument("--add", action="store_true", help="models that the file holds already stay in it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
