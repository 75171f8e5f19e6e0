"""Plain safetensors: copied where the student holds floats, unpacked exactly where it is packed."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from harness.deploying.plain_form import write_plain
from harness.deploying.stored import StoredStudent, exact_dtype

# plain transformers and nothing of ours: prints a digest of every weight and the logits' sum
REOPEN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
AutoTokenizer.from_pretrained(sys.argv[1]); GenerationConfig.from_pretrained(sys.argv[1])
assert not any(name.startswith(("harness", "methods")) for name in sys.modules)
torch.save(model.state_dict(), sys.argv[2])
"""


@pytest.mark.parametrize("dtype", ["auto", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_packed_student_is_unpacked_and_opens_in_a_fresh_process(dtype, packed_student, tmp_path):
    student = StoredStudent(packed_student("int4", group_size=32), "row")
    written = write_plain(student, tmp_path / "out", dtype=dtype)
    done = [sys.executable, "-P", "-c", REOPEN, str(tmp_path / "out"), str(tmp_path / "state")]
    subprocess.run(done, check=True, cwd=tmp_path)
    state = torch.load(tmp_path / "state")
    changes = []
    for name in student.names():
        own, opened = student.plain(name).double(), state[name].double()
        changes.append(float((opened - own).abs().max() / own.abs().max()))
    assert max(changes) == written.largest_change
    assert (written.largest_change == 0) == (dtype == "auto")
    assert str(state["model.norm.weight"].dtype) == (
        "torch.float32" if dtype == "auto" else "torch.bfloat16"
    )
    if dtype == "bfloat16":  # 8 bits of each number are kept
        assert 2**-10 < written.largest_change <= 2**-8
        assert f"at most {100 * written.largest_change:.2g} % of the larg" in written.notes[-1]


def test_symmetric_int4_of_a_float_table_is_exact_in_half_the_bytes(packed_student, tmp_path):
    student = StoredStudent(packed_student("int4", group_size=32, table=False), "row")
    write_plain(student, tmp_path / "out")
    # a scale of 8 bits times a code of 3 is exact in fp16's 11; the bf16 table need not be
    exact = exact_dtype(student)
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {exact}
    for name in student.names():
        assert state[name].double().equal(student.plain(name).double())


def test_a_student_of_floats_is_copied_byte_for_byte(random_model, tmp_path):
    (random_model.path / "README.md").write_text("a card")
    written = write_plain(StoredStudent(random_model.path, "row"), tmp_path / "out")
    (random_model.path / "README.md").unlink()
    files = {path.name: path.read_bytes() for path in random_model.path.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
    assert written.notes == ("copied as it is stored",)
