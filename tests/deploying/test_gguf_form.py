"""GGUF: blocks by hand, the student's own numbers by gguf's reading, and who opens the file."""

import json
import shutil

import numpy as np
import pytest
import torch

from harness.deploying.gguf_form import _blocks, fitting_kinds, write_gguf
from harness.deploying.reopened import reopen
from harness.deploying.stored import PackedMatrix, StoredStudent
from harness.errors import HarnessError

gguf = pytest.importorskip("gguf", reason="needs gguf")
BYTE_LEVEL = {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
}  # fmt: skip


def of_gpt_2(folder, target, *, config=(), step=BYTE_LEVEL):
    """Copy a student with a tokenizer that cuts texts as GPT-2's does."""
    shutil.copytree(folder, target)
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = step
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    changed = {**json.loads((target / "config.json").read_text()), **dict(config)}
    (target / "config.json").write_text(json.dumps(changed))
    return target


def matrix(bits, group, *, symmetric=True, inputs=64):
    torch.manual_seed(bits + group)
    codes = torch.randint(0 if bits == 4 else -127, 16 if bits == 4 else 128, (4, inputs))
    scale = (torch.rand(4, -(-inputs // group)) / 50 + 0.001).bfloat16()
    low, high = (0, 16) if not symmetric else (8, 9) if bits == 4 else (0, 1)
    zero = torch.randint(low, high, scale.shape).short()
    return PackedMatrix(codes.short(), scale, zero, group, bits, symmetric)


def test_a_block_by_hand():
    codes = torch.arange(32, dtype=torch.int16)[None] % 16
    own = PackedMatrix(codes, torch.tensor([[0.5]]), torch.tensor([[8]]), 32, 4, True)
    data = _blocks(own, slice(None), "q4_0")
    assert data.shape == (1, 18) and data[0, :2].view(np.float16)[0] == 0.5
    # byte i holds weight i in its low half and weight 16 + i in its high half
    assert data[0, 2:].tolist() == [number | number << 4 for number in range(16)]
    data = _blocks(own, slice(None), "q4_1")
    assert data[0, :4].view(np.float16).tolist() == [0.5, -4.0]
    data = _blocks(own, slice(None), "q8_0")
    assert data[0, 2:].view(np.int8).tolist() == [number % 16 - 8 for number in range(32)]


@pytest.mark.parametrize(
    ("own", "kind"),
    [
        (matrix(4, 32), "Q4_0"),
        (matrix(4, 64), "Q4_0"),  # two blocks of one scale
        (matrix(4, 128, inputs=192), "Q4_0"),  # the last group is half full, its blocks are full
        (matrix(4, 32), "Q4_1"),
        (matrix(4, 32), "Q8_0"),
        (matrix(4, 32, symmetric=False), "Q8_0"),
        (matrix(8, 64), "Q8_0"),
    ],
)
def test_gguf_reads_the_very_numbers_of_the_codes(own, kind):
    assert kind.lower() in fitting_kinds(own)
    data = _blocks(own, slice(None), kind.lower())
    decoded = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert torch.from_numpy(decoded).equal(own.values())


def test_a_zero_points_offset_is_rounded_to_fp16_alone():
    own = matrix(4, 32, symmetric=False)
    data = _blocks(own, slice(None), "q4_1")
    decoded = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType.Q4_1))
    offset = own.scale.float() * own.zero
    gap = (decoded - own.values()).abs().amax(1)
    assert bool((gap <= offset.amax(1) * 2**-11).all())  # half of the last of fp16's 11 bits


def test_what_fits():
    assert "q4_0" not in fitting_kinds(matrix(4, 32, symmetric=False))
    assert fitting_kinds(matrix(4, 16)) == ("f32", "f16", "bf16")
    assert fitting_kinds(matrix(8, 40, inputs=40)) == ("f32", "f16", "bf16")
    assert fitting_kinds(None)[-1] == "q8_0"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings", "asked", "tensors"),
    [
        ("int4", {"group_size": 32}, "auto", "5 F32, 14 Q4_0, 1 Q8_0"),
        ("int4", {"group_size": 32, "symmetric": False}, "auto", "5 F32, 14 Q4_1, 1 Q8_0"),
        ("int4", {"group_size": 32, "table": False}, "f16", "15 F16, 5 F32"),
    ],
)
def test_plain_transformers_opens_the_file_with_the_same_numbers(
    kind, settings, asked, tensors, packed_student, tmp_path
):
    folder = of_gpt_2(packed_student(kind, **settings), tmp_path / "student")
    written = write_gguf(StoredStudent(folder, "a[b=c]"), tmp_path / "out", kind=asked)
    assert written.path.name == "a-b-c.gguf" and f"tensors: {tensors};" in written.notes[-1]
    found = reopen(folder, written.path)
    assert (found.weights, found.missing) == (20, ())
    assert found.largest_change == pytest.approx(written.largest_change, rel=1e-4, abs=0)
    exact = settings.get("symmetric", True) and settings.get("table", True)
    assert (found.largest_change == 0) == exact


