"""The training engine: it learns, refuses nonsense, and goes on after a kill to the same bits."""

from __future__ import annotations

import copy
import functools
import signal
import textwrap
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import fresh
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tensortrain.data import image_batches
from tensortrain.errors import CheckpointError, DataError, KindError, NonFiniteError, RankError, ShapeError
from tensortrain.system.checkpoint import read_checkpoint, write_checkpoint
from tensortrain.system.observer import Observer, Silent
from tensortrain.train import loop as training
from tensortrain.train.batchnorm import reestimate_batchnorm_
from tensortrain.train.evaluation import evaluate_accuracy
from tensortrain.train.loop import fit
from tensortrain.train.losses import cross_entropy_loss, distillation_loss, feature_loss
from tensortrain.train.schedules import SCHEDULES

N_STEPS = 12  # three epochs of four batches


class Log(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.steps: list[int] = []
        self.ended = 0

    def on_step(self, n: int, **figures: float) -> None:
        self.steps.append(n)

    def on_end(self) -> None:
        self.ended += 1

    def message(self, text: str) -> None:
        self.said.append(text)


class Killed(Exception):
    pass


def small_net(seed: int = 0) -> nn.Module:
    """Batch norm has buffers and dropout draws from the global generator: both must survive a kill."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(36, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
        )


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(30) % 3
    pixels = torch.randint(0, 100, (30, 6, 6), generator=generator)
    pixels[torch.arange(30), labels] += 150  # a bright row tells the class
    return pixels.to(torch.uint8), labels


def loader_plain():
    pixels, labels = pictures()
    return DataLoader(TensorDataset(pixels.float() / 255, labels), batch_size=8, shuffle=True)


def loader_generator():
    pixels, labels = pictures()
    generator = torch.Generator().manual_seed(3)
    return DataLoader(TensorDataset(pixels.float() / 255, labels), batch_size=8, shuffle=True, generator=generator)


def loader_images():
    return image_batches(*pictures(), batch_size=8, seed=4, augment=True)


class Noisy(torch.utils.data.Dataset):
    """Draws from torch, as random transforms do."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, k: int):
        return pictures()[0][k] / 255 + 0.1 * torch.rand(6, 6), pictures()[1][k]


def loader_noisy():
    return DataLoader(Noisy(), batch_size=8, shuffle=True)


LOADERS = {
    "DataLoader": loader_plain,
    "own generator": loader_generator,
    "image_batches": loader_images,
    "random transforms": loader_noisy,
}
OPTIMIZERS = {
    "adamw": {"optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.1},
    "sgd": {"optimizer": "sgd", "lr": 0.1, "grad_clip": 1.0, "schedule": "onecycle"},
    "factory": {"optimizer": functools.partial(torch.optim.Adagrad, eps=1e-6), "schedule": "constant"},
}


def killed_at(step: int, loss=None):
    """Return a loss that raises when it is called for the given time."""
    inner, calls = loss or cross_entropy_loss(), []

    def wrapped(model, batch):
        calls.append(0)
        if len(calls) > step:
            raise Killed
        return inner(model, batch)

    wrapped.fingerprint = inner.fingerprint
    return wrapped


def assert_same_bits(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def without_seconds(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


# --- resuming


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, loader, optimizer):
    # A write after every third step: the kill then loses steps that must be done again.
    monkeypatch.setattr(training._Trainer, "_due", lambda self: self.progress.step % 3 == 0)
    options = {"epochs": 3, "seed": 7, **OPTIMIZERS[optimizer]}

    def evaluate(model):
        return evaluate_accuracy(model, loader_plain())  # draws from the global generator

    options["evaluate"] = evaluate
    whole = small_net()
    expected = fit(whole, LOADERS[loader](), loss=cross_entropy_loss(), **options)
    assert expected.steps == N_STEPS

    for steps in ((1,), (5, 3), (8,), (10, 1), (11,)):
        path = tmp_path / f"{steps}.pt"
        for step in steps:
            with pytest.raises(Killed):
                fit(small_net(), LOADERS[loader](), loss=killed_at(step), checkpoint=path, **options)
        torch.rand(5)
        resumed = small_net()
        result = fit(resumed, LOADERS[loader](), loss=cross_entropy_loss(), checkpoint=path, **options)
        if len(steps) == 1:
            assert result.resumed_from == steps[0] // 3 * 3
        assert_same_bits(resumed, whole)
        assert without_seconds(result.history) == without_seconds(expected.history)


def test_workers_replay_too(tmp_path, monkeypatch):
    monkeypatch.setattr(training._Trainer, "_due", lambda self: True)

    def loader():
        return DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=1)

    whole, resumed = small_net(), small_net()
    fit(whole, loader(), loss=cross_entropy_loss(), steps=6, seed=1)
    with pytest.raises(Killed):
        fit(small_net(), loader(), loss=killed_at(5), steps=6, seed=1, checkpoint=tmp_path / "c")
    fit(resumed, loader(), loss=cross_entropy_loss(), steps=6, seed=1, checkpoint=tmp_path / "c")
    assert_same_bits(resumed, whole)


SCRIPT = """
    import sys, time, torch
    from torch import nn
    from tensortrain.train.loop import fit
    from tensortrain.train.losses import cross_entropy_loss
    from tensortrain.data import image_batches

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))
    images = torch.randint(0, 256, (40, 4, 4)).to(torch.uint8)
    data = image_batches(images, torch.arange(40) % 2, batch_size=4, augment=True)
    inner = cross_entropy_loss()

    def loss(model, batch):
        time.sleep(float(sys.argv[2]))
        print("step", flush=True)
        return inner(model, batch)

    fit(model, data, loss=loss, epochs=6, seed=1, checkpoint=sys.argv[1], checkpoint_every_s=0.0)
"""


def test_a_killed_process_resumes_to_the_same_bits(tmp_path):
    said = tmp_path / "said"

    def start(name: str, pause: float) -> BaseProcess:
        return fresh.start(textwrap.dedent(SCRIPT), str(tmp_path / name), str(pause), stdout=said)

    def n_steps() -> int:
        return said.read_text().count("step\n") if said.exists() else 0

    process = start("killed", 0.01)
    while n_steps() < 23 and process.is_alive():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    written_at_kill = read_checkpoint(tmp_path / "killed")["progress"]["step"]
    assert 0 < written_at_kill < 60

    start("killed", 0).join()
    assert n_steps() == 60 - written_at_kill
    start("whole", 0).join()
    whole, resumed = (read_checkpoint(tmp_path / name) for name in ("whole", "killed"))
    assert resumed["progress"]["step"] == 60
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name]), name


