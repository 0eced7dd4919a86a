"""A sentiment classifier on movie snippets whose table of words is full, a tensor train, or of low rank.

The question of "Tensorized Embedding Layers" (arXiv:1901.10787) on data that installs as a package. A word's row has
256 numbers. One model takes the mean of a text's rows and a linear layer: it is nearly all table, but reads a single
direction of the rows, so that a low rank costs it nothing. The other, as published, has a recurrent layer between.
The words are those of the texts trained on, the most frequent first; words never met there are left out of a text.
A train cares for the order of words, since neighbours share cores: one has them sorted by how much more often the
training texts with a word are liked, which is nothing to the other tables. A part of the training texts is kept from
training: it says after which epoch the weights are taken, and which learning rate of the list each kind of table gets.

    python experiments/tt_embedding/run.py --out runs/tt_embedding             # everything in config.json
    python experiments/tt_embedding/run.py --out runs/tt_embedding --seed 0    # one seed
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression import cross_entropy_loss, evaluate_accuracy, fit, provenance
from tensortrain.data import movie_snippets, text_batches
from tensortrain.viz.report.figures import save_figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from study import by, once, record, spread  # noqa: E402

PADDING = 0
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[!?]")


class Words:
    """A tokenizer in the manner of transformers: ids by frequency in the given texts, from 1; 0 pads."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = Counter(word for text in texts for word in _words(text))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        self.ids = {word: k for k, word in enumerate(ranked, start=PADDING + 1)}

    def __len__(self) -> int:
        return len(self.ids) + 1

    def __call__(self, texts: Sequence[str], *, max_length: int, **_: Any) -> dict[str, Tensor]:
        known = [[self.ids[word] for word in _words(text) if word in self.ids][:max_length] for text in texts]
        width = max(1, *map(len, known))
        ids = torch.tensor([row + [PADDING] * (width - len(row)) for row in known])
        return {"input_ids": ids, "attention_mask": (ids != PADDING).long()}


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


class Labelled:
    """Batches of texts with their labels."""

    def __init__(self, texts: Sequence[str], labels: Tensor, words: Words, batch_size: int, seed: int | None) -> None:
        self.batches = text_batches(texts, words, batch_size=batch_size, seed=seed)
        self.labels, self.batch_size, self.seed = labels, batch_size, seed

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        # Numbers in the order of the batches, sorted back by text, say where each text is met.
        order = self.batches.in_order([torch.arange(len(self.labels))]).argsort()
        start = 0
        for batch in self.batches:
            stop = start + len(batch["input_ids"])
            yield {**batch, "labels": self.labels[order[start:stop]]}
            start = stop


class Snippets:
    """The texts in three parts, and the words of the first: to train on, to choose by, to test."""

    def __init__(self, config: dict[str, Any], data: str | None) -> None:
        self.found, self.size = movie_snippets(data), config["batch_size"]
        n = len(self.found.train_index) - config["n_validation"]
        # The published split is a random order, so its last training texts are as good as any.
        self.train_index, self.validation_index = self.found.train_index[:n], self.found.train_index[n:]
        self.words = Words(self._texts(self.train_index))

    def by_polarity(self) -> Tensor:
        """Where each word stands when they are sorted by how much more often the training texts with it are liked."""
        counts = torch.ones(2, len(self.words))  # one text more of each kind, with all words
        for text, label in zip(
            self._texts(self.train_index), self.found.labels[self.train_index].tolist(), strict=True
        ):
            ids = {self.words.ids[word] for word in _words(text)}
            counts[int(label), list(ids)] += 1
        score = (counts[1] / counts[1, 0]).log() - (counts[0] / counts[0, 0]).log()
        order = score[PADDING + 1 :].argsort(stable=True) + PADDING + 1
        places = torch.zeros(len(self.words), dtype=torch.long)
        places[order] = torch.arange(PADDING + 1, len(self.words))
        return places

    def training(self, seed: int) -> Labelled:
        return self._batches(self.train_index, seed)

    def validation(self) -> Labelled:
        return self._batches(self.validation_index, None)

    def test(self) -> Labelled:
        return self._batches(self.found.test_index, None)

    def _texts(self, index: Tensor) -> list[str]:
        return [self.found.texts[i] for i in index.tolist()]

    def _batches(self, index: Tensor, seed: int | None) -> Labelled:
        return Labelled(self._texts(index), self.found.labels[index], self.words, self.size, seed)


