"""GGUF files as llama.cpp serves them: the real library where it is installed, else a stand-in."""

import math

import numpy as np
import pytest
import torch
from gguf_files import write_llama
from llama_cpp_stand_in import install

from harness.errors import CellFailed, HarnessError, Skipped
from harness.models import formats
from harness.models.language_model import open_model
from harness.models.llama_cpp import LlamaCppContext, is_served
from harness.models.outside import resolve_outside
from harness.models.resolve import EMBEDDED

IDS = [5, 17, 300, 41, 8, 99, 7, 7, 250]


@pytest.fixture
def gguf_file(tmp_path):
    pytest.importorskip("gguf", reason="opening GGUF files needs the gguf package")
    write_llama(tmp_path / "small.gguf", {"": "Q8_0"}, EMBEDDED / "tiny")
    return tmp_path / "small.gguf"


def test_a_served_file_is_described_and_weighed_as_it_is(gguf_file, tmp_path):
    served = resolve_outside(f"llama-cpp:{gguf_file}", cache=tmp_path / "cache")
    unpacked = resolve_outside(str(gguf_file), cache=tmp_path / "cache")
    assert is_served(served) and not is_served(unpacked)
    assert served.path == gguf_file and served.bytes_on_disk == gguf_file.stat().st_size
    assert served.note == "GGUF Q8_0 as llama.cpp serves it"
    assert served.digest != unpacked.digest
    assert not [*served.model_folder.glob("*.safetensors")]  # configuration and tokenizer alone
    again = resolve_outside(f"llama-cpp:{gguf_file}", cache=tmp_path / "cache")
    assert again == served


@pytest.mark.parametrize("name", ["llama-cpp:none.gguf", "llama-cpp:tiny", "llama-cpp:"])
def test_what_llama_cpp_cannot_open_is_refused_before_anything_runs(name, tmp_path):
    with pytest.raises(HarnessError, match=r"no such GGUF file; give llama-cpp:FILE\.gguf"):
        resolve_outside(name, cache=tmp_path)


def test_without_the_library_the_row_is_skipped(gguf_file, tmp_path, monkeypatch):
    served = resolve_outside(f"llama-cpp:{gguf_file}", cache=tmp_path / "cache")
    monkeypatch.setattr(formats, "find_spec", lambda module: None)
    with pytest.raises(Skipped, match="type: pip install llama-cpp-python"):
        open_model(served)


def test_texts_in_parts_have_the_logits_of_the_whole(embedded, monkeypatch):
    place = install(monkeypatch, embedded)
    context = LlamaCppContext(EMBEDDED / "tiny", threads=1)
    whole = context.logits(IDS, 4)
    assert whole.shape == (4, embedded.vocabulary)
    context.logits(IDS[:6], 1)
    assert np.allclose(context.logits(IDS, 3, keep=6), whole[1:], atol=1e-4)
    # other tokens than those that were read are read again
    assert np.allclose(
        context.logits([9, *IDS[1:]], 1, keep=5)[0], context.logits([9, *IDS[1:]], 1)
    )
    assert place.tokens == [9, *IDS[1:]]
    with pytest.raises(CellFailed, match="the model reads"):
        context.logits([1] * (embedded.context + 1), 1)


# --- the library itself


@pytest.mark.parametrize(("kind", "most_nats"), [("F32", 1e-4), ("Q8_0", 1e-3), ("Q4_K", 1e-2)])
def test_llama_cpp_has_the_distributions_of_the_unpacked_numbers(kind, most_nats, tmp_path):
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    pytest.importorskip("gguf", reason="opening GGUF files needs the gguf package")
    path = tmp_path / "small.gguf"
    write_llama(path, {"": kind}, EMBEDDED / "tiny")
    unpacked = open_model(resolve_outside(str(path), cache=tmp_path / "cache"))
    served = open_model(resolve_outside(f"llama-cpp:{path}", cache=tmp_path / "cache"))
    with torch.no_grad():
        expected = torch.log_softmax(unpacked.model(torch.tensor([IDS])).logits[0], -1)
    ours = torch.log_softmax(torch.from_numpy(served.model.context.logits(IDS, len(IDS))), -1)
    divergence = (expected.exp() * (expected - ours)).sum(-1)
    assert float(divergence.max()) < most_nats
    assert float((ours.exp() * ours).sum(-1).mean()) > -math.log(ours.shape[1])
    parts = served.model.context.logits(IDS, 2, keep=7)
    assert np.allclose(parts, served.model.context.logits(IDS, 2), atol=2e-2)
