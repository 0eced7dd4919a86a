"""Sentence encoders on the command line: a small one with random weights, saved as transformers saves."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tensortrain.cli.app import run
from tensortrain.cli.hugging_face import is_transformers_folder, load_tokenizer, load_transformers
from tensortrain.data import text_batches, text_sets
from tensortrain.errors import CheckpointError, DataError, KindError
from tensortrain.io import load_pretrained

transformers = pytest.importorskip("transformers")

WORDS = ["a", "dull", "film", "with", "no", "heart", "but", "the", "cast", "is", "lovely", "and", "sharp"]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=24,
    )
    transformers.BertModel(config).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture
def snippets(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for k in range(120):
        picked = torch.randint(len(WORDS), (3 + k % 9,), generator=generator).tolist()
        rows.append(f"{k}\t{1.5 if WORDS.index('lovely') in picked else -1.5}\t{' '.join(WORDS[i] for i in picked)}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / text_sets._FILE).write_text("\n".join(rows) + "\n")
    return tmp_path / "data"


def json_of(line: str, capsys: Captured) -> Any:
    capsys.readouterr()
    assert run([*shlex.split(line), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def fails(line: str, capsys: Captured) -> str:
    assert run(shlex.split(line)) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_compress_evaluate_and_bench(encoder: Path, snippets: Path, tmp_path: Path, capsys: Captured) -> None:
    task = f"--dataset movie-snippets --data {snippets}"
    report = json_of(f"compress {encoder} --budget 1.3x {task} --steps 2 --allow-slower --out {tmp_path / 'o'}", capsys)
    assert report["params_after"] <= report["params_before"] / 1.3
    assert report["metric_name"] == "cosine to the original"
    assert report["metric_before"] == pytest.approx(1.0, abs=1e-6)
    assert 0 < report["metric_compressed"] < 1
    assert report["healing"][-1]["step"] == 2
    assert any(note.startswith("Data: movie snippets") for note in report["notes"])

    small = tmp_path / "o" / "model"  # with its tokenizer, and without the original's weights
    assert type(load_pretrained(small)).__name__ == "BertModel"
    probed = json_of(f"evaluate {small} {task}", capsys)
    assert probed["params"] == report["params_after"]
    assert 0 <= probed["accuracy"] <= 1
    assert probed["n_examples"] == 120 - round(120 * text_sets._N_TRAIN_SHARE)
    assert json_of(f"evaluate {encoder} {task} --limit 5", capsys)["n_examples"] == 5
    timed = json_of(f"bench {encoder} {small} --batch 1,2 --repeats 1 --shape 8", capsys)
    assert timed["shape"] == [8]
    assert len(timed["latency"]) == 4


def test_without_data_the_weights_decide(encoder: Path, tmp_path: Path, capsys: Captured) -> None:
    assert json_of(f"inspect {encoder}", capsys)["layers"][0]["kind"] == "Embedding"
    report = json_of(f"compress {encoder} --budget 1.2x --shape 8 --allow-slower --out {tmp_path / 'o'}", capsys)
    assert report["healing"] == []
    assert report["latency"]


def test_bad_input_gets_one_line(encoder: Path, snippets: Path, tmp_path: Path, capsys: Captured) -> None:
    task = f"--dataset movie-snippets --data {snippets}"
    assert "Pass --tokenizer" in fails(f"evaluate conv-fc {task}", capsys)
    assert "without tokenizer_config.json" in fails(f"evaluate {encoder} {task} --tokenizer {tmp_path}", capsys)
    assert "must fit the model" in fails(f"evaluate mlp {task} --tokenizer {encoder}", capsys)
    assert "1 or more" in fails(f"evaluate {encoder} {task} --limit 0", capsys)
    assert "movieReviewSnippets" in fails(f"evaluate {encoder} --dataset movie-snippets --data {tmp_path}", capsys)
    (tmp_path / "cut").mkdir()
    for file in encoder.iterdir():
        (tmp_path / "cut" / file.name).write_bytes(file.read_bytes()[: 300 if file.suffix == ".safetensors" else None])
    assert "a folder must hold a model that transformers loads" in fails(f"inspect {tmp_path / 'cut'}", capsys)
    assert not (tmp_path / "o").exists()


def test_folders_of_transformers(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_transformers_folder(encoder)
    assert not is_transformers_folder(tmp_path)
    verbosity = transformers.utils.logging.get_verbosity()
    assert not load_transformers(encoder).training
    assert transformers.utils.logging.get_verbosity() == verbosity
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="transformers loads"):
        load_transformers(tmp_path)
    with pytest.raises(KindError, match="a model without a folder"):
        load_tokenizer(None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"tensortrain\[hf\]"):
        load_transformers(encoder)


def test_batches_of_texts(encoder: Path) -> None:
    texts = [" ".join(WORDS[: 1 + k % 7]) for k in range(11)]
    batches = text_batches(texts, load_tokenizer(encoder), batch_size=4, max_length=6, seed=3)
    first = [batch["input_ids"] for batch in batches]
    assert len(first) == len(batches) == 3
    assert max(ids.shape[1] for ids in first) == 6
    assert all(map(torch.equal, first, [batch["input_ids"] for batch in batches]))
    lengths = batches.in_order([batch["attention_mask"].sum(dim=1) for batch in batches])
    assert lengths.tolist() == [min(6, 3 + k % 7) for k in range(11)]
    orders = set()
    for epoch in range(8):
        batches.set_epoch(epoch)
        orders.add(tuple(batch["input_ids"].shape[1] for batch in batches))
    assert len(orders) > 1
    with pytest.raises(DataError, match="texts has 0"):
        text_batches([], load_tokenizer(encoder))