class Classifier(nn.Module):
    """Rows of a text's words, a GRU if it has a size, the mean over the words, two logits."""

    def __init__(self, table: nn.Module, n_dims: int, *, hidden: int | None, dropout: float) -> None:
        super().__init__()
        self.table = table
        self.recurrent = nn.GRU(n_dims, hidden, batch_first=True) if hidden else None
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden or n_dims, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(input_ids)
        if self.recurrent is not None:
            x, _ = self.recurrent(self.dropout(x))  # padding comes last: it changes no state before
        mask = attention_mask[..., None].to(x.dtype)
        mean = (x * mask).sum(1) / mask.sum(1).clamp_min(1)  # a text may have no known word
        return self.head(self.dropout(mean))


class Reordered(nn.Module):
    """A table whose words stand in another order."""

    places: Tensor

    def __init__(self, table: nn.Module, places: Tensor) -> None:
        super().__init__()
        self.table = table
        self.register_buffer("places", places)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(self.places[ids])


def make_table(options: dict[str, Any] | None, snippets: Snippets, config: dict[str, Any]) -> nn.Module:
    """Entries of the same standard deviation, whatever the kind of table."""
    n_words, n_dims, std = len(snippets.words), config["embedding_dim"], config["table_std"]
    if options is not None:
        layer = {key: value for key, value in options.items() if key != "words"}
        table = tt.nn.Embedding(n_words, n_dims, padding_idx=PADDING, init=std, **layer)
        return Reordered(table, snippets.by_polarity()) if options.get("words") == "by polarity" else table
    table = nn.Embedding(n_words, n_dims, padding_idx=PADDING)
    with torch.no_grad():
        table.weight.mul_(std)  # torch's entries have standard deviation 1, and zeros in the padding row
    return table


class BestEpoch:
    """The accuracy on the validation part after each epoch; keeps the weights of the (first) best one."""

    def __init__(self, data: Labelled) -> None:
        self.data, self.accuracies, self.state = data, [], {}

    def __call__(self, model: nn.Module) -> float:
        accuracy = evaluate_accuracy(model, self.data)
        if accuracy > max(self.accuracies, default=0.0):
            self.state = {name: value.clone() for name, value in model.state_dict().items()}
        self.accuracies.append(accuracy)
        return accuracy


def run(kind: str, name: str, lr: float, config: dict[str, Any], seed: int, snippets: Snippets) -> dict[str, Any]:
    torch.manual_seed(seed)
    n_words, n_dims, chosen = len(snippets.words), config["embedding_dim"], config["models"][kind]
    table = make_table(config["tables"][name], snippets, config)
    model = Classifier(table, n_dims, hidden=chosen["hidden"], dropout=config["dropout"])
    start = time.perf_counter()
    best = BestEpoch(snippets.validation())
    train = snippets.training(seed)
    options = {**config["fit"], "epochs": chosen["epochs"]}
    done = fit(model, train, loss=cross_entropy_loss(), lr=lr, evaluate=best, seed=seed, **options)
    model.load_state_dict(best.state)
    params = sum(p.numel() for p in table.parameters())
    accuracy = max(best.accuracies)
    return {
        "model": kind,
        "table": name,
        "lr": lr,
        "seed": seed,
        "n_words": n_words,
        "params": params,
        "compression": n_words * n_dims / params,
        "model_params": sum(p.numel() for p in model.parameters()),
        "best_epoch": best.accuracies.index(accuracy) + 1,
        "validation_accuracy": accuracy,
        "validation_accuracies": best.accuracies,
        "test_accuracy": evaluate_accuracy(model, snippets.test()),
        "train_losses": [row["loss"] for row in done.history],
        "seconds": round(time.perf_counter() - start, 1),
        "provenance": provenance(seed=seed),
    }


