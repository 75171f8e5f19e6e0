"""compressed-tensors: words by hand, the student's own integers, and the library's own reading."""

import json

import pytest
import torch
from safetensors.torch import load_file

from harness.deploying.compressed_form import pack_words, write_compressed
from harness.deploying.reopened import reopen
from harness.deploying.stored import StoredStudent
from harness.errors import HarnessError


def test_words_by_hand():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15, 9]])
    words = pack_words(codes, 4)
    assert words.dtype == torch.int32 and words.shape == (1, 2)
    assert int(words[0, 0]) == 0xF7654321 - 2**32 and int(words[0, 1]) == 9
    assert int(pack_words(torch.tensor([[1, 0, 2, 255]]), 8)[0, 0]) == 0xFF020001 - 2**32


CASES = {
    "int4": ("int4", {"group_size": 32}),
    "int4 of zero points": ("int4", {"group_size": 16, "symmetric": False}),
    "int8": ("int8", {}),
    "int8 and activations": ("int8-dynamic", {}),
    "int4 and a float table": ("int4", {"group_size": 32, "table": False}),
}
MIXED = {"model.layers.0.self_attn.o_proj": "int8-dynamic", "model.layers.1.mlp.up_proj": None}


def unpacked(state, name, settings):
    """Return a weight by a reading of the format written for this test alone, weight by weight."""
    weights = settings["weights"]
    scale = state[f"{name}.weight_scale"].double()
    if f"{name}.weight" in state:
        return state[f"{name}.weight"].double() * scale
    bits = weights["num_bits"]
    outputs, inputs = state[f"{name}.weight_shape"].tolist()

    def integer(words, row, column):
        position = column * bits
        word = int(words[row, position // 32]) % 2**32
        return (word >> position % 32) % 2**bits - 2 ** (bits - 1)

    rows = []
    for row in range(outputs):
        values = []
        for column in range(inputs):
            group = column // (weights["group_size"] or inputs)
            code = integer(state[f"{name}.weight_packed"], row, column)
            if not weights["symmetric"]:
                code -= integer(state[f"{name}.weight_zero_point"].T, group, row)
            values.append(float(scale[row, group]) * code)
        rows.append(values)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_the_students_own_integers_and_scales_stand_in_the_file(case, packed_student, tmp_path):
    kind, settings = CASES[case]
    student = StoredStudent(packed_student(kind, **settings), "row")
    written = write_compressed(student, tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    [group] = config["config_groups"].values()
    assert written.largest_change == 0 and config["ignore"] == ["lm_head"]
    assert config["format"] == ("int-quantized" if kind == "int8-dynamic" else "pack-quantized")
    # vLLM takes int-quantized weights only beside quantized activations
    assert (group["input_activations"] is None) == (config["format"] == "pack-quantized")
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        own = student.matrix(name)
        assert unpacked(state, name, group).float().equal(student.plain(f"{name}.weight"))
        assert state[f"{name}.weight_scale"].double().equal(own.scale.double())
    table = state["model.embed_tokens.weight"]
    assert table.double().equal(student.plain("model.embed_tokens.weight").double())


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, "mixed"])
def test_the_formats_library_reads_equal_values_in_a_fresh_process(case, packed_student, tmp_path):
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    kind, settings = CASES.get(case, ("int4", {"group_size": 32, "others": MIXED}))
    folder = packed_student(kind, **settings)
    write_compressed(StoredStudent(folder, "row"), tmp_path / "out")
    found = reopen(folder, tmp_path / "out")
    assert (found.weights, found.missing, found.largest_change) == (20, (), 0)
    assert found.libraries[1].startswith("compressed-tensors ")


LAYER = "model.layers.0.self_attn."


@pytest.mark.parametrize(
    ("others", "form", "joined"),
    [
        ({}, "pack-quantized", ""),
        ({f"{LAYER}o_proj": "int8"}, "pack-quantized", ""),
        ({f"{LAYER}o_proj": "int8-dynamic"}, "mixed-precision", ""),
        ({f"{LAYER}o_proj": None}, "pack-quantized", ""),
        ({f"{LAYER}k_proj": "int8"}, "pack-quantized", "self_attn.q_proj, "),
        ({"model.layers.1.mlp.up_proj": None}, "pack-quantized", "mlp.gate_proj, "),
    ],
)
def test_layers_that_are_packed_alike_are_a_group(others, form, joined, packed_student, tmp_path):
    student = StoredStudent(packed_student("int4", group_size=32, others=others), "row")
    written = write_compressed(student, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    packed = {name: kind for name, kind in others.items() if kind}
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert config["format"] == form and len(targets) == 1 + bool(packed)
    assert targets == [["Linear"]] or list(packed) in targets
    floats = [name for name, kind in others.items() if kind is None]
    assert config["ignore"] == [*floats, "lm_head"]
    formats = {group.get("format") for group in config["config_groups"].values()}
    assert formats == ({"pack-quantized", "int-quantized"} if form[0] == "m" else {None})
    # engines compute q, k and v as one matrix, gate and up as another
    warned = [note for note in written.notes if "packed in different ways" in note]
    assert [joined in note for note in warned] == ([True] if joined else [])


def test_logits_are_those_of_the_floats_that_the_integers_stand_for(packed_student, tmp_path):
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    from transformers import AutoModelForCausalLM

    from harness.deploying.plain_form import write_plain

    student = StoredStudent(packed_student("int4", group_size=32), "row")
    write_compressed(student, tmp_path / "packed")
    write_plain(student, tmp_path / "plain")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        packed, plain = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
            .eval()(input_ids=ids)
            .logits
            for name in ("packed", "plain")
        )
    assert float((packed - plain).abs().max()) <= 1e-5 * float(plain.abs().max())


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("int4", {"group_size": 24}, "64 inputs in groups of 24, the last of which is not full.*"
         r"type --form safetensors, or make a row of groups that divide 64: 'int4\[group_size=32"),
        ("float", {}, "holds no layer in int8 or int4.*type --form safetensors"),
        ("adapter", {}, "holds an adapter of rank 2, which compressed-tensors cannot express"),
    ],
)  # fmt: skip
def test_what_the_format_cannot_express_is_refused_in_one_line(
    kind, settings, message, packed_student, random_model, tmp_path
):
    folder = random_model.path
    if kind != "float":
        folder = packed_student("int4", **{"group_size": 32, **settings}, table=False)
    student = StoredStudent(folder, "row")
    if kind == "adapter":
        student.specs["model.layers.0.self_attn.q_proj"]["adapter"] = 2
    with pytest.raises(HarnessError, match=message) as caught:
        write_compressed(student, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
