"""Image batches: content, order by (seed, epoch), augmentation."""

from __future__ import annotations

import pytest
import torch

from tensortrain.data import image_batches
from tensortrain.errors import DataError


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, 12, 10), generator=generator, dtype=torch.uint8)
    return pixels, torch.arange(50)


def together(batches):
    xs, ys = zip(*batches, strict=True)
    return torch.cat(xs), torch.cat(ys)


def test_unshuffled_batches_are_the_normalised_images(pictures):
    batches = image_batches(*pictures, batch_size=16, shuffle=False, mean=0.5, std=0.25)
    x, y = together(batches)
    expected = (pictures[0].double() / 255 - 0.5) / 0.25
    assert x.dtype == torch.float32
    assert torch.equal(y, pictures[1])
    assert (x[:, 0].double() - expected).abs().max() <= 1e-6
    assert [len(y) for _, y in batches] == [16, 16, 16, 2]
    assert len(batches) == 4


def test_drop_last(pictures):
    batches = image_batches(*pictures, batch_size=16, drop_last=True)
    assert [len(y) for _, y in batches] == [16] * len(batches) == [16] * 3


def test_order_depends_on_seed_and_epoch_only(pictures):
    def order(seed, epoch, augment):
        batches = image_batches(*pictures, batch_size=7, seed=seed, augment=augment)
        batches.set_epoch(epoch)
        torch.rand(3)  # the global generator must not matter
        return together(batches)

    for augment in (False, True):
        first, again = order(1, 0, augment), order(1, 0, augment)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        for other in (order(2, 0, augment), order(1, 1, augment)):
            assert not torch.equal(first[1], other[1])
            assert torch.equal(first[1].sort().values, other[1].sort().values)


def test_the_global_generator_is_left_alone(pictures):
    state = torch.get_rng_state()
    list(image_batches(*pictures, batch_size=7, augment=True))
    assert torch.equal(state, torch.get_rng_state())


def test_augmented_images_are_shifts_and_flips(pictures):
    pixels, labels = pictures
    batches = image_batches(pixels, labels, batch_size=50, augment=True, mean=0.0, std=1.0)
    frame = torch.nn.functional.pad(pixels, (2, 2, 2, 2)).float() / 255
    seen = set()
    for epoch in range(4):
        batches.set_epoch(epoch)
        x, y = together(batches)
        for picture, label in zip(x[:, 0], y.tolist(), strict=True):
            windows = {
                (down, right, flip): window.flip(1) if flip else window
                for down in range(5)
                for right in range(5)
                for flip in (False, True)
                for window in (frame[label, down : down + 12, right : right + 10],)
            }
            found = [move for move, window in windows.items() if (picture - window).abs().max() <= 1e-6]
            assert len(found) == 1
            seen.add(found[0])
    assert len(seen) > 40  # of 50 moves, in 200 draws


def test_padding_centres(pictures):
    x, _ = together(image_batches(*pictures, batch_size=50, shuffle=False, pad_to=16, mean=0.0, std=1.0))
    assert x.shape == (50, 1, 16, 16)
    assert torch.equal(x[:, 0, 2:14, 3:13] * 255, pictures[0].float())
    x[:, 0, 2:14, 3:13] = 0
    assert not x.any()


@pytest.mark.parametrize(
    "change, says",
    [
        ({"images": torch.zeros(50, 12, 10)}, "uint8"),
        ({"labels": torch.arange(49)}, "one label"),
        ({"batch_size": 0}, "batch_size has 0"),
        ({"pad_to": 11}, "at least 12"),
    ],
)
def test_bad_input(pictures, change, says):
    arguments = {"images": pictures[0], "labels": pictures[1], "batch_size": 4} | change
    with pytest.raises(DataError, match=says):
        image_batches(**arguments)
