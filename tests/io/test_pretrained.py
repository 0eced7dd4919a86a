"""Round trips of checkpoints: the same bits, the same sharing, and nothing dense on the way."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import tensortrain as tt
from tensortrain import networks as models
from tensortrain.errors import CheckpointError, KindError
from tensortrain.io import load_pretrained, save_pretrained


def compressed(model: nn.Module, budget: str = "4x") -> nn.Module:
    with tt.contract.use_cost_model(tt.contract.CostModel.reference("cpu")):
        return tt.apply_plan_(model, tt.plan_compression(model, budget=budget, allow_slower=True)).eval()


def small_mlp() -> nn.Module:
    torch.manual_seed(0)
    return compressed(models.build("mlp", in_features=64, hidden=(48, 32), num_classes=10))


def sequential() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def assert_same_tensors(a: nn.Module, b: nn.Module) -> None:
    first = dict(a.named_parameters(remove_duplicate=False)) | dict(a.named_buffers(remove_duplicate=False))
    second = dict(b.named_parameters(remove_duplicate=False)) | dict(b.named_buffers(remove_duplicate=False))
    assert first.keys() == second.keys()
    for name, value in first.items():
        other = second[name]
        assert value.dtype == other.dtype, name
        assert value.stride() == other.stride(), name
        assert torch.equal(value, other), name
        assert value.requires_grad == other.requires_grad, name


class Tied(nn.Module):
    """A table and a head that share their weight, a block used twice, a buffer outside the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 16)
        block = nn.Linear(16, 16)
        self.blocks = nn.ModuleList([block, nn.ReLU(), block])
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.arange(16.0), persistent=False)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids) * self.scale
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_registry_model_comes_back_by_name_alone(tmp_path: Path) -> None:
    model = small_mlp()
    assert save_pretrained(model, tmp_path / "m") == tmp_path / "m"
    again = load_pretrained(tmp_path / "m")
    assert type(again) is models.MLP
    assert_same_tensors(model, again)
    assert not again.training
    x = torch.randn(5, 64)
    assert torch.equal(model(x), again(x))
    assert sorted(os.listdir(tmp_path)) == ["m"]
    assert sorted(os.listdir(tmp_path / "m")) == ["model.safetensors", "tensortrain.json"]


def test_conv_fc_keeps_its_channels_last_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.build("conv-fc", image_size=12, width=0.125, hidden=(64, 32))
    model = compressed(model.to(memory_format=torch.channels_last))
    save_pretrained(model, tmp_path / "m")
    again = load_pretrained(tmp_path / "m")
    assert_same_tensors(model, again)
    first = again.features[0]
    assert not isinstance(first, tt.nn.FactorizedLayer)
    assert first.weight.stride() == (9, 1, 3, 1)  # one input channel: the layout shows in the strides alone
    x = torch.randn(3, 1, 12, 12)
    assert torch.equal(model(x), again(x))


