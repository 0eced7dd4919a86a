"""The rival that ours is compared with is as strong as it says, and the judges judge what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tensortrain.compression import count_params
from tensortrain.errors import DataError

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module", autouse=True)
def _experiments() -> Any:
    """Modules of the experiment, as its own script finds them; none of them stays for other tests."""
    before, path = set(sys.modules), list(sys.path)
    sys.path[:0] = [str(EXPERIMENTS / "after_training"), str(EXPERIMENTS)]
    yield
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if str(EXPERIMENTS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def _run(model: nn.Module, batch: Any) -> Any:
    return model(batch)


def _skewed(n: int, width: int) -> torch.Tensor:
    """Inputs of very unequal spread, as layers see them."""
    return torch.randn(n, width) * torch.logspace(0, -2, width) @ torch.linalg.qr(torch.randn(width, width))[0]


def test_the_rival_is_the_best_of_its_rank_for_its_inputs() -> None:
    from baseline import whitened_svd

    layer, x = nn.Linear(40, 30, bias=False), _skewed(500, 40)
    found = whitened_svd(layer, [x], 40 * 30 // 2, run=_run, damping=1e-12)
    (rank,) = found.ranks.values()
    error = (found.model(x) - layer(x)).norm()
    tail = torch.linalg.svdvals(layer(x).detach())[rank:].norm()  # no map of that rank comes nearer
    assert error <= tail * (1 + 1e-4)  # of float32 outputs
    assert torch.linalg.matrix_rank(found.model.weight.double(), rtol=1e-5) == rank


@pytest.mark.parametrize("ratio", [1.1, 1.5, 3])
def test_the_rival_spends_its_budget_and_keeps_equal_shares(ratio: float) -> None:
    from baseline import whitened_svd

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 3))
    limit = int(count_params(model) / ratio)
    found = whitened_svd(model, [torch.randn(200, 64)], limit, run=_run)
    assert limit - (64 + 128) < found.n_params <= limit
    assert set(found.ranks) == {"0", "2"}  # the head for three classes stays
    shares = [found.ranks["0"] * 128 / 64**2, found.ranks["2"] * 192 / (64 * 128)]
    assert abs(shares[0] - shares[1]) < 2 * 192 / (64 * 128)  # a rank and its remainder


def test_the_rival_reaches_the_maps_of_recurrent_layers_and_patches() -> None:
    from baseline import whitened_svd

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.rnn = nn.Conv1d(20, 24, 3, padding=1), nn.LSTM(24, 32, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(self.conv(x).transpose(1, 2))[0]

    model, x = Net(), torch.randn(30, 20, 15)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = whitened_svd(model, [x], int(count_params(model) / 1.2), run=_run)
    assert len(found.ranks) == 5
    with torch.no_grad():
        assert 0 < float((found.model(x) - model(x)).norm() / model(x).norm()) < 0.5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_rival_says_where_equal_shares_cannot_fit() -> None:
    from baseline import whitened_svd

    model = nn.Sequential(nn.Embedding(1000, 32), nn.Linear(32, 32))
    ids = torch.randint(1000, (50,))
    with pytest.raises(ValueError, match="equal shares must fit"):
        whitened_svd(model, [ids], count_params(model) // 2, run=_run)
    found = whitened_svd(model, [ids], count_params(model) // 2, run=_run, tables=True)
    assert found.n_params <= count_params(model) // 2


def test_a_tied_table_is_cut_once_and_stays_tied() -> None:
    from baseline import whitened_svd

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(ids).tanh())

    model, ids = Tied(), torch.randint(50, (200,))
    found = whitened_svd(model, [ids], int(count_params(model) / 1.5), run=_run, tables=True)
    assert list(found.ranks) == ["head"]
    assert found.model.head.weight is found.model.table.weight


def test_padded_positions_do_not_weigh() -> None:
    from baseline import whitened_svd

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.map(x)

    def run(model: nn.Module, batch: Any) -> Any:
        return model(**batch)

    model, x, mask = Masked(), torch.randn(8, 10, 32), torch.ones(8, 10, dtype=torch.long)
    mask[:, 6:] = 0
    spoiled = torch.where(mask[..., None].bool(), x, 1e3 * torch.randn_like(x))
    limit = count_params(model) // 2
    cut = [
        whitened_svd(model, [{"x": seen, "attention_mask": mask}], limit, run=run).model.map.weight
        for seen in (x, spoiled)
    ]
    assert torch.equal(*cut)


def test_divergence_is_that_of_torch() -> None:
    from subject import binary_divergence, divergence

    p, q = torch.randn(4, 5, 7).double(), torch.randn(4, 5, 7).double()
    pair = [torch.distributions.Categorical(logits=x) for x in (p, q)]
    expected = torch.distributions.kl_divergence(*pair).mean()
    assert divergence(p, q) == pytest.approx(float(expected))
    a, b = torch.rand(9).double(), torch.rand(9).double()
    coins = [torch.distributions.Bernoulli(x) for x in (a, b)]
    assert binary_divergence(a, b) == pytest.approx(float(torch.distributions.kl_divergence(*coins).mean()), rel=1e-3)


@pytest.mark.parametrize("a, b, n", [("", "abc", 3), ("kitten", "sitting", 3), ("abc", "abc", 0), ("ab", "ba", 2)])
def test_edits(a: str, b: str, n: int) -> None:
    from phonemes import edits

    assert edits([ord(x) for x in a], [ord(x) for x in b]) == n


def test_windows_lie_over_the_whole_text() -> None:
    from decoder import TokenBatches

    batches = TokenBatches(torch.arange(1000), length=10, size=4, n_batches=5)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids.shape == (20, 10)
    assert ids[0, 0] == 0
    assert ids[-1, -1] == 999
    with pytest.raises(ValueError, match="must hold"):
        TokenBatches(torch.arange(100), length=10, size=4, n_batches=5)


def test_what_is_missing_is_told_with_a_remedy(tmp_path: Path) -> None:
    from decoder import load_decoder
    from installed import package_folder

    with pytest.raises(DataError, match="pip install --no-deps such-a-package"):
        package_folder("no_such_package_here", "such-a-package")
    pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError, match=r"decoder\.py"):
        load_decoder(tmp_path)


def test_library_files_are_held_out_whole() -> None:
    from decoder import library_files

    train, held_out = library_files()
    assert not set(train) & set(held_out)
    assert 0.02 < len(held_out) / len(train) < 0.2


def test_the_decoder_trains_in_rounds_and_goes_on_where_it_was(tmp_path: Path, monkeypatch: Any) -> None:
    import decoder

    pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    text = "".join(f"def f{k}(x):\n    return x + {k}\n" for k in range(200))
    monkeypatch.setattr(decoder, "_texts", lambda: ([text], [text[:200]], [text[:100]]))
    model = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    sizes = {"windows": 2, "length": 8, "warm_up": 2, "seed": 0}
    rounds = [{"steps": 3, "lr": 0.01}, {"steps": 2, "lr": 0.005}]
    for some in (rounds[:1], rounds):
        decoder.train_decoder({"model": model, "training": {**sizes, "rounds": some}}, tmp_path / "twice")
    decoder.train_decoder({"model": model, "training": {**sizes, "rounds": rounds}}, tmp_path / "once")
    found = [decoder.load_decoder(tmp_path / name) for name in ("twice", "once")]
    assert [len(one.log["steps"]) for one in found] == [5, 5]
    assert found[0].log["steps"] == found[1].log["steps"]
    weights = [one.model.state_dict() for one in found]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_parts_are_put_back_one_by_one() -> None:
    from where import losses, parts_of

    original, small = (nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)) for _ in range(2))
    narrow = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3))
    x = torch.randn(20, 4)

    def judge(model: nn.Module) -> dict[str, float]:
        return {"loss": float((model(x) - original(x)).detach().square().mean())}

    parts = parts_of(original, ["[02]", "1"])
    assert parts == ["0", "1", "2"]
    found = list(losses(original, small, parts, judge))
    assert found[0][1] == found[2][2]  # the first one put back is the last one alone
    assert found[1][2] == "loss 0.00000"
    assert next(losses(original, narrow, ["0"], judge))[1:] == ("does not fit", "does not fit")


def test_losses_are_told_as_shares_of_the_better_rival() -> None:
    from table import format_rows, loss_rows

    def cell(method: str, kind: str, **figures: Any) -> dict[str, Any]:
        return {
            "subject": "decoder", "ratio": 1.5, "method": method, "step": "first", "settings": {"kind": kind}, **figures
        }  # fmt: skip

    cells = [
        cell("ours", "ours", nats=3.1, formats={"low_rank": 4, "dense": 2}),
        cell("rival", "rival", nats=3.8),
        cell("rival, tables", "rival", nats=3.4),
        cell("rival, tight", "rival", refused="no"),
    ]
    rows = loss_rows(cells, {"decoder": {"nats": 3.0}})
    assert rows[0]["of_rival"] == pytest.approx(0.25)
    assert rows[0]["allowed"] == pytest.approx(0.1)
    assert rows[3]["loss"] is None
    assert [row["layers"] for row in format_rows(cells)] == [4, 2]


def test_the_replica_of_the_voice_detector_agrees_with_the_published_script() -> None:
    from installed import package_folder
    from voice import Voice

    try:
        folder = package_folder("silero_vad", "silero-vad") / "data"
    except DataError as error:
        pytest.skip(str(error))
    script = torch.jit.load(folder / "silero_vad.jit")
    # The script is of another release than the file of weights: the replica gets the script's.
    theirs = {name: value for name, value in script.state_dict().items() if name.startswith("_model.")}
    model = Voice().eval()
    model.load_state_dict(dict(zip(model.state_dict(), theirs.values(), strict=True)))
    waves = torch.randn(1, 512 * 6) * torch.linspace(0, 0.3, 512 * 6)
    with torch.no_grad():
        expected = torch.cat([script(part, 16000) for part in waves.split(512, dim=1)], dim=1)
        assert torch.allclose(model(waves), expected, atol=1e-5)


def test_a_cell_is_judged_and_a_refusal_is_recorded() -> None:
    import run as experiment
    from subject import Subject

    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)).eval(), torch.randn(256, 64)

    def judge(changed: nn.Module) -> dict[str, float]:
        return {"nats": float((changed(x) - model(x)).detach().square().mean())}

    settled: list[nn.Module] = []
    subject = Subject(model, list(x.split(32)), judge, options={"n_batches": 8}, settle=settled.append)
    plans = experiment.Plans(subject)
    for kind in ("ours", "rival"):
        found = experiment.cell(plans, "decoder", 1.5, kind, {"kind": kind})
        assert found["params_after"] <= found["limit"] < count_params(model)
        assert found["nats"] > 0
        assert sum(found["formats"].values()) in (1, 2)
    assert len(settled) == 2
    assert judge(model) == {"nats": 0.0}
    assert "equal shares" in experiment.cell(plans, "decoder", 500.0, "rival", {"kind": "rival"})["refused"]


def test_what_a_picture_shows_has_one_legend(tmp_path: Path) -> None:
    import table

    cells = [
        {"subject": "voice", "ratio": ratio, "method": method, "step": step, "settings": {"kind": kind}, "agreement": a}
        for method, kind, steps in (("ours", "ours", ("first", "refits")), ("whitened SVD", "rival", ("first",)))
        for step in steps
        for ratio, a in ((1.5, 0.99), (2.0, 0.9))
    ]
    rows = table.loss_rows(cells, {"voice": {"agreement": 1.0}})
    figure = table._picture([*rows, *({**row, "subject": "photos"} for row in rows)])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ours", "whitened SVD", "allowed"]
    assert all(axes.get_legend() is None for axes in figure.axes)


def test_an_example_is_timed_through_all_models(tmp_path: Path) -> None:
    import table
    from speed import time_subject

    for name in ("small-original", "small-2-ours-first"):
        net = nn.Linear(8, 8)
        torch.save((net, torch.randn(1, 8)) if "original" in name else net, tmp_path / f"{name}.pt")
    found = time_subject(tmp_path, "small", ["small-2-ours-first"], 0.01)
    assert found["times"]["original"]["ms"] > 0
    assert len(found["times"]["small-2-ours-first"]["times_faster"]) == 2
    (tmp_path / "speed").mkdir()
    (tmp_path / "speed" / "small.json").write_text(json.dumps(found))
    (row,) = table.speed_rows(tmp_path)
    assert row["original_ms"] == found["times"]["original"]["ms"]


def test_lines_wait_for_what_the_library_has_not() -> None:
    import run as experiment

    assert experiment._fits({"kind": "rival"})
    assert experiment._fits({"kind": "ours", "stages": {"Refit": {}}, "without": ["tt"]})
    assert not experiment._fits({"kind": "ours", "stages": {"NoSuchStage": {}}})
    assert not experiment._fits({"kind": "ours", "without": ["no-such-format"]})


def test_the_rival_has_one_line_whatever_the_library_can_do() -> None:
    import run as experiment

    assert experiment._step({"kind": "rival"}, "narrowing") == "first"
    assert experiment._step({"kind": "ours"}, "narrowing") == "narrowing"
