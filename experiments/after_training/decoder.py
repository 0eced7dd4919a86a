"""A small decoder of the Llama kind, trained once on Python's own library and kept in the user's cache.

Rotary positions, grouped heads, a gated MLP, RMS norms, one table for reading and writing tokens.

    python experiments/after_training/decoder.py      # trains it where it is missing: half an hour on one core
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.compression import write_text_atomic
from tensortrain.data import movie_snippets
from tensortrain.data.fetch import cache_folder

__all__ = ["Decoder", "TokenBatches", "library_files", "load_decoder", "train_decoder"]

HERE = Path(__file__).parent
_NOT_READ = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__")
_HELD_OUT_SHARE = 12  # one file in so many
_SPECIAL = "<|file|>"


@dataclass(frozen=True)
class Decoder:
    """A trained decoder with what it was trained on.

    Attributes:
        model: ``LlamaForCausalLM`` in evaluation mode.
        tokenizer: Of the package ``tokenizers``.
        train, held_out: Tokens of the library's files, one after another.
        other: Tokens of a text of another kind, film reviews.
        log: How the training went.
    """

    model: nn.Module
    tokenizer: Any
    train: Tensor
    held_out: Tensor
    other: Tensor
    log: dict[str, Any]


class TokenBatches:
    """A re-iterable source of ``{"input_ids", "attention_mask"}``: windows of a text, in one fixed order.

    Args:
        tokens: int64 ``(n,)``.
        length: Tokens in a window.
        size: Windows in a batch.
        n_batches: How many there are; their windows lie evenly over the text.
    """

    def __init__(self, tokens: Tensor, *, length: int, size: int, n_batches: int) -> None:
        n = size * n_batches
        if len(tokens) < n * length:
            raise ValueError(f"a text must hold {n} windows of {length} tokens: it has {len(tokens)}. Ask for fewer.")
        starts = torch.linspace(0, len(tokens) - length, n).long()
        self._windows = tokens[starts[:, None] + torch.arange(length)]
        self._size = size

    def __len__(self) -> int:
        return len(self._windows) // self._size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for ids in self._windows.split(self._size):
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def library_files() -> tuple[list[Path], list[Path]]:
    """The sources of Python's standard library: to train on, and held out by a hash of their names."""
    top = Path(sysconfig.get_paths()["stdlib"])
    found = [path for path in sorted(top.rglob("*.py")) if not set(path.relative_to(top).parts) & set(_NOT_READ)]
    held_out = [path for path in found if _hash(path.relative_to(top).as_posix()) % _HELD_OUT_SHARE == 0]
    aside = set(held_out)
    return [path for path in found if path not in aside], held_out


def load_decoder(folder: Path | None = None) -> Decoder:
    """The decoder from the cache.

    Raises:
        FileNotFoundError: It was not trained yet.
    """
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

    folder = folder or _folder()
    if not (folder / "log.json").exists():
        raise FileNotFoundError(
            f"the decoder must be trained: {folder} has none, expected log.json. Run: python "
            "experiments/after_training/decoder.py"
        )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [_tokens(tokenizer, texts) for texts in _texts()]
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    return Decoder(model, tokenizer, *texts, json.loads((folder / "log.json").read_text()))


def train_decoder(config: dict[str, Any], folder: Path | None = None) -> Path:
    """Train it where it is missing; a killed training goes on where it was, and so does one with fewer rounds.

    Args:
        config: ``"model"``: of ``LlamaConfig``; ``"training"``: sizes, and ``"rounds"`` of steps and learning rates.

    Returns:
        The folder that ``load_decoder`` reads.
    """
    folder = folder or _folder()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(folder, config["model"]["vocab_size"])
    train, held_out, _ = (_tokens(tokenizer, texts) for texts in _texts())
    text = {"tokens": len(train), "held_out_tokens": len(held_out), "python": sys.version.split()[0]}
    text["text"] = hashlib.sha256(train.numpy().tobytes()).hexdigest()[:16]
    done = 0
    for settings in config["training"]["rounds"]:
        before = json.loads((folder / "log.json").read_text()) if (folder / "log.json").exists() else _NOTHING
        done += settings["steps"]
        if len(before["steps"]) >= done:
            continue
        run = _Training(config, settings, train, folder, before)
        run.finish(done)
        run.model.save_pretrained(folder)
        log = {"seconds_cpu": run.seconds, "steps": run.losses, **text, "config": config}
        write_text_atomic(folder / "log.json", json.dumps(log, indent=1) + "\n")
        run.state.unlink(missing_ok=True)
    return folder