@pytest.mark.parametrize("kind", ["factory", "meta", "dense", "factorized"])
def test_unnamed_model_is_filled_in(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = compressed(sequential(), "2x")
    save_pretrained(model, tmp_path / "m")
    with torch.device("meta"):
        empty = sequential()
    models_to_give = {
        "factory": sequential,
        "meta": empty,
        "dense": sequential(),
        "factorized": zeroed_copy(model),
    }
    given = models_to_give[kind]
    again = load_pretrained(tmp_path / "m", given)
    assert_same_tensors(model, again)
    assert again is given or kind == "factory"
    x = torch.randn(3, 64)
    assert torch.equal(model(x), again(x))


def zeroed_copy(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    return other


def test_unnamed_model_needs_to_be_given(tmp_path: Path) -> None:
    save_pretrained(sequential(), tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"Pass model="):
        load_pretrained(tmp_path / "m")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_checkpoint_wins(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small_mlp().to(dtype)
    save_pretrained(model, tmp_path / "m")
    again = load_pretrained(tmp_path / "m")
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert_same_tensors(model, again)


def test_bare_layer_names_itself(tmp_path: Path) -> None:
    layer = tt.nn.Conv2d(4, 6, 3, padding="same", groups=2, rank=3, dtype=torch.float64)
    save_pretrained(layer, tmp_path / "m")
    for given in (None, nn.Conv2d(4, 6, 3, padding="same", groups=2)):
        again = load_pretrained(tmp_path / "m", given)
        assert type(again) is tt.nn.Conv2d
        assert_same_tensors(layer, again)
        x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
        assert torch.equal(layer(x), again(x))


@pytest.mark.parametrize(
    "layer",
    [
        tt.nn.Linear(24, 30, rank=4, bias=False),
        tt.nn.Linear(24, 30, format="low_rank", rank=4),
        tt.nn.Conv1d(4, 8, 3, stride=2, padding=1, padding_mode="circular", rank=3),
        tt.nn.Conv2d(4, 8, 3, format="tucker2", rank=3),
        tt.nn.Conv3d(2, 4, 2, rank=2),
        tt.nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1, groups=2, rank=2),
        tt.nn.Embedding(50, 12, padding_idx=-1, max_norm=2.0, rank=4),
        tt.nn.EmbeddingBag(50, 12, mode="sum", include_last_offset=True, rank=4),
    ],
    ids=lambda layer: f"{type(layer).__name__}-{layer.spec.format}",
)
def test_every_layer_kind_round_trips(tmp_path: Path, layer: tt.nn.FactorizedLayer) -> None:
    save_pretrained(nn.Sequential(layer), tmp_path / "m")
    dense = layer.to_dense()
    again = load_pretrained(tmp_path / "m", lambda: nn.Sequential(dense))[0]
    assert type(again) is type(layer)
    assert again.config() == layer.config()
    assert_same_tensors(layer, again)


def test_a_format_written_with_a_hyphen_is_the_same(tmp_path: Path) -> None:
    """As earlier versions wrote ``tt_naive``."""
    model = nn.Sequential(tt.nn.Conv2d(3, 4, 3, format="tt_naive", rank=2))
    save_pretrained(model, tmp_path / "m")
    recipe = next(path for path in (tmp_path / "m").iterdir() if '"tt_naive"' in path.read_text(errors="replace"))
    recipe.write_text(recipe.read_text().replace('"tt_naive"', '"tt-naive"'))
    dense = nn.Sequential(nn.Conv2d(3, 4, 3))
    for target in (dense, nn.Sequential(tt.nn.Conv2d(3, 4, 3, format="tt_naive", rank=2))):
        again = load_pretrained(tmp_path / "m", target)
        assert again[0].spec == model[0].spec
        assert_same_tensors(model, again)


def test_sharing_survives_and_is_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    block = tt.nn.Linear.from_dense(model.blocks[0], rank=4)
    model.blocks[0] = model.blocks[2] = block
    save_pretrained(model, tmp_path / "m")
    again = load_pretrained(tmp_path / "m", Tied)
    assert again.head.weight is again.table.weight
    assert again.blocks[0] is again.blocks[2]
    assert_same_tensors(model, again)
    ids = torch.arange(6)
    assert torch.equal(model(ids), again(ids))
    n_bytes = sum(4 * p.numel() for p in model.parameters()) + 16 * 4 + 8
    assert n_bytes < (tmp_path / "m" / "model.safetensors").stat().st_size < n_bytes + 2000


def test_untied_copy_does_not_fit_a_shared_module(tmp_path: Path) -> None:
    model = Tied()
    model.blocks[2] = nn.Linear(16, 16)
    save_pretrained(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"must be shared in the checkpoint: blocks\.2"):
        load_pretrained(tmp_path / "m", Tied)


def test_views_and_noncontiguous_tensors(tmp_path: Path) -> None:
    model = nn.Linear(6, 4, bias=False)
    base = torch.randn(12, 12)
    model.weight = nn.Parameter(base[2:6, ::2])
    model.register_buffer("column", torch.ones(1).expand(5))
    save_pretrained(model, tmp_path / "m")
    other = nn.Linear(6, 4, bias=False)
    other.register_buffer("column", torch.zeros(5))
    again = load_pretrained(tmp_path / "m", other)
    assert torch.equal(again.weight, model.weight)
    assert torch.equal(again.column, torch.ones(5))


def test_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    model = small_mlp()
    model.layers[0].requires_grad_(False)
    save_pretrained(model, tmp_path / "m")
    assert_same_tensors(model, load_pretrained(tmp_path / "m"))


def test_recurrent_layers_see_their_new_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.LSTM(3, 4).eval()  # keeps a list of its weights beside them
    save_pretrained(model, tmp_path / "m")
    again = load_pretrained(tmp_path / "m", lambda: nn.LSTM(3, 4))
    x = torch.randn(2, 1, 3)
    assert torch.equal(model(x)[0], again(x)[0])


def test_no_dense_weight_is_allocated(tmp_path: Path) -> None:
    def huge() -> nn.Module:
        return nn.Sequential(nn.Linear(2**17, 2**17))  # 64 GiB in float32

    layer = tt.nn.Linear(2**17, 2**17, in_modes=(2,) * 17, out_modes=(2,) * 17, rank=2)
    save_pretrained(nn.Sequential(layer), tmp_path / "m")
    again = load_pretrained(tmp_path / "m", huge)
    assert_same_tensors(layer, again[0])


def test_factory_that_needs_real_numbers_is_called_plainly(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n = int(torch.tensor(3).item())
            self.layer = nn.Linear(self.n, 2)

    model = Counting()
    save_pretrained(model, tmp_path / "m")
    assert_same_tensors(model, load_pretrained(tmp_path / "m", Counting))


def test_plain_tensor_attributes_are_not_left_without_data(tmp_path: Path) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.factor = torch.tensor(2.0)  # neither parameter nor buffer

    save_pretrained(Constant(), tmp_path / "m")
    assert load_pretrained(tmp_path / "m", Constant).factor == 2


# -- folders -----------------------------------------------------------------------------------------


def test_a_checkpoint_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save_pretrained(sequential(), folder)
    model = small_mlp()
    save_pretrained(model, folder)
    assert_same_tensors(model, load_pretrained(folder))
    assert sorted(os.listdir(tmp_path)) == ["m"]


def test_equal_models_give_equal_files(tmp_path: Path) -> None:
    model = Tied()
    contents = set()
    for k in range(6):
        folder = save_pretrained(model, tmp_path / str(k))
        contents.add(tuple((folder / name).read_bytes() for name in ("model.safetensors", "tensortrain.json")))
    assert len(contents) == 1


def test_foreign_files_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    model = small_mlp()
    save_pretrained(model, tmp_path)
    save_pretrained(model, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert_same_tensors(model, load_pretrained(tmp_path))


def test_failed_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_mlp()
    save_pretrained(model, tmp_path / "m")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensortrain.io.pretrained.sync", full)
    with pytest.raises(OSError, match="No space"):
        save_pretrained(sequential(), tmp_path / "m")
    assert sorted(os.listdir(tmp_path)) == ["m"]
    assert_same_tensors(model, load_pretrained(tmp_path / "m"))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("mine")
    with pytest.raises(CheckpointError, match="must be a folder"):
        save_pretrained(sequential(), tmp_path / "m")
    with pytest.raises(CheckpointError, match="must be a folder"):
        load_pretrained(tmp_path / "m")
    assert (tmp_path / "m").read_text() == "mine"


def test_complex_numbers_are_kept_to_the_bit(tmp_path: Path) -> None:
    for dtype in (torch.complex64, torch.complex128):
        model = nn.ParameterList(
            [torch.randn(3, 2, dtype=dtype), torch.randn(4, 3, dtype=dtype).T, torch.randn((), dtype=dtype)]
        )
        save_pretrained(model, tmp_path / "m")
        loaded = load_pretrained(tmp_path / "m", model=nn.ParameterList([torch.zeros_like(p) for p in model]))
        for mine, theirs in zip(model, loaded, strict=True):
            assert torch.equal(mine, theirs)
            assert theirs.stride() == mine.stride()


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KindError, match="must be a module"):
        save_pretrained({"w": torch.ones(2)}, tmp_path / "m")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"must have data to be saved: 0\.weight"):
        save_pretrained(nn.Sequential(nn.LazyLinear(3)), tmp_path / "m")
    with pytest.raises(CheckpointError, match="must have data to be saved: weight"):
        save_pretrained(nn.Linear(2, 2, device="meta"), tmp_path / "m")
    with pytest.raises(CheckpointError, match="dtypes that safetensors knows"):
        save_pretrained(nn.ParameterList([torch.zeros(2, dtype=torch.complex32)]), tmp_path / "m")
    layer = tt.nn.Linear(8, 8, rank=2)
    tt.nn.orthogonal(layer, kind="left")
    with pytest.raises(CheckpointError, match="those of '0' are constrained"):
        save_pretrained(nn.Sequential(layer), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


# -- transformers ------------------------------------------------------------------------------------


def test_transformers_model_comes_back_by_name_alone(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=120
    )
    model = compressed(transformers.BertForMaskedLM(config), "2x")  # its decoder is tied to its table
    save_pretrained(model, tmp_path / "m")
    again = load_pretrained(tmp_path / "m")
    assert type(again) is transformers.BertForMaskedLM
    assert_same_tensors(model, again)
    assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight
    ids = torch.randint(0, 120, (2, 9))
    assert torch.equal(model(ids).logits, again(ids).logits)