def test_a_finished_run_is_loaded_not_repeated(tmp_path):
    path = tmp_path / "folder" / "c.pt"
    first, second = small_net(), small_net()
    result = fit(first, loader_images(), loss=cross_entropy_loss(), epochs=2, checkpoint=path)
    again = fit(second, loader_images(), loss=killed_at(0), epochs=2, checkpoint=path)
    assert again.resumed_from == again.steps == result.steps == 8
    assert again.history == result.history
    assert_same_bits(first, second)
    assert [p.name for p in path.parent.iterdir()] == ["c.pt"]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"lr": 0.02}, "parameter groups"),
        ({"epochs": 3}, "steps"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"loss": cross_entropy_loss(label_smoothing=0.1)}, "loss"),
        ({"data": image_batches(*pictures(), batch_size=15)}, "batch size"),
        ({"model": small_net(seed=1)}, "starting weights"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(36, 3))}, "parameter groups"),
    ],
)
def test_another_run_s_checkpoint_is_not_used(tmp_path, change, says):
    path = tmp_path / "c.pt"
    base = {"model": small_net(), "data": loader_images(), "loss": cross_entropy_loss(), "epochs": 2}
    fit(**base, checkpoint=path)
    options = base | {"model": small_net()} | change
    expected = copy.deepcopy(options["model"])
    log = Log()
    result = fit(**options, checkpoint=path, observer=log, seed=None)
    assert result.resumed_from == 0
    assert len(log.said) == 1
    assert log.said[0].startswith("Starting over: ")
    assert says in log.said[0]
    pairs = zip(expected.parameters(), options["model"].parameters(), strict=True)
    assert any(not torch.equal(before, after) for before, after in pairs)
    assert fit(**options | {"model": expected}, checkpoint=path).resumed_from == result.steps


