"""Models of text and other sequences; those of transformers where it is installed."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from gallery_case import Case, case, drawn_classes, needs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence

V = 64  # tokens


def written_by(logits_of: Any, n: int = 16, length: int = 12, start: int | None = None) -> Tensor:
    """Texts that the model finds likely: drawn from it token by token."""
    ids = torch.randint(1, V, (n, 1)) if start is None else torch.full((n, 1), start)
    for _ in range(length - 1):
        ids = torch.cat([ids, drawn_classes(logits_of(ids)[:, -1])[:, None]], dim=1)
    return ids


class Block(nn.Module):
    def __init__(self, n: int = 32, n_heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2, self.n_heads = nn.LayerNorm(n), nn.LayerNorm(n), n_heads
        self.q, self.k, self.v, self.out = (nn.Linear(n, n, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(n, 4 * n), nn.Linear(4 * n, n)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (each(h).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class NanoGpt(nn.Module):
    """``(logits, loss)`` of ``(idx, targets)``, where the targets are shifted already."""

    def __init__(self, tie: str = "") -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(V, 32), nn.Embedding(16, 32)
        self.blocks, self.norm = nn.Sequential(Block(), Block()), nn.LayerNorm(32)
        self.head = nn.Linear(32, V, bias=False)
        if tie == "object":
            self.head.weight = self.tokens.weight
        if tie == "data":
            self.head.weight.data = self.tokens.weight.data

    def logits(self, idx: Tensor) -> Tensor:
        h = self.tokens(idx) + self.places(torch.arange(idx.shape[1]))
        return self.head(self.norm(self.blocks(h)))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.logits(idx)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss


def shifted_texts(net: Any) -> tuple[Tensor, Tensor]:
    text = written_by(net.logits, length=13)
    return text[:, :-1], text[:, 1:]


@case
def nano_gpt() -> Case:
    return Case(NanoGpt, shifted_texts)


@case
def tied_by_object() -> Case:
    return Case(lambda: NanoGpt("object"), shifted_texts)


@case
def tied_by_data() -> Case:
    return Case(lambda: NanoGpt("data"), shifted_texts)


class CausalLm(NanoGpt):
    """Logits alone, from the names that transformers uses; labels are the input itself, -100 where padded."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        return self.logits(input_ids)


@case
def causal_lm_with_labels_not_shifted() -> Case:
    def batch(net: Any) -> dict[str, Tensor]:
        ids = written_by(net.logits)
        mask = torch.arange(12) < torch.randint(8, 13, (16, 1))
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}

    return Case(CausalLm, batch)


class ReturnsItsLoss(NanoGpt):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:  # type: ignore[override]
        logits, loss = self.logits(input_ids), None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


@case
def returns_its_own_loss() -> Case:
    def batch(net: Any) -> dict[str, Tensor]:
        ids = written_by(net.logits)
        return {"input_ids": ids, "labels": ids.clone()}

    return Case(ReturnsItsLoss, batch)


