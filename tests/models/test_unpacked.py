"""Weights unpacked once: the same bits, only where there is room, and gone afterwards."""

from dataclasses import replace

import pytest
import torch

from harness.models import packed, unpacked
from harness.models.language_model import open_model
from harness.models.unpacked import unpacked_once


@pytest.fixture
def student(compress, monkeypatch):
    """Return an opened int8 student, on a device that counts as one which keeps weights."""
    monkeypatch.setattr(unpacked, "KEPT_DEVICES", ("cpu",))
    return open_model(compress("int8")[0])


def kept_bytes(opened):
    """Return the bytes of unpacked weights that the layers of a model hold."""
    weights = [module.__dict__.get("kept") for module in opened.model.modules()]
    return sum(weight.numel() * weight.itemsize for weight in weights if weight is not None)


def test_many_rows_give_the_same_bits_and_the_weights_go_again(student):
    ids = torch.arange(40)[None] + 10
    with torch.inference_mode():
        expected = student.model(ids).logits
        with unpacked_once(student):
            matrices = {
                id(module): 2 * module.in_features * module.out_features
                for module in student.model.modules()
                if isinstance(module, packed.Int8Linear)
            }
            assert kept_bytes(student) == sum(matrices.values()) > 0
            with unpacked_once(student):  # a call inside a call leaves them to the outer one
                pass
            assert kept_bytes(student) == sum(matrices.values())
            assert student.model(ids).logits.equal(expected)
    assert kept_bytes(student) == 0


@pytest.mark.parametrize("problem", [None, torch.OutOfMemoryError("CUDA out of memory")])
def test_without_room_every_call_unpacks_as_always(student, problem, monkeypatch):
    def refuse(layer):
        raise problem

    if problem is None:
        monkeypatch.setattr(unpacked, "free_bytes", lambda device: 1_000)
    else:
        monkeypatch.setattr(packed.Int8Linear, "unpacked", refuse)
    with unpacked_once(student):
        assert kept_bytes(student) == 0


def test_nothing_is_kept_on_a_cpu_nor_of_a_plain_model(compress, embedded, monkeypatch):
    with unpacked_once(open_model(compress("int8")[0])) as nothing:
        assert nothing is None
    packed_student = open_model(compress("int8")[0])
    with unpacked_once(packed_student):
        assert kept_bytes(packed_student) == 0
    monkeypatch.setattr(unpacked, "KEPT_DEVICES", ("cpu",))
    with unpacked_once(replace(embedded)):
        assert kept_bytes(embedded) == 0
