"""A stored student's weights by plain names: by hand, and as our own modules compute them."""

import json

import pytest
import torch

from harness.deploying.stored import (
    PackedMatrix,
    StoredStudent,
    empty_plain_model,
    largest_change,
)
from harness.errors import HarnessError


def test_a_packed_matrix_by_hand():
    codes = torch.tensor([[0, 15, 8, 9], [7, 8, 1, 2]], dtype=torch.int16)
    scale = torch.tensor([[0.5, 2.0], [0.25, 1.0]], dtype=torch.bfloat16)
    zero = torch.tensor([[8, 8], [7, 0]], dtype=torch.int16)
    values = PackedMatrix(codes, scale, zero, 2, 4, False).values()
    assert values.tolist() == [[-4.0, 3.5, 0.0, 2.0], [0.0, 0.25, 1.0, 2.0]]


def test_the_largest_change_is_relative_to_the_largest_weight():
    # bf16 keeps 8 bits: of 1 + 2^-8 it makes 1 (ties to even), of 2 it makes 2
    assert largest_change(torch.tensor([2.0, 1 + 2**-8]), torch.bfloat16) == 2**-8 / 2
    assert largest_change(torch.tensor([2.0, 0.0, -0.5]), torch.bfloat16) == 0


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("int4", {"group_size": 32}),
        ("int4", {"group_size": 16, "symmetric": False}),
        ("int4", {"group_size": 24}),  # the last group is not full
        ("int8", {}),
        ("int8-dynamic", {}),
    ],
)
def test_every_weight_is_what_the_packed_module_stands_for(kind, settings, packed_student):
    from transformers import AutoModelForCausalLM

    folder = packed_student(kind, **settings)
    student = StoredStudent(folder, "row")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = list(student.names())
    assert len(names) == len(set(names)) == 2 * 9 + 2  # two blocks, table and last norm
    for module, spec in student.specs.items():
        if spec["kind"] == "tied":
            continue
        values = student.plain(f"{module}.weight")
        assert values.equal(model.get_submodule(module).dequantized())
        assert student.matrix(module).values().equal(values)
    plain = empty_plain_model(student)
    assert set(names) == set(plain.state_dict()) - {"lm_head.weight"}


def test_factors_and_adapters_are_multiplied_out(tmp_path, packed_student):
    from safetensors.torch import load_file, save_file

    folder = packed_student("int4", group_size=32, table=False)
    name = "model.layers.0.self_attn.q_proj"
    tensors = load_file(folder / "model.safetensors")
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    tensors |= {f"{name}.adapter_down.weight": down, f"{name}.adapter_up.weight": up}
    for leaf in ("weight", "scale"):  # two factors of 32 x 3 and 3 x 32 in place of another matrix
        del tensors[f"model.layers.1.self_attn.q_proj.{leaf}"]
    first, second = torch.randn(3, 32), torch.randn(32, 3)
    other = "model.layers.1.self_attn.q_proj"
    tensors |= {f"{other}.weight": first, f"{other}.up.weight": second}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    before = StoredStudent(folder, "row").plain(f"{name}.weight")
    modules[name]["adapter"] = 2
    modules[other] = {"kind": "float", "shape": [3, 32], "factors": True}
    modules[f"{other}.up"] = {"kind": "float", "shape": [32, 3]}
    (folder / "config.json").write_text(json.dumps(config))
    student = StoredStudent(folder, "row")
    assert torch.allclose(student.plain(f"{name}.weight"), before + up @ down, atol=1e-5)
    assert torch.allclose(student.plain(f"{other}.weight"), second @ first, atol=1e-5)
    assert student.merged(name) == "an adapter of rank 2" and student.matrix(name) is None
    assert f"{other}.up.weight" not in set(student.names())
    empty_plain_model(student)  # the shapes are the architecture's again


def test_a_layer_of_an_odd_width_is_refused_by_name(packed_student):
    folder = packed_student("int4", group_size=32, table=False)
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 60
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HarnessError, match="only our own format holds such layers") as caught:
        empty_plain_model(StoredStudent(folder, "row"))
    assert "mlp.down_proj.weight is 32 x 64, and the plain" in str(caught.value)
    assert "has 32 x 60" in str(caught.value) and "\n" not in str(caught.value)


def test_another_librarys_format_is_refused(random_model, tmp_path):
    import shutil

    folder = tmp_path / "student"
    shutil.copytree(random_model.path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HarnessError, match=r"nf4 is stored as bitsandbytes.*export a row of int8"):
        StoredStudent(folder, "nf4").refuse_library_format("plain safetensors")