@pytest.mark.parametrize(
    "damage", ["cut in half", "empty", "noise", "other content", "other kinds", "wrong shapes", "pickle"]
)
def test_a_damaged_checkpoint_means_starting_over(tmp_path, damage):
    path = tmp_path / "c.pt"
    options = {"loss": cross_entropy_loss(), "epochs": 2, "seed": 1, "checkpoint": path}
    whole, again = small_net(), small_net()
    fit(whole, loader_images(), **options)
    content, raw = read_checkpoint(path), path.read_bytes()
    if damage == "wrong shapes":
        content["model"]["1.weight"] = torch.zeros(16, 35)
        write_checkpoint(path, content)
    elif damage == "other content":
        del content["progress"]
        write_checkpoint(path, content)
    elif damage == "other kinds":
        write_checkpoint(path, content | {"settings": [1]})
    elif damage == "pickle":
        torch.save(content, path)
    else:
        path.write_bytes({"cut in half": raw[: len(raw) // 2], "empty": b"", "noise": b"noise" * 99}[damage])
    log = Log()
    result = fit(again, loader_images(), observer=log, **options)
    assert result.resumed_from == 0
    assert log.said[0].startswith("Starting over")
    assert_same_bits(again, whole)


def test_a_checkpoint_is_safetensors_and_keeps_values_kinds_and_layouts(tmp_path):
    kernel = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    shared = torch.arange(6.0)
    content = {
        "kernel": kernel,
        "views": (shared[:3], shared[:3], shared[1:4]),
        "bits": {0: torch.tensor(3), 1: torch.ones(2, dtype=torch.bfloat16), "empty": torch.zeros(0, 2)},
        "numbers": [1, 0.1 + 0.2, float("inf"), None, True, "text"],
    }
    write_checkpoint(tmp_path / "c", content)
    with safe_open(tmp_path / "c", framework="pt") as file:
        assert "tree" in file.metadata()
    found = read_checkpoint(tmp_path / "c")
    assert torch.equal(found["kernel"], kernel)
    assert found["kernel"].stride() == kernel.stride()
    assert all(map(torch.equal, found["views"], content["views"]))
    assert all(torch.equal(found["bits"][key], value) for key, value in content["bits"].items())
    assert [value.dtype for value in found["bits"].values()] == [v.dtype for v in content["bits"].values()]
    assert found["numbers"] == content["numbers"]
    with pytest.raises(CheckpointError, match="plain data: it has a PosixPath"):
        write_checkpoint(tmp_path / "c", {"x": Path("x")})
    assert torch.equal(read_checkpoint(tmp_path / "c")["kernel"], kernel)  # the old one is still there


def test_figures_of_any_kind_of_number_do_not_stop_a_resume(tmp_path):
    path = tmp_path / "c"
    options = {"loss": cross_entropy_loss(), "epochs": 2, "checkpoint": path, "checkpoint_every_s": 0.0}
    figures = {"a": np.float32(0.5), "b": torch.tensor(0.25), "c": np.float64(1.0)}
    result = fit(small_net(), loader_images(), evaluate=lambda model: figures, **options)
    assert {key: result.history[-1][key] for key in "abc"} == {"a": 0.5, "b": 0.25, "c": 1.0}
    again = fit(small_net(), loader_images(), evaluate=lambda model: figures, **options)
    assert again.resumed_from == result.steps


def test_round_off_in_the_starting_weights_is_the_same_run(tmp_path):
    path = tmp_path / "c.pt"
    fit(small_net(), loader_images(), loss=cross_entropy_loss(), steps=2, checkpoint=path)
    rebuilt = small_net()
    with torch.no_grad():
        rebuilt[1].weight.mul_(1 + 1e-6)
    assert fit(rebuilt, loader_images(), loss=killed_at(0), steps=2, checkpoint=path).resumed_from == 2


# --- failures


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(tmp_path, bad):
    path, model, calls, log = tmp_path / "c.pt", small_net(), [], Log()
    options = {"epochs": 3, "checkpoint": path, "checkpoint_every_s": 0.0, "observer": log}

    def loss(model, batch):
        calls.append(0)
        return cross_entropy_loss()(model, batch) * (bad if len(calls) == 6 else 1.0)

    with pytest.raises(NonFiniteError, match=r"step 5 \(epoch 1\).*Lower lr.*c\.pt is as before"):
        fit(model, loader_images(), loss=loss, **options)
    kept = read_checkpoint(path)
    assert kept["progress"]["step"] == 5
    assert all(value.isfinite().all() for value in kept["model"].values())
    assert all(p.isfinite().all() for p in model.parameters())
    assert log.steps == [1, 2, 3, 4, 5]
    assert log.ended == 1


def test_late_reading_of_losses_still_names_the_step(tmp_path, monkeypatch):
    """On an accelerator losses are read seldom; the same path is forced here."""
    calls = []

    def loss(model, batch):
        calls.append(0)
        return cross_entropy_loss()(model, batch) * (float("nan") if len(calls) == 3 else 1.0)

    original = training._Trainer.__post_init__

    def seldom(self):
        original(self)
        self.steps_between_syncs = 100

    monkeypatch.setattr(training._Trainer, "__post_init__", seldom)
    with pytest.raises(NonFiniteError, match=r"step 2 \(epoch 0\)"):
        fit(small_net(), loader_images(), loss=loss, epochs=1, checkpoint=tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "options, error, says",
    [
        ({}, KindError, "exactly one"),
        ({"epochs": 1, "steps": 1}, KindError, "exactly one"),
        ({"steps": 1, "optimizer": "adam"}, KindError, "'adam'"),
        ({"steps": 1, "schedule": "linear"}, KindError, "'linear'"),
        ({"steps": 1, "warmup": 1.0}, RankError, "warmup"),
        ({"steps": 1, "autocast_dtype": torch.float16}, KindError, "bfloat16"),
        ({"steps": 1, "loss": lambda m, b: m(b[0])}, KindError, "one number"),
        ({"steps": 1, "data": []}, DataError, "must give batches"),
        ({"epochs": 1, "data": []}, DataError, "must give batches"),
        ({"epochs": 1, "data": iter([])}, DataError, "length"),
        ({"steps": 5, "data": iter([(torch.zeros(2, 36), torch.zeros(2).long())] * 2)}, DataError, "used up"),
        ({"steps": -1}, KindError, "-1"),
    ],
)
def test_bad_arguments(options, error, says):
    with pytest.raises(error, match=says):
        fit(**{"model": small_net(), "data": loader_plain(), "loss": cross_entropy_loss()} | options)


def test_a_frozen_model_is_refused():
    with pytest.raises(KindError, match="requires grad"):
        fit(small_net().requires_grad_(False), loader_plain(), loss=cross_entropy_loss(), steps=1)


# --- what it does


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_learns(optimizer):
    model = small_net().eval()
    options = {"lr": 1e-2, **OPTIMIZERS[optimizer]}
    result = fit(model, loader_plain(), loss=cross_entropy_loss(), epochs=40, seed=0, **options)
    assert evaluate_accuracy(model, loader_plain()) >= 0.95
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    assert len(result.history) == 40
    assert not any(module.training for module in model.modules())


def test_plain_adamw_agrees_with_a_loop_by_hand():
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    twin = copy.deepcopy(model)
    data = [(torch.randn(5, 4).double(), torch.arange(5) % 3) for _ in range(3)]
    options = {"epochs": 2, "lr": 0.1, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.2}
    fit(model, data, loss=cross_entropy_loss(), **options)
    groups = [{"params": [twin.weight], "weight_decay": 0.2}, {"params": [twin.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for x, y in data * 2:
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert (ours - theirs).abs().max() <= 1e-12


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    shares = [SCHEDULES[name](k, 100, 0.1) for k in range(100)]
    assert all(0 < share <= 1 for share in shares)
    assert max(shares) == 1
    peak = shares.index(1)
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert peak == {"cosine": 10, "onecycle": 30, "constant": 10}[name]
    assert shares[-1] == 1 if name == "constant" else shares[-1] < 1e-2
    assert SCHEDULES[name](0, 1, 0.0) > 0


def test_steps_may_end_within_an_epoch_and_the_caller_s_generator_is_kept():
    state = torch.get_rng_state()
    log = Log()
    result = fit(small_net(), loader_plain(), loss=cross_entropy_loss(), steps=6, seed=3, observer=log)
    assert torch.equal(state, torch.get_rng_state())
    assert [row["step"] for row in result.history] == [4, 6]
    assert log.steps == [1, 2, 3, 4, 5, 6]
    assert log.ended == 1


def test_param_groups_replace_the_default_ones():
    model = small_net()
    before = copy.deepcopy(model)
    groups = [{"params": [model[5].weight], "lr": 0.5}]
    fit(model, loader_plain(), loss=cross_entropy_loss(), steps=2, param_groups=groups)
    assert torch.equal(model[1].weight, before[1].weight)
    assert not torch.equal(model[5].weight, before[5].weight)


def test_bfloat16_autocast_keeps_float32_weights():
    model = small_net()
    dtypes = []
    model[5].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    fit(model, loader_plain(), loss=cross_entropy_loss(), steps=2, autocast_dtype=torch.bfloat16)
    assert dtypes == [torch.bfloat16] * 2
    assert model[5].weight.dtype == torch.float32


def test_observer_protocol():
    assert isinstance(Silent(), Observer)
    assert not isinstance(object(), Observer)


# --- losses


class Keyword(nn.Module):
    """Takes and gives what Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3).double()

    def forward(self, inputs):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.head(inputs), last_hidden_state=inputs * self.head.weight[0])


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 6, 5, 3, dtype=torch.float64, generator=generator)


class Fixed(nn.Module):
    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value[: len(x)]


@pytest.mark.parametrize("axes", [1, 2])
def test_distillation_is_the_formula(logits, axes):
    student, teacher = (logits[k] if axes == 2 else logits[k, :, 0] for k in range(2))
    labels = torch.arange(student[..., 0].numel()).reshape(student.shape[:-1]) % 3
    p, q = (torch.softmax(z / 3.0, -1).reshape(-1, 3) for z in (teacher, student))
    soft = 9.0 * (p * (p.log() - q.log())).sum() / len(p)
    hard = -torch.log_softmax(student, -1).gather(-1, labels[..., None]).mean()
    loss = distillation_loss(Fixed(teacher), alpha=0.8, temperature=3.0)
    with_labels = loss(Fixed(student), (student, labels))
    assert (with_labels - (0.8 * soft + 0.2 * hard)).abs() <= 1e-12
    assert (loss(Fixed(student), student) - soft).abs() <= 1e-12
    assert loss(Fixed(teacher), teacher).abs() <= 1e-12


def test_teachers_get_no_gradient_and_go_to_eval_mode():
    torch.manual_seed(0)
    teacher, student = small_net(1).train(), small_net(2)
    before = copy.deepcopy(teacher)
    for loss in (distillation_loss(teacher), feature_loss(teacher, kind="mse")):
        fit(student, loader_plain(), loss=loss, steps=2)
    assert all(p.grad is None for p in teacher.parameters())
    assert not teacher.training
    assert_same_bits(teacher, before)


def test_feature_loss_kinds():
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = Keyword(), Keyword()
    fa, fb = (x * m.head.weight[0] for m in (a, b))
    cosine = 1 - ((fa * fb).sum(-1) / (fa.norm(dim=-1) * fb.norm(dim=-1))).mean()
    batch = {"inputs": x, "labels": torch.zeros(5)}
    assert feature_loss(b)(a, batch).item() == pytest.approx(cosine.item(), abs=1e-12)
    own = feature_loss(b, output=lambda model, batch: model.head(batch["inputs"]), kind="mse")
    assert own(a, batch).item() == pytest.approx((a.head(x) - b.head(x)).square().mean().item(), abs=1e-12)


def test_dict_batches_train():
    torch.manual_seed(0)
    model = Keyword()
    data = [{"inputs": torch.randn(6, 4).double(), "labels": torch.arange(6) % 3}]
    result = fit(model, data, loss=cross_entropy_loss(), epochs=20, lr=0.1)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    right = model(data[0]["inputs"]).logits.argmax(-1) == data[0]["labels"]
    assert evaluate_accuracy(model, data) == right.double().mean()


@pytest.mark.parametrize(
    "make, error, says",
    [
        (lambda: distillation_loss(nn.Identity(), alpha=1.1), RankError, "alpha"),
        (lambda: distillation_loss(nn.Identity(), temperature=0), RankError, "temperature"),
        (lambda: cross_entropy_loss(label_smoothing=1.0), RankError, "label_smoothing"),
        (lambda: feature_loss(nn.Identity(), kind="l1"), KindError, "'l1'"),
        (lambda: cross_entropy_loss()(nn.Identity(), torch.zeros(2, 2)), KindError, "must have labels"),
        (lambda: distillation_loss(nn.Linear(2, 3))(nn.Linear(2, 4), torch.zeros(2, 2)), ShapeError, "agree"),
        (lambda: cross_entropy_loss()(lambda x: None, (torch.zeros(1), torch.zeros(1))), KindError, "a tensor"),
    ],
)
def test_bad_losses(make, error, says):
    with pytest.raises(error, match=says):
        make()


# --- batch norm and accuracy


def test_reestimated_batchnorm_holds_the_plain_mean():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(4, momentum=0.3)).double()
    model.train()
    model[0].eval()
    data = [torch.randn(10, 4).double() * 3 + 2 for _ in range(5)]
    assert reestimate_batchnorm_(model, data, n_batches=4) == 4
    used = torch.stack(data[:4])
    assert (model[1].running_mean - used.mean((0, 1))).abs().max() <= 1e-12
    assert (model[1].running_var - used.var(1).mean(0)).abs().max() <= 1e-12
    assert model[1].momentum == 0.3
    assert [module.training for module in model] == [False, True]


def conv_norm(n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(3, n_out, 2), nn.BatchNorm1d(n_out), nn.ReLU()).double()


def trained_norm() -> nn.Sequential:
    model = conv_norm(5)
    with torch.no_grad():
        for tensor in (*model[1].parameters(), model[1].running_mean):
            tensor.normal_()
        model[1].running_var.uniform_(0.5, 2)
    return model.eval()


def test_statistics_of_an_unchanged_model_stay_beside_the_model_it_was_made_from():
    model = trained_norm()
    changed, before = copy.deepcopy(model), copy.deepcopy(model)
    data = [torch.randn(6, 3, 8).double() + 1 for _ in range(3)]
    assert reestimate_batchnorm_(changed, data, like=model) == 3
    assert (changed[1].running_mean - before[1].running_mean).abs().max() <= 1e-12
    assert (changed[1].running_var - before[1].running_var).abs().max() <= 1e-12
    assert_same_bits(model, before)
    assert reestimate_batchnorm_(changed, data) == 3
    assert (changed[1].running_mean - before[1].running_mean).abs().max() > 0.1


@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4], [4, 1, 2]])
def test_statistics_move_by_what_a_change_shifts(kept: list[int]):
    model, changed = trained_norm(), conv_norm(len(kept)).eval()
    with torch.no_grad():
        for mine, whole in zip(changed.state_dict().values(), model.state_dict().values(), strict=True):
            mine.copy_(whole[kept] if whole.ndim else whole)
        changed[0].weight.mul_(2)
        changed[0].bias.mul_(2).add_(0.5)
    data = [torch.randn(9, 3, 8).double()]
    assert reestimate_batchnorm_(changed, data, like=model) == 1
    (x,) = data
    shift = model[0](x).mean((0, 2))[kept] + 0.5  # what a convolution gives is twice what it was and a half
    assert (changed[1].running_mean - model[1].running_mean[kept] - shift).abs().max() <= 1e-12
    assert (changed[1].running_var - 4 * model[1].running_var[kept]).abs().max() <= 1e-12


def test_norms_that_are_not_the_same_ones_are_set_anew():
    model, other = trained_norm(), conv_norm(3).eval()
    data = [torch.randn(9, 3, 8).double()]
    reestimate_batchnorm_(other, data, like=model)
    again = copy.deepcopy(other)
    reestimate_batchnorm_(again, data)
    assert_same_bits(other, again)


def test_failed_reestimation_puts_the_statistics_back():
    model = small_net()
    fit(model, loader_plain(), loss=cross_entropy_loss(), steps=3)
    before = copy.deepcopy(model)

    def broken():
        yield pictures()[0].float()
        raise Killed

    with pytest.raises(Killed):
        reestimate_batchnorm_(model, broken())
    assert_same_bits(model, before)
    original = copy.deepcopy(model)
    with pytest.raises(Killed):
        reestimate_batchnorm_(model, broken(), like=original)
    assert_same_bits(model, before)
    assert_same_bits(original, before)
    with pytest.raises(DataError, match="must give batches"):
        reestimate_batchnorm_(model, [])
    assert_same_bits(model, before)
    assert reestimate_batchnorm_(nn.Linear(2, 2), []) == 0


def test_accuracy_counts_every_example():
    x = torch.eye(3).repeat(5, 1)
    y = torch.arange(3).repeat(5)
    y[:4] = (y[:4] + 1) % 3
    model = nn.Identity().train()
    assert evaluate_accuracy(model, [(x[:11], y[:11]), (x[11:], y[11:])]) == 11 / 15
    assert model.training
    with pytest.raises(DataError, match="labelled"):
        evaluate_accuracy(model, [x])
