"""AutoRound: what the library chose is what is packed; the library itself where it is installed."""

import importlib.machinery
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import methods
import suites
from harness.catalog import methods as method_table
from harness.contract import Budget, Job
from harness.data.source import LocalOrHubData
from harness.errors import CellFailed, Skipped
from harness.estimating.workload import workload_of
from harness.models.resolve import resolve
from harness.registry import Registry
from methods.autoround import AutoRound
from methods.compression.rounding import round_to_nearest

FEW = {"num_calibration_samples": 4, "max_seq_length": 32, "group_size": 32}


def job(folder):
    teacher = resolve("tiny", cache=Path("unused"))
    folder.mkdir(parents=True, exist_ok=True)
    return Job(
        teachers=(teacher,),
        student=str(teacher.path),
        student_base=teacher,
        tasks={"gsm8k-mini": suites.load("gsm8k-mini")},
        source=LocalOrHubData(),
        budget=Budget(seen_tokens=1, rows=24),
        seed=3,
        workdir=folder,
        cache=folder / "cache",
    )


@pytest.fixture
def library(monkeypatch):
    """Stand in for auto-round: it rounds to nearest, and keeps what it was called with."""
    module = ModuleType("auto_round")
    module.__spec__ = importlib.machinery.ModuleSpec("auto_round", None)
    module.calls, module.left, module.shift = [], "none", 0.0

    class Library:
        def __init__(self, model, **settings):
            self.model, self.settings = model, settings
            module.calls.append(settings)

        def quantize(self):
            for name, layer in self.model.named_modules():
                is_left = name in self.settings["layer_config"] or name.endswith(module.left)
                if not isinstance(layer, torch.nn.Linear) or is_left:
                    continue
                matrix = round_to_nearest(
                    layer.weight,
                    bits=4,
                    group_size=self.settings["group_size"],
                    symmetric=self.settings["sym"],
                )
                layer.weight.copy_(matrix.dequantized() + module.shift)
                layer.scale = matrix.scale
                layer.zp = 8 if self.settings["sym"] else matrix.zero_point

    module.AutoRound = Library
    monkeypatch.setitem(sys.modules, "auto_round", module)
    return module


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_the_library_chose_is_packed_as_int4(symmetric, library, tmp_path):
    row = AutoRound(**FEW, symmetric=symmetric, ignore="*.layers.0.*")
    student = row.compress(job(tmp_path / "a"))
    control = Registry("method", methods.METHODS).build("int4", row.control_settings())
    nearest = control.compress(job(tmp_path / "b"))
    weights = [(one.path / "model.safetensors").read_bytes() for one in (student, nearest)]
    assert weights[0] == weights[1]
    [settings] = library.calls
    assert settings["seed"] == 3 and settings["iters"] == 200 and settings["nsamples"] == 4
    assert "model.layers.0.mlp.up_proj" in settings["layer_config"]
    notes = json.loads((tmp_path / "a" / "cost.json").read_text())["notes"]["autoround"]
    assert notes["packed_layers"] == 7 * 7 and notes["iters"] == 200


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("left", "3.mlp.down_proj", "did not round model.layers.3.mlp.down_proj"),
        ("shift", 1e-4, "no int4 codes of its scales"),
    ],
)
def test_a_layer_that_was_not_rounded_or_otherwise_fails_the_row(
    attribute, value, message, library, tmp_path
):
    setattr(library, attribute, value)
    with pytest.raises(CellFailed, match=message):
        AutoRound(**FEW).compress(job(tmp_path))


def test_a_missing_library_is_named_with_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "auto_round", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Skipped, match=r"pip install 'compression-harness\[autoround\]'"):
        AutoRound().compress(job(tmp_path))


def test_a_plan_prices_its_steps_and_the_offsets_of_a_block():
    few, many = (
        workload_of(method_table().build("autoround", {"iters": iters})) for iters in (16, 160)
    )
    # 16 steps over 8 of 128 sequences are one pass, forward and backward three; and two more
    assert few.calibration_passes == 5 and many.calibration_passes == 32
    assert few.block_bytes == 12
    assert workload_of(method_table().build("int4-calibrated", {})).calibration_passes == 2


@pytest.mark.peer
@pytest.mark.slow
def test_the_library_lowers_the_error_that_it_minimises(tmp_path):
    pytest.importorskip("auto_round")
    students = [
        AutoRound(**FEW, iters=iters, batch_size=2).compress(job(tmp_path / str(iters)))
        for iters in (1, 30)
    ]
    assert students[0].digest != students[1].digest
    assert students[0].bytes_on_disk == students[1].bytes_on_disk