_NOTHING: dict[str, Any] = {"steps": [], "seconds_cpu": 0.0}


class _Training:
    """A round: Adam, its rate falling to a tenth along half a cosine."""

    def __init__(
        self, config: dict[str, Any], own: dict[str, Any], tokens: Tensor, folder: Path, before: dict[str, Any]
    ) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.settings, self.tokens = {**config["training"], **own}, tokens
        self.state = folder / "training.pt"
        torch.manual_seed(self.settings["seed"])
        new = LlamaForCausalLM(LlamaConfig(**config["model"]))
        self.model = (LlamaForCausalLM.from_pretrained(folder) if before["steps"] else new).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.settings["lr"], betas=(0.9, 0.95), weight_decay=0.0
        )
        warm, steps = self.settings["warm_up"], self.settings["steps"]
        schedule = lambda k: min((k + 1) / warm, 0.55 + 0.45 * torch.cos(torch.tensor(torch.pi * k / steps)).item())  # noqa: E731
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)
        self.losses: list[float] = list(before["steps"])
        self.seconds = float(before["seconds_cpu"])
        self._resume()

    def finish(self, steps: int) -> None:
        while len(self.losses) < steps:
            start = time.process_time()
            self.losses.append(self._step())
            self.seconds += time.process_time() - start
            if len(self.losses) % 50 == 0:
                recent = sum(self.losses[-50:]) / 50
                print(f"step {len(self.losses)}: loss {recent:.3f}, {self.seconds:.0f} s", flush=True)
                self._keep()

    def _step(self) -> float:
        n, length = self.settings["windows"], self.settings["length"]
        draw = torch.Generator().manual_seed(1_000_003 * self.settings["seed"] + len(self.losses))
        starts = torch.randint(len(self.tokens) - length - 1, (n,), generator=draw)
        ids = self.tokens[starts[:, None] + torch.arange(length)]
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return float(loss.detach())

    def _parts(self) -> list[Any]:
        return [self.model, self.optimizer, self.schedule]

    def _keep(self) -> None:
        partial = self.state.with_suffix(".part")
        torch.save(
            {"parts": [p.state_dict() for p in self._parts()], "losses": self.losses, "seconds": self.seconds}, partial
        )
        partial.replace(self.state)

    def _resume(self) -> None:
        if self.state.exists():
            kept = torch.load(self.state, weights_only=True)
            self.losses, self.seconds = kept["losses"], kept["seconds"]
            for part, state in zip(self._parts(), kept["parts"], strict=True):
                part.load_state_dict(state)


def _texts() -> tuple[list[str], list[str], list[str]]:
    """For training, held out, and of another kind."""
    train, held_out = library_files()
    reviews = movie_snippets()
    other = [reviews.texts[k] for k in reviews.test_index.tolist()]
    return _read(train), _read(held_out), ["\n".join(other[k : k + 50]) for k in range(0, len(other), 50)]


def _read(paths: list[Path]) -> list[str]:
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def _tokenizer(folder: Path, size: int) -> Any:
    from tokenizers import ByteLevelBPETokenizer, Tokenizer

    path = folder / "tokenizer.json"
    if not path.exists():
        new = ByteLevelBPETokenizer()
        new.train_from_iterator(_texts()[0], vocab_size=size, special_tokens=[_SPECIAL], show_progress=False)
        new.save(str(path))
    return Tokenizer.from_file(str(path))


def _tokens(tokenizer: Any, texts: list[str]) -> Tensor:
    """All texts one after another, each after a token of its own."""
    first = tokenizer.token_to_id(_SPECIAL)
    encoded = tokenizer.encode_batch(texts)
    return torch.tensor([k for one in encoded for k in (first, *one.ids)])


def _hash(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


def _folder() -> Path:
    return cache_folder("after-training") / "decoder"


if __name__ == "__main__":
    print(train_decoder(json.loads((HERE / "config.json").read_text())["decoder"]))
