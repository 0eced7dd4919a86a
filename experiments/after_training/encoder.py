"""The sentence encoder as a subject: the cosine to its own embeddings, on film reviews and on sources of Python."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from decoder import library_files
from subject import Subject, mean_cosine
from torch import nn

from tensortrain.compression import sentence_embedding
from tensortrain.data import movie_snippets, text_batches

sys.path.insert(0, str(Path(__file__).parent.parent))

from installed import embed, load_encoder

__all__ = ["encoder"]


def encoder(config: Mapping[str, Any]) -> Subject:
    """``cosine``: mean over held-out snippets; ``cosine_other``: over pieces of Python's own library."""
    model, tokenizer = load_encoder()
    reviews, size = movie_snippets(), config["batch_size"]
    train, test = reviews.train_index.tolist(), reviews.test_index.tolist()[: config["judged"]]
    judged = text_batches([reviews.texts[i] for i in test], tokenizer, batch_size=size)
    other = text_batches(_pieces(config["other"]), tokenizer, batch_size=size)
    data = text_batches([reviews.texts[i] for i in train], tokenizer, batch_size=size, seed=config["seed"])
    references = [embed(model, batches) for batches in (judged, other)]

    def judge(changed: nn.Module) -> dict[str, float]:
        found = [embed(changed, batches) for batches in (judged, other)]
        cosines = [mean_cosine(a, b) for a, b in zip(references, found, strict=True)]
        return {"cosine": cosines[0], "cosine_other": cosines[1]}

    options = {"output": sentence_embedding, "n_batches": config["calibration_batches"]}
    return Subject(model, data, judge, options=options)


def _pieces(n: int) -> list[str]:
    """Ten lines from the middle of each of so many files."""
    found = []
    for path in library_files()[0][::3]:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if len(lines) >= 40:
            found.append("\n".join(lines[len(lines) // 2 :][:10]))
    return found[:n]