def test_llama_cpp_opens_the_file_cuts_texts_alike_and_answers_alike(packed_student, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    from transformers import AutoTokenizer

    from harness.deploying.plain_form import write_plain

    folder = of_gpt_2(packed_student("int4", group_size=32), tmp_path / "student")
    written = write_gguf(StoredStudent(folder, "row"), tmp_path / "out")
    served = llama_cpp.Llama(str(written.path), n_ctx=128, logits_all=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Tom has 12 apples.\n  He eats  3: how many?\n\n= 9, isn't it"
    ids = served.tokenize(text.encode(), add_bos=True, special=True)
    assert ids == tokenizer(text)["input_ids"]
    assert served.token_eos() == tokenizer.eos_token_id
    served.eval(ids)
    logits = torch.tensor(np.array(served.scores[: len(ids)]))
    write_plain(StoredStudent(folder, "row"), tmp_path / "plain")
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = plain(torch.tensor([ids])).logits[0]
    # llama.cpp rounds activations to 8 bits before it multiplies them with packed weights
    assert float((logits - expected).abs().max()) <= 0.1 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"group_size": 16}, "q4_0", r"is int4 in groups of 16 over 64 inputs, which q4_0 cannot "
         "express; type --kind bf16 or f16 or f32, or auto"),
        ({"group_size": 32, "symmetric": False}, "q4_0", "groups of 32 with zero points .*type "
         "--kind q4_1 or q8_0 or"),
        ({"group_size": 32}, "q5_0", "unknown GGUF kind 'q5_0'; did you mean 'q8_0'"),
    ],
)  # fmt: skip
def test_a_kind_that_cannot_hold_the_codes_is_refused(
    settings, kind, message, packed_student, tmp_path
):
    folder = of_gpt_2(packed_student("int4", **settings), tmp_path / "student")
    with pytest.raises(HarnessError, match=message) as caught:
        write_gguf(StoredStudent(folder, "row"), tmp_path / "out", kind=kind)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "type yarn"),
        ({"hidden_act": "gelu"}, "the activation gelu"),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "mistral"),
    ],
)  # fmt: skip
def test_another_architecture_is_refused_with_what_converts_it(
    config, message, packed_student, tmp_path
):
    folder = of_gpt_2(packed_student("int8"), tmp_path / "student", config=config)
    with pytest.raises(HarnessError, match=f"{message}.*convert_hf_to_gguf.py"):
        write_gguf(StoredStudent(folder, "row"), tmp_path / "out")


def test_q4_of_a_student_without_int4_is_refused(packed_student, tmp_path):
    folder = of_gpt_2(packed_student("int8"), tmp_path / "student")
    with pytest.raises(HarnessError, match="no layer in int4, so q4_0 would round it anew"):
        write_gguf(StoredStudent(folder, "row"), tmp_path / "out", kind="q4_0")
