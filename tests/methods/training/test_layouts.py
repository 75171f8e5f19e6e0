"""Where rows stand when they are padded or packed: by hand, and there and back."""

import pytest
import torch

from methods.training import layouts, rows
from methods.training.layouts import RowShape, rounded_width
from methods.training.rows import TokenRow, batch_of

ROWS = [TokenRow((11, 12, 13), 2), TokenRow((21, 22, 23, 24, 25), 1), TokenRow((31,), 1)]


def test_padded_rows_by_hand():
    padded = batch_of(ROWS, 9).padded()
    assert padded.ids.tolist() == [
        [11, 12, 13, 9, 9],
        [21, 22, 23, 24, 25],
        [31, 9, 9, 9, 9],
    ]
    assert padded.attention.tolist() == [[1, 1, 1, 0, 0], [1] * 5, [1, 0, 0, 0, 0]]
    assert padded.trained_N.tolist() == [1, 5, 6, 7, 8]
    assert padded.after_first.tolist() == [1, 2, 6, 7, 8, 9]
    assert padded.has_padding and not batch_of(ROWS[:1], 9).padded().has_padding
    assert set(padded.inputs) == {"attention_mask"}


def test_packed_rows_by_hand():
    packed = batch_of(ROWS, 9).packed
    assert packed.ids.tolist() == [[11, 12, 13, 21, 22, 23, 24, 25, 31]]
    assert packed.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0]]
    assert packed.trained_N.tolist() == [1, 3, 4, 5, 6]
    assert packed.after_first.tolist() == [1, 2, 4, 5, 6, 7]
    assert packed.padded_places.tolist() == [0, 1, 2, 5, 6, 7, 8, 9, 10]
    assert packed.shapes == (RowShape(3, 2), RowShape(5, 1), RowShape(1, 1))


def test_the_places_are_those_of_the_masks():
    """What was read from masks before is what lengths say."""
    batch = batch_of(ROWS, 9)
    places = torch.nn.functional.pad(batch.mask, (0, 1)).flatten().nonzero().flatten()
    assert batch.padded().trained_N.tolist() == places.tolist()
    assert batch.labels_N.tolist() == batch.ids[:, 1:][batch.mask].tolist()
    columns = torch.arange(4).expand(3, -1)[batch.mask]
    assert batch.beyond_first_N.tolist() == (columns > 0).tolist()
    assert batch.trained_tokens == len(batch.labels_N)
    for layout in (batch.padded(), batch.packed):
        following = layout.ids.flatten()[layout.trained_N + 1]
        assert following.tolist() == batch.labels_N.tolist()


def test_states_are_padded_and_packed_again_with_their_gradients():
    packed = batch_of(ROWS, 9).packed
    states = torch.randn(1, 2, 9, 4, requires_grad=True)  # (1, H, P, D)
    padded = packed.pad(states)
    assert padded.shape == (3, 2, 5, 4)
    assert torch.equal(padded[0, :, :3], states[0, :, :3])
    assert torch.equal(padded[1], states[0, :, 3:8])
    assert torch.equal(padded[2, :, :1], states[0, :, 8:])
    assert not padded[0, :, 3:].any() and not padded[2, :, 1:].any()
    back = packed.pack(padded.transpose(1, 2))
    assert torch.equal(back, states.transpose(1, 2))
    weight = torch.randn_like(back)
    (back * weight).sum().backward()
    assert torch.equal(states.grad, weight.transpose(1, 2))


@pytest.mark.parametrize(
    ("width", "most", "rounded"),
    [(1, None, 64), (64, None, 64), (65, None, 128), (65, 100, 100), (100, 80, 100), (60, 512, 64)],
)
def test_widths_on_a_gpu_are_multiples_of_64_that_the_model_can_read(width, most, rounded):
    assert rounded_width(width, "cuda", most=most) == rounded
    assert rounded_width(width, "cuda:1", most=most) == rounded
    assert rounded_width(width, "cpu", most=most) == width


def test_a_batch_of_wider_rows_is_filled_with_what_nobody_reads(monkeypatch):
    def by_eight(width, device, *, most=None):
        return -(-width // 8) * 8

    monkeypatch.setattr(rows, "rounded_width", by_eight)
    monkeypatch.setattr(layouts, "rounded_width", by_eight)
    batch = batch_of(ROWS, 9)
    padded, packed = batch.padded(), batch.packed
    assert padded.ids.shape == (3, 8) and padded.attention.sum() == 9
    assert padded.ids.flatten()[padded.trained_N + 1].tolist() == batch.labels_N.tolist()
    assert packed.ids.shape == (1, 16) and packed.tokens == 9
    assert packed.inputs["position_ids"].shape == (1, 16)
    states = torch.randn(1, 2, 16, 4)
    assert packed.pad(states).shape == (3, 2, 8, 4)
    back = packed.pack(packed.pad(states).transpose(1, 2))
    assert torch.equal(back[:, :9], states.transpose(1, 2)[:, :9]) and not back[:, 9:].any()


def test_a_batch_goes_to_a_device_with_what_is_made_of_it():
    batch = batch_of(ROWS, 9).to("meta")
    assert {batch.ids.device.type, batch.packed.ids.device.type, batch.labels_N.device.type} == {
        "meta"
    }
