"""The decoder of ``decoder.py`` as a subject: how much less it knows of unseen files, and how it strays elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from decoder import TokenBatches, load_decoder
from subject import Subject, divergence
from torch import Tensor, nn

__all__ = ["language_model"]


def language_model(config: Mapping[str, Any]) -> Subject:
    """``nats``: mean loss a token on held-out files; ``kl``: from the original there; ``kl_other``: on film reviews.

    ``nats`` less the original's is the increase of log perplexity.
    """
    found, length, size = load_decoder(), config["length"], config["batch_size"]
    judged = TokenBatches(found.held_out, length=length, size=size, n_batches=config["judge_batches"])
    other = TokenBatches(found.other, length=length, size=size, n_batches=config["other_batches"])
    data = TokenBatches(found.train, length=length, size=size, n_batches=config["calibration_batches"])

    @torch.no_grad()
    def judge(model: nn.Module) -> dict[str, float]:
        nats, kl = _figures(found.model, model, judged)
        _, kl_other = _figures(found.model, model, other)
        return {"nats": nats, "kl": kl, "kl_other": kl_other}

    options = {"n_batches": config["calibration_batches"], "output": "logits"}
    return Subject(found.model, data, judge, options=options)


def _figures(original: nn.Module, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> tuple[float, float]:
    """Mean loss a token, and mean divergence from the original."""
    model.eval()
    nats, kl = [], []
    for batch in batches:
        ids = batch["input_ids"]
        logits, reference = model(**batch).logits[:, :-1], original(**batch).logits[:, :-1]
        nats.append(float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())))
        kl.append(divergence(reference, logits))
    return sum(nats) / len(nats), sum(kl) / len(kl)
