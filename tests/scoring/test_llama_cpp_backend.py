"""Scoring through llama.cpp: what requests have in common is read once, and no order matters."""

from dataclasses import replace

import pytest
from llama_cpp_stand_in import install

from harness.models.resolve import EMBEDDED
from harness.models.served_model import ServedModel
from harness.scoring.backend import LikelihoodRequest
from harness.scoring.llama_cpp_backend import LlamaCppBackend

START = [5, 17, 300, 41, 8]


@pytest.fixture
def backend(embedded, monkeypatch):
    install(monkeypatch, embedded)
    model = ServedModel(EMBEDDED / "tiny" / "model.safetensors", EMBEDDED / "tiny", threads=1)
    return LlamaCppBackend(replace(embedded, model=model))


def test_a_common_beginning_is_read_once(backend, monkeypatch):
    read = []
    context = backend.opened.model.context
    decode = type(context)._decode
    monkeypatch.setattr(
        type(context),
        "_decode",
        lambda self, ids, *rest: (read.extend(ids), decode(self, ids, *rest))[1],
    )
    rows = [LikelihoodRequest([*START, letter], 1) for letter in (7, 9, 11, 12)]
    backend.score(rows, known={})
    assert read == START
    read.clear()
    backend.score([LikelihoodRequest([*START, 7, 9, 11], 3)], known={})
    assert read == [7, 9]  # the beginning is read already, and the last token predicts nothing


def test_its_path_names_the_library_and_its_version(backend):
    assert backend.path == "llama-cpp/0.0"
