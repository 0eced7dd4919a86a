"""What kind of output a model has, and how its labels are read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import mlp
from torch import Tensor, nn
from torch.nn import functional as F

from tensortrain.errors import FilterError, KindError
from tensortrain.train.outputs import counted, judged_outputs, named_tensors, relative_distance
from tensortrain.train.task import decide_task, label_loss


class Gives(nn.Module):
    """Returns what it is told to, whatever comes in."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Any) -> Any:
        return self.value


def decided(y: Any, labels: Any = None, x: Any = None, **options: Any) -> Any:
    x = torch.zeros(4, 3) if x is None else x
    return decide_task(Gives(y), x if labels is None else (x, labels), **options)


DRAWN = torch.Generator().manual_seed(0)
LOGITS, PIXELS, WORDS = (0.5 * torch.randn(*shape, generator=DRAWN) for shape in ((4, 5), (4, 5, 6, 7), (4, 9, 5)))
ONE_HOT = F.one_hot(torch.arange(4), 5)


@pytest.mark.parametrize(
    "y, labels, kind, use, axis",
    [
        (LOGITS, torch.arange(4), "classify", "classes", 1),
        (LOGITS, torch.arange(4).unsqueeze(1), "classify", "classes", 1),
        (LOGITS, torch.tensor([1, -100, 0, -100]), "classify", "classes", 1),
        (PIXELS, torch.randint(0, 5, (4, 6, 7)), "classify", "classes", 1),
        (WORDS, torch.randint(0, 5, (4, 9)), "classify", "classes", 2),
        (WORDS.movedim(1, 2), torch.randint(0, 5, (4, 9)), "classify", "classes", 1),
        (LOGITS, ONE_HOT, "classify", "shares", 1),
        (LOGITS, ONE_HOT.float() * 0.9 + 0.02, "classify", "shares", 1),
        (LOGITS, (torch.arange(20).reshape(4, 5) % 3 == 0).float(), "multi-label", "several", 1),
        (LOGITS[:, :1], torch.tensor([0, 1, 1, 0]), "multi-label", "several", 1),
        (LOGITS[:, 0], torch.tensor([0.0, 1, 1, 0]), "multi-label", "several", 0),
        (LOGITS[:, :1], LOGITS[:, 0] + 0.1, "regress", "values", 1),
        (LOGITS, LOGITS * 1.1, "regress", "values", 1),
        (LOGITS[:, :1], None, "regress", "none", 1),
        (LOGITS, None, "regress", "none", 1),
    ],
)
def test_labels_tell(y: Tensor, labels: Tensor | None, kind: str, use: str, axis: int) -> None:
    task = decided(y, labels)
    assert (task.kind, task.labels, task.class_axis) == (kind, use, axis)
    assert kind in str(task)
    if use != "none":
        loss = label_loss(task, y, labels)
        assert loss is not None
        assert torch.isfinite(loss)


def test_class_numbers_agree_with_torch_where_torch_takes_them() -> None:
    labels = torch.randint(0, 5, (4, 6, 7))
    labels[0, 0, 0] = -100
    torch.testing.assert_close(label_loss(decided(PIXELS, labels), PIXELS, labels), F.cross_entropy(PIXELS, labels))
    shares = F.softmax(torch.randn(4, 5, 6, 7), dim=1)
    torch.testing.assert_close(label_loss(decided(PIXELS, shares), PIXELS, shares), F.cross_entropy(PIXELS, shares))
    assert label_loss(decided(LOGITS, torch.arange(4)), LOGITS, torch.full((4,), -100)) is None