def summarize(runs: list[dict[str, Any]], config: dict[str, Any], target: Path) -> None:
    """One row per model and kind of table, at the rate with the best mean on the validation part."""
    rows = [row_of(found) for found in by(runs, "model", "table").values()]
    rows.sort(key=lambda row: (list(config["models"]).index(row["model"]), list(config["tables"]).index(row["table"])))
    full = {row["model"]: row["test_accuracy_mean"] for row in rows if row["table"] == "full"}
    for row in rows:
        over = row["test_accuracy_mean"] - full[row["model"]] if row["model"] in full else None
        row["points_over_full"] = None if over is None else 100 * over
    record(target, rows, runs)
    save_figure(figure(rows), target / "results.png")
    print(f"{rows[0]['n_words']:,} rows in the table, that of padding among them")
    print(
        f"{'model':<6} {'table':<20} {'numbers':>10} {'smaller':>8} {'lr':>6} {'epoch':>6} {'test accuracy':>18} "
        f"{'over full':>10} {'seeds':>6}"
    )
    for row in rows:
        over = "" if row["points_over_full"] is None else f"{row['points_over_full']:+.2f}"
        print(
            f"{row['model']:<6} {row['table']:<20} {row['params']:>10,} {row['compression']:>7.0f}x {row['lr']:>6g} "
            f"{row['best_epoch_mean']:>6.1f} {row['test_accuracy_mean']:>9.4f} +- {row['test_accuracy_std']:.4f} "
            f"{over:>10} {row['n']:>6}"
        )


def row_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    rates = by(found, "lr").values()
    chosen = max(rates, key=lambda same: spread(same, "validation_accuracy")[0])
    row = {key: chosen[0][key] for key in ("model", "table", "n_words", "params", "compression", "model_params", "lr")}
    for key in ("validation_accuracy", "test_accuracy", "best_epoch", "seconds"):
        row[f"{key}_mean"], row[f"{key}_std"] = spread(chosen, key)
    return {**row, "n": len(chosen)}


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Test accuracy of each kind of table, mean and standard deviation over seeds; one panel per model."""
    groups = by(rows, "model")
    width = 1.3 * max(len(found) for found in groups.values())  # of the longest name, for each table
    drawing = Figure(figsize=(width * len(groups), 3.4), layout="constrained")
    panels = drawing.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, ((kind,), found) in zip(panels, groups.items(), strict=True):
        names = [f"{row['table']}\n{row['compression']:.0f}x" for row in found]
        means = [100 * row["test_accuracy_mean"] for row in found]
        errors = [100 * row["test_accuracy_std"] for row in found]
        axes.errorbar(names, means, errors, fmt="o", capsize=4)
        axes.margins(x=0.2)
        axes.tick_params(axis="x", labelsize=7)
        axes.set(title=kind)
        axes.grid(axis="y", alpha=0.4)
    panels[0].set(ylabel="test accuracy, %")
    return drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tt_embedding"))
    parser.add_argument("--data", help="folder or archive with the snippets")
    parser.add_argument("--config", type=Path, default=HERE / "config.json")
    parser.add_argument("--seed", type=int, action="append", help="only these seeds")
    parser.add_argument("--model", action="append", help="only these models")
    parser.add_argument("--record", type=Path, default=HERE, help="where results.json and results.png go")
    given = parser.parse_args()
    config = json.loads(given.config.read_text())
    given.out.mkdir(parents=True, exist_ok=True)
    snippets = Snippets(config, given.data)
    for seed, kind, name, lr in itertools.product(
        given.seed or config["seeds"], given.model or config["models"], config["tables"], config["lrs"]
    ):
        path = given.out / f"{kind}-{name.replace(' ', '_')}-{lr:g}-{seed}.json"
        found = once(path, functools.partial(run, kind, name, lr, config, seed, snippets))
        print(
            f"seed {seed} {kind} {name} lr {lr:g}: validation {found['validation_accuracy']:.4f} after epoch "
            f"{found['best_epoch']} in {found['seconds']:.0f} s",
            flush=True,
        )
    runs = [json.loads(path.read_text()) for path in sorted(given.out.glob("*-*-*-*.json"))]
    summarize(runs, config, given.record)


if __name__ == "__main__":
    main()
