"""Checkpoints from outside: GGUF files keep numbers and size, adapters lie on a base."""

import json
import shutil

import pytest
import torch
from gguf_files import exact, write_llama
from safetensors.torch import load_file

from harness.errors import HarnessError
from harness.models.language_model import open_model, stored_dtype
from harness.models.outside import resolve_outside
from harness.models.resolve import EMBEDDED, resolve

IDS = torch.tensor([[5, 17, 300, 41, 8, 99]])


@pytest.fixture(scope="module")
def adapter(random_model, tmp_path_factory):
    """Return the folder of a LoRA adapter on the random model, written by peft."""
    peft = pytest.importorskip("peft", reason="adapters need peft")
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter") / "lora"
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(random_model.path)
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def logits_of(checkpoint):
    with torch.no_grad():
        return open_model(checkpoint).model(IDS).logits


def test_an_adapter_answers_as_peft_has_it_and_weighs_both(adapter, random_model, tmp_path):
    peft = pytest.importorskip("peft", reason="adapters need peft")
    from transformers import AutoModelForCausalLM

    checkpoint = resolve_outside(str(adapter), cache=tmp_path, base=random_model)
    base = AutoModelForCausalLM.from_pretrained(random_model.path, dtype=torch.float32)
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(base, adapter).eval()(IDS).logits
    assert torch.equal(logits_of(checkpoint), expected)
    assert not torch.allclose(logits_of(random_model), expected)
    weights = adapter / "adapter_model.safetensors"
    assert checkpoint.bytes_on_disk == random_model.bytes_on_disk + weights.stat().st_size
    assert checkpoint.note.startswith("LoRA adapter of rank 3 on random")
    assert checkpoint.parents == (random_model.digest,)


def test_an_adapter_alone_lies_on_the_model_that_it_names(adapter, random_model, tmp_path):
    own_base = resolve_outside(str(adapter), cache=tmp_path)
    given = resolve_outside(str(adapter), cache=tmp_path, base=random_model)
    assert own_base.base == random_model.path and own_base.digest == given.digest
    nameless = shutil.copytree(adapter, tmp_path / "nameless")
    config = json.loads((nameless / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": None})
    )
    with pytest.raises(HarnessError, match=r"does not say which model .*--teacher MODEL"):
        resolve_outside(str(nameless), cache=tmp_path)


def test_the_digest_of_an_adapter_is_that_of_its_contents_and_its_base(
    adapter, random_model, tmp_path
):
    here = resolve_outside(str(adapter), cache=tmp_path, base=random_model)
    moved = shutil.copytree(adapter, tmp_path / "moved")
    assert resolve_outside(str(moved), cache=tmp_path, base=random_model).digest == here.digest
    other_base = resolve("tiny", cache=tmp_path)
    on_other = resolve_outside(str(adapter), cache=tmp_path, base=other_base)
    assert on_other.digest != here.digest
    assert "made for random" in on_other.note
    with pytest.raises(HarnessError, match=r"does not fit this model .*teacher that it was made"):
        open_model(on_other)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"pickles are programs"),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(
                (folder / "adapter_model.safetensors").read_bytes()[:-8]
            ),
            r"is damaged .*download or save",
        ),
        (
            lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}'),
            r"kind 'IA3'; LoRA adapters are opened: merge",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), r"is damaged"),
    ],
    ids=["pickled", "torn", "other kind", "no JSON"],
)
def test_an_adapter_that_cannot_be_opened_is_refused_in_one_line(
    damage, message, adapter, random_model, tmp_path
):
    folder = shutil.copytree(adapter, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(HarnessError, match=message) as refusal:
        resolve_outside(str(folder), cache=tmp_path, base=random_model)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K", "Q8_0"])
def test_a_gguf_row_keeps_the_numbers_of_its_file_and_weighs_the_file(kind, tmp_path):
    pytest.importorskip("gguf", reason="opening GGUF files needs the gguf package")
    path = tmp_path / "small.gguf"
    stored = write_llama(path, {"": kind}, EMBEDDED / "tiny")
    checkpoint = resolve_outside(str(path), cache=tmp_path / "cache")
    tensors = load_file(checkpoint.path / "model.safetensors")
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    }
    for theirs, ours in names.items():
        expected = torch.from_numpy(exact(*stored[theirs]).copy())
        assert torch.equal(tensors[ours].float(), expected)
    assert checkpoint.note == f"unpacked from GGUF {kind}, kept in float32"
    assert stored_dtype(checkpoint) is torch.float32
    assert checkpoint.bytes_on_disk == path.stat().st_size


def test_any_other_name_is_found_as_a_teacher_is(random_model, tmp_path):
    assert resolve_outside("tiny", cache=tmp_path) == resolve("tiny", cache=tmp_path)
    folder = resolve_outside(str(random_model.path), cache=tmp_path)
    assert folder.digest == random_model.digest and folder.base is None
    with pytest.raises(HarnessError, match="no GGUF file at"):
        resolve_outside(str(tmp_path / "none.gguf"), cache=tmp_path)