class Translator(nn.Module):
    """torch's own nn.Transformer between two vocabularies; takes source and what was said so far."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(V, 32), nn.Embedding(V, 32)
        self.net = nn.Transformer(32, 4, 1, 1, 64, dropout=0.1, batch_first=True)
        self.head = nn.Linear(32, V)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.head(self.net(self.source(source), self.target(target), tgt_mask=mask, tgt_is_causal=True))


@case
def encoder_decoder_of_torch() -> Case:
    def batch(net: nn.Module) -> dict[str, Tensor]:
        source = torch.randint(0, V, (16, 10))
        text = written_by(lambda ids: net(source, ids), length=9)
        return {"source": source, "target": text[:, :-1], "labels": text[:, 1:]}

    return Case(Translator, batch, "1.3x")


class PaddedEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(V, 32, padding_idx=0)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 96, batch_first=True), 2)
        self.head = nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.tokens(ids), src_key_padding_mask=ids == 0)[:, 0])


def padded(n: int = 32, length: int = 10) -> Tensor:
    ids = torch.randint(1, V, (n, length))
    return ids.masked_fill(torch.arange(length) >= torch.randint(3, length + 1, (n, 1)), 0)


@case
def padded_transformer_encoder() -> Case:
    def batch(net: nn.Module) -> tuple[Tensor, Tensor]:
        ids = padded()
        return ids, drawn_classes(net(ids))

    return Case(PaddedEncoder, batch, "1.4x")


class Tagger(nn.Module):
    """A tag for every token, sequences of any length packed."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.lstm, self.tags = nn.Linear(48, 96), nn.LSTM(96, 16, bidirectional=True), nn.Linear(32, 7)

    def forward(self, packed: PackedSequence) -> PackedSequence:
        h = packed._replace(data=self.inputs(packed.data).relu())
        y, _ = self.lstm(h)
        return y._replace(data=self.tags(y.data))


@case
def lstm_tagger_with_packed_sequences() -> Case:
    def batch(net: nn.Module) -> PackedSequence:
        lengths = torch.randint(2, 9, (12,)).tolist()
        return pack_sequence([torch.randn(k, 48) for k in lengths], enforce_sorted=False)

    return Case(Tagger, batch, "1.15x", run=lambda net, batch: net(batch))


@dataclass
class Encoded:
    last_hidden_state: Tensor
    pooler_output: Tensor
    attentions: tuple[Tensor, ...] | None = None


class SentenceEncoder(nn.Module):
    """Hidden states and a pooled vector, as the encoders of transformers give them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(V, 32, padding_idx=0)
        self.blocks, self.norm = nn.Sequential(Block(), Block()), nn.LayerNorm(32)
        self.pooler = nn.Linear(32, 32)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        hidden = self.norm(self.blocks(self.tokens(input_ids)))
        return Encoded(hidden, self.pooler(hidden[:, 0]).tanh())


@case
def sentence_encoder_with_a_pooler() -> Case:
    def batch(net: nn.Module) -> dict[str, Tensor]:
        ids = padded()
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    return Case(SentenceEncoder, batch)


# -- transformers -----------------------------------------------------------------------------------------


def labelled_texts(net: nn.Module) -> dict[str, Tensor]:
    ids = written_by(lambda ids: net(input_ids=ids).logits)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


@case
@needs("transformers")
def llama() -> Case:
    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=V, num_key_value_heads=2, use_cache=False, **sizes))

    return Case(build, labelled_texts)


@case
@needs("transformers")
def gpt2_with_conv1d() -> Case:
    def build() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(
            GPT2Config(vocab_size=V, n_positions=16, n_embd=32, n_layer=2, n_head=4, use_cache=False)
        )

    return Case(build, labelled_texts)


@case
@needs("transformers")
def t5() -> Case:
    def build() -> nn.Module:
        from transformers import T5Config, T5ForConditionalGeneration

        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
        return T5ForConditionalGeneration(
            T5Config(vocab_size=V, decoder_start_token_id=0, pad_token_id=0, use_cache=False, **sizes)
        )

    def batch(net: nn.Module) -> dict[str, Tensor]:
        ids = torch.randint(1, V, (16, 10))
        text = written_by(lambda said: net(input_ids=ids, decoder_input_ids=said).logits, length=7, start=0)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": text[:, 1:].clone()}

    return Case(build, batch, run=lambda net, batch: net(**batch))


@case
@needs("transformers")
def bert_classifier() -> Case:
    def build() -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        return BertForSequenceClassification(
            BertConfig(vocab_size=V, num_labels=5, max_position_embeddings=16, **sizes)
        )

    def batch(net: nn.Module) -> dict[str, Tensor]:
        ids = padded(16)
        mask = (ids != 0).long()
        labels = drawn_classes(net(input_ids=ids, attention_mask=mask).logits)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return Case(build, batch)
