"""AWQ: a scale by hand, less error in every block, and a student that holds what it should."""

import json
from pathlib import Path

import pytest
import torch

import methods
import suites
from harness.contract import Budget, Job
from harness.data.source import LocalOrHubData
from harness.models.language_model import open_model
from harness.models.resolve import resolve
from harness.registry import Registry
from methods.awq import Awq, _Scaler, scale_of, scaled_error
from methods.compression.rounding import round_to_nearest

FEW = {"num_calibration_samples": 6, "max_seq_length": 64}


def job(folder):
    teacher = resolve("tiny", cache=Path("unused"))
    folder.mkdir(parents=True, exist_ok=True)
    return Job(
        teachers=(teacher,),
        student=str(teacher.path),
        student_base=teacher,
        tasks={"gsm8k-mini": suites.load("gsm8k-mini")},
        source=LocalOrHubData(),
        budget=Budget(seen_tokens=1, rows=48),
        seed=1,
        workdir=folder,
        cache=folder / "cache",
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the student, its notes, and each fold's errors: scaled, and plainly rounded."""
    errors = []
    best_scale = _Scaler._best_scale

    def recorded(self, fold, gram):
        weights = [self.layers.linear[name].weight.clone() for name in fold.readers]
        scale = best_scale(self, fold, gram)
        pair = tuple(
            sum(
                scaled_error(weight, one, gram, group_size=64, symmetric=True) for weight in weights
            )
            for one in (scale, torch.ones_like(scale))
        )
        errors.append((fold.readers[0], *pair))
        return scale

    folder = tmp_path_factory.mktemp("awq")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Scaler, "_best_scale", recorded)
        student = Awq(**FEW).compress(job(folder / "awq"))
    return student, json.loads((folder / "awq" / "cost.json").read_text())["notes"]["awq"], errors


def test_a_scale_by_hand():
    # sizes 4 and 1: at a = 1/2 they are 2 and 1, divided by sqrt(2 * 1)
    scale = scale_of(torch.tensor([4.0, 1.0]), 0.5)
    assert torch.allclose(scale, torch.tensor([2**0.5, 2**-0.5]))
    assert scale_of(torch.tensor([9.0, 1.0]), 0.0).tolist() == [1, 1]
    # an input that was always 0 counts as the smallest; one that nothing reached leaves all at 1
    assert torch.equal(scale_of(torch.tensor([4.0, 0.0]), 0.5), torch.ones(2))
    assert torch.equal(scale_of(torch.zeros(2), 0.5), torch.ones(2))


def test_an_error_of_two_by_two_by_hand():
    # step 1: 7 is exact and 0.4 becomes 0; its input has a second moment of 2, so 2 * 0.4^2
    weight, gram = torch.tensor([[7.0, 0.4], [7.0, 0.0]]), torch.diag(torch.tensor([1.0, 2.0]))
    plain = scaled_error(weight, torch.ones(2), gram, group_size=2, symmetric=True)
    assert plain == pytest.approx(2 * 0.4**2)
    # times 2 the weight is 0.8 and becomes 1, which is 0.5 behind the division: 2 * 0.1^2
    scale = torch.tensor([1.0, 2.0])
    scaled = scaled_error(weight, scale, gram, group_size=2, symmetric=True)
    assert scaled == pytest.approx(2 * 0.1**2)
    rounded = round_to_nearest(weight * scale, bits=4, group_size=2).dequantized() / scale
    assert rounded.tolist() == [[7.0, 0.5], [7.0, 0.0]]


@pytest.mark.slow
def test_every_block_loses_less_than_by_rounding_to_nearest(made):
    _, notes, errors = made
    blocks = {name.split(".")[2] for name, *_ in errors}
    assert len(blocks) == 8 and len(errors) == 4 * 8 and notes["scaled_layers"] == 7 * 8
    for block in blocks:
        of_block = [pair for name, *pair in errors if name.split(".")[2] == block]
        assert all(scaled <= plain for scaled, plain in of_block)
        assert sum(scaled for scaled, _ in of_block) < sum(plain for _, plain in of_block)
    assert 0 < notes["mean_exponent"] < 1


@pytest.mark.slow
def test_the_student_has_the_form_of_int4_and_norms_that_took_the_scales(made, tmp_path):
    student, notes, _ = made
    registry = Registry("method", methods.METHODS)
    control = registry.build("int4", Awq(**FEW).control_settings()).compress(job(tmp_path / "x"))
    configs = [json.loads((one.path / "config.json").read_text()) for one in (student, control)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert abs(student.bytes_on_disk - control.bytes_on_disk) < 64
    base = open_model(resolve("tiny", cache=Path("unused"))).model
    opened = open_model(student).model
    name = "model.layers.3.post_attention_layernorm.weight"
    assert not torch.equal(opened.get_parameter(name).float(), base.get_parameter(name).float())
    assert notes["bits_of_a_packed_weight"] == 4.25
