"""Stacked LSTMs that tell which language is spoken, trained here in a minute and kept in the user's cache."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from subject import Subject, divergence, in_batches, mean_cosine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tensortrain.compression import cross_entropy_loss, fit
from tensortrain.data import SpeechData, spoken_prompts
from tensortrain.data.fetch import cache_folder

sys.path.insert(0, str(Path(__file__).parent.parent))

from installed import Listener

__all__ = ["listener"]


def listener(config: Mapping[str, Any]) -> Subject:
    """``accuracy`` on held-out prompts; ``cosine`` of the logits and ``kl`` there; ``kl_other``: under noise.

    ``hidden_cosine``: of all outputs of the recurrent layers, which no layer after them can make look better.
    """
    data = spoken_prompts()
    model = _trained(config, data)
    heard, labels = data.features[data.test_index], data.labels[data.test_index]
    noisy = _under_noise(heard, config["noise_db"])
    references = [in_batches(model, x) for x in (heard, noisy)]
    hidden = _hidden(model, heard)

    def judge(changed: nn.Module) -> dict[str, float]:
        found = [in_batches(changed, x) for x in (heard, noisy)]
        return {
            "accuracy": float((found[0].argmax(-1) == labels).float().mean()),
            "cosine": mean_cosine(references[0], found[0]),
            "hidden_cosine": mean_cosine(hidden, _hidden(changed, heard)),
            "kl": divergence(references[0], found[0]),
            "kl_other": divergence(references[1], found[1]),
        }

    batches = _batches(data, config["batch_size"], shuffle=False)
    return Subject(model, list(batches), judge, options={"n_batches": config["calibration_batches"]})


def _batches(data: SpeechData, size: int, *, shuffle: bool) -> DataLoader[Any]:
    index = data.train_index
    if not shuffle:  # languages lie one after another
        index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
    return DataLoader(TensorDataset(data.features[index], data.labels[index]), batch_size=size, shuffle=shuffle)


def _trained(config: Mapping[str, Any], data: SpeechData) -> nn.Module:
    path = cache_folder("after-training") / f"listener-{config['hidden']}-{config['layers']}-{config['seed']}.pt"
    torch.manual_seed(config["seed"])
    rnn = nn.LSTM(data.features.shape[-1], config["hidden"], config["layers"], batch_first=True)
    model = Listener(rnn, config["hidden"], config["dropout"], data)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        batches = _batches(data, config["batch_size"], shuffle=True)
        fit(model, batches, loss=cross_entropy_loss(), lr=config["lr"], seed=config["seed"], **config["fit"])
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return model.eval()


def _under_noise(features: Tensor, db: float) -> Tensor:
    """Logarithms of powers with noise added that is so far below the mean power of each recording."""
    power = features.exp()
    noise = power.mean(dim=(1, 2), keepdim=True) * 10 ** (-db / 10)
    draws = torch.empty_like(power).exponential_(generator=torch.Generator().manual_seed(0))
    return (power + noise * draws).log()


@torch.no_grad()
def _hidden(model: Any, x: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model.rnn((part - model.mean) / model.std)[0] for part in x.split(100)])
