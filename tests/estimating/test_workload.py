"""What a stage needs of memory where its start is packed."""

import pytest

from harness.estimating.memory import model_bytes
from harness.estimating.workload import (
    Workload,
    packed_as,
    parameter_factor,
    training_bytes,
)
from harness.models.resolve import EMBEDDED
from harness.models.shape import Shape, weight_bytes


def test_a_packed_folder_has_the_bytes_of_its_file_in_either_type(compress):
    for name, keeps_table in (("int8", False), ("int4", False), ("int4", True)):
        settings = {"ignore": ["*embed_tokens*", "*lm_head*"]} if keeps_table else {}
        student, _ = compress(name, settings)
        packed, shape = packed_as(student.path), Shape.of_folder(student.path)
        assert (packed.table_bits is None) == keeps_table
        in_float32 = weight_bytes(student.path, "float32")
        assert model_bytes(shape, 4, packed) == pytest.approx(in_float32)
        in_bfloat16 = weight_bytes(student.path, "bfloat16")
        assert model_bytes(shape, 2, packed) == pytest.approx(in_bfloat16, rel=0.1)
        assert parameter_factor(student.path) == 1
    assert packed_as(EMBEDDED / "tiny") is None


def test_adapters_beside_packed_weights_have_no_frozen_weights_in_float32():
    lora = Workload(trains=True, recipe="lora", bytes_per_weight=5.0)
    assert training_bytes(lora, 1e9, (), "float32") == 5e9
    # a byte for each weight, and the adapters' sixteen for each of theirs
    assert training_bytes(lora, 1e9, (), "float32", packed=1e9) == 2e9
