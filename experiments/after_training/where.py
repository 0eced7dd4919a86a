"""Which parts of a compressed model carry its loss? Each is put back as it was, and each alone is compressed.

python experiments/after_training/where.py encoder-2-ours-refits --part 'encoder.layer.[0-9]' --part embeddings
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from run import SUBJECTS  # noqa: E402
from subject import Judge  # noqa: E402


def parts_of(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of modules that one of the patterns matches whole."""
    return [name for name, _ in model.named_modules() if any(re.fullmatch(one, name) for one in patterns)]


def exchanged(model: nn.Module, other: nn.Module, name: str) -> nn.Module:
    """A copy of a model with one part of another."""
    found = copy.deepcopy(model)
    found.set_submodule(name, copy.deepcopy(other.get_submodule(name)))
    return found


def losses(original: nn.Module, small: nn.Module, parts: Sequence[str], judge: Judge) -> Iterator[tuple[str, str, str]]:
    """For every part: the figures with it put back, and with it alone compressed."""
    for name in parts:
        yield name, _shown(judge, small, original, name), _shown(judge, original, small, name)


def _shown(judge: Judge, model: nn.Module, other: nn.Module, name: str) -> str:
    try:
        found = judge(exchanged(model, other, name))
    except RuntimeError:  # a reader of hidden units with other makers
        return "does not fit"
    return ", ".join(f"{key} {value:.5f}" for key, value in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of a model that run.py kept")
    parser.add_argument("--out", type=Path, default=Path("runs/after_training"))
    parser.add_argument("--part", action="append", required=True, help="regular expression for names of modules")
    parser.add_argument("--judged", type=int, help="fewer examples to judge by")
    given = parser.parse_args()
    name = given.name.split("-")[0]
    config = json.loads((HERE / "config.json").read_text())["subjects"][name]
    subject = SUBJECTS[name]({**config, **({"judged": given.judged} if given.judged else {})})
    small = torch.load(given.out / "models" / f"{given.name}.pt", weights_only=False)
    print("all", ", ".join(f"{key} {value:.5f}" for key, value in subject.judge(small).items()), flush=True)
    for part, back, alone in losses(subject.model, small, parts_of(subject.model, given.part), subject.judge):
        print(f"{part}: put back {back}; alone {alone}", flush=True)


if __name__ == "__main__":
    main()