def test_labels_that_are_the_input_are_shifted() -> None:
    ids = torch.randint(0, 5, (4, 9))
    y = 5.0 * F.one_hot(ids.roll(-1, 1), 5).float()
    task = decided(y, ids, x=ids)
    assert (task.kind, task.labels) == ("causal-lm", "shifted")
    expected = F.cross_entropy(y[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(label_loss(task, y, ids), expected)
    following = torch.cat((ids[:, 1:], torch.full((4, 1), -100)), dim=1)
    task = decided(y, following, x=ids)
    assert (task.kind, task.labels) == ("causal-lm", "next")
    torch.testing.assert_close(label_loss(task, y, following), expected)


def test_labels_in_a_foreign_convention_are_not_used() -> None:
    sure = 20.0 * ONE_HOT.float()
    task = decided(sure, torch.arange(4).flip(0))
    assert task.labels == "none"
    assert "worse than a guess" in task.notes[0]
    far = decided(LOGITS[:, :1], 1000 + 0.1 * torch.randn(4, 1))
    assert far.labels == "none"
    odd = decided(LOGITS, torch.arange(7))
    assert "do not fit" in odd.notes[0]
    boxes = decided(LOGITS, {"boxes": torch.zeros(4, 4)})
    assert "type dict" in boxes.notes[0]


def test_a_name_is_taken() -> None:
    assert decided(LOGITS, torch.arange(20.0).reshape(4, 5) / 20, task="multi-label").labels == "several"
    assert decided(WORDS, task="classify").class_axis == 1
    assert decided(WORDS, task="causal-lm").class_axis == 2
    assert decided(WORDS, task="seq2seq").class_axis == 2
    assert decided(LOGITS, task="embed").kind == "embed"
    with pytest.raises(KindError, match="'segment'"):
        decided(LOGITS, task="segment")


def test_probabilities_are_seen() -> None:
    assert decided(F.softmax(LOGITS, dim=1), torch.arange(4)).probabilities
    assert decided(torch.sigmoid(LOGITS), (LOGITS > 0).float()).probabilities
    assert not decided(F.log_softmax(LOGITS, dim=1), torch.arange(4)).probabilities


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(3, 4)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        logits = self.inner(x)
        return logits, None if targets is None else F.cross_entropy(logits, targets)


def test_a_model_with_a_loss_of_its_own_is_given_the_labels() -> None:
    task = decide_task(OwnLoss(), (torch.randn(4, 3), torch.arange(4)))
    assert (task.labels, task.with_labels, task.outputs) == ("own", True, ("0",))
    assert decide_task(OwnLoss(), torch.randn(4, 3)).labels == "none"


def test_a_model_that_draws_is_known_as_such() -> None:
    class Draws(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    assert decide_task(Draws(), torch.zeros(4, 3)).random
    assert not decided(LOGITS).random


# -- outputs --------------------------------------------------------------------------------------------


def test_all_tensors_are_named() -> None:
    nested = {"a": LOGITS, "maps": [PIXELS, (WORDS, None)], "loss": torch.tensor(1.0), "n": 3, "ids": torch.arange(3)}
    assert list(named_tensors(nested)) == ["a", "maps.0", "maps.1.0"]
    assert list(named_tensors(LOGITS)) == [""]
    assert list(named_tensors(SimpleNamespace(logits=LOGITS, other=1))) == ["logits"]
    assert list(named_tensors((LOGITS, torch.tensor(2.0)))) == ["0"]
    assert list(named_tensors(torch.tensor(2.0))) == [""]
    assert named_tensors(torch.zeros(2, 3, dtype=torch.complex64))[""].shape == (2, 3, 2)


@pytest.mark.parametrize(
    "output, names",
    [(None, ["cls", "maps.0", "maps.1"]), ("maps", ["maps.0", "maps.1"]), ("maps.1", ["maps.1"]), (0, ["cls"])],
)
def test_outputs_are_chosen_by_name_or_number(output: Any, names: list[str]) -> None:
    model = Gives({"cls": LOGITS, "maps": [PIXELS, WORDS]})
    assert list(judged_outputs(model, LOGITS, output)[0]) == names
    assert list(judged_outputs(model, LOGITS, lambda result: result["maps"][0])[0]) == [""]
    assert list(judged_outputs(model, LOGITS, lambda net, batch: net(batch)["cls"])[0]) == [""]
    with pytest.raises(FilterError, match=r"'cls', 'maps\.0', 'maps\.1'"):
        judged_outputs(model, LOGITS, "boxes")


@pytest.mark.parametrize("mask", [float("-inf"), -1e9, torch.finfo(torch.float32).min])
def test_masked_entries_do_not_count(mask: float) -> None:
    y = torch.randn(6, 5)
    masked = y.masked_fill(torch.arange(5) >= 3, mask)
    assert torch.equal(counted(masked), torch.arange(5).expand(6, 5) < 3)
    assert relative_distance(masked, masked) == 0
    torch.testing.assert_close(relative_distance(masked + 0.1, masked), relative_distance((y + 0.1)[:, :3], y[:, :3]))


def test_an_output_that_is_constant_or_zero_still_has_a_distance() -> None:
    same = torch.ones(4, 3)
    assert float(relative_distance(same + 0.1, same)) == pytest.approx(0.01)
    assert float(relative_distance(same * 0 + 0.1, same * 0)) == pytest.approx(0.01)


@pytest.mark.parametrize("whole", [False, True])
def test_without_labels_a_few_examples_decide_where_the_model_takes_them(whole: bool) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sizes: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            self.sizes.append(len(x))
            if whole and len(x) < 6:
                raise ValueError("too few")
            return x.softmax(dim=1)

    model = Counts()
    named = decide_task(model, torch.randn(6, 3), task="classify")
    assert model.sizes == ([2, 6, 6] if whole else [2, 2])
    assert named.probabilities
    assert not named.random
    model.sizes.clear()
    assert decide_task(model, (torch.randn(6, 3), torch.arange(6) % 3)).labels == "classes"
    assert model.sizes == [6, 6]
