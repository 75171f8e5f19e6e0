"""Shared fixtures: tiny random models, and sockets that refuse; which tests are slow, and which
files go first.
"""

import os
import socket
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

HERE = Path(__file__).parent
# Fixtures that run or time whole rows, make students, or pack what a bare machine lacks: tests that
# ask for them are slow.
EXPENSIVE = {
    "finished",
    "desk",
    "contracts",
    "students",
    "compress",
    "measured",
    "teacher_job",
    "bare",
}
# The files that take longest, the longest first: two workers end together when no long file is left
# to the end.
LONGEST = (
    "gpu/test_gpu.py",
    "pipelines/test_run.py",
    "contracts/test_methods.py",
    "contracts/test_readme.py",
    "pipelines/test_ci.py",
    "measuring/test_measure.py",
    "planning/test_chain.py",
    "methods/test_pruning.py",
    "pipelines/test_kills.py",
    "methods/training/test_teachers.py",
    "contracts/test_checks.py",
)


def pytest_collection_modifyitems(items):
    """Mark what an expensive fixture makes slow, and put the longest files first (with
    `--no-loadscope-reorder`, as tox says it).
    """
    for item in items:
        if EXPENSIVE & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    places = {HERE / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


@pytest.fixture
def no_network(monkeypatch):
    """Block connections and name resolution; return the list of attempts."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("the network is blocked in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return attempts


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """Return a saved model of 2 blocks with random weights and the embedded tokenizer."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    from harness.models.checkpoint import describe
    from harness.models.resolve import EMBEDDED

    folder = tmp_path_factory.mktemp("models") / "random"
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tiny")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return describe(folder, name="random")


@pytest.fixture(scope="session")
def embedded():
    """Return the embedded teacher `tiny`, opened."""
    from pathlib import Path

    from harness.models.language_model import open_model
    from harness.models.resolve import resolve

    return open_model(resolve("tiny", cache=Path("unused")))


@pytest.fixture(scope="session")
def small():
    """Return a maker of random models of two blocks with grouped heads and the embedded tokenizer,
    by transformers' class.
    """

    def make(kind, **changes):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        from harness.models.checkpoint import describe
        from harness.models.language_model import LanguageModel
        from harness.models.resolve import EMBEDDED

        torch.manual_seed(0)
        sizes = {
            "vocab_size": 1024,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
        }
        if kind != "GPTNeoX":
            sizes |= {"num_key_value_heads": 2, "head_dim": 8}
        config = AutoConfig.for_model(
            {"GPTNeoX": "gpt_neox"}.get(kind, kind.lower()), **{**sizes, **changes}
        )
        model = AutoModelForCausalLM.from_config(config).eval()
        folder = EMBEDDED / "tiny"
        return LanguageModel(
            model, AutoTokenizer.from_pretrained(folder), "cpu", describe(folder, name=kind)
        )

    return make


@pytest.fixture(scope="session")
def tiny():
    """Return the embedded teacher's checkpoint."""
    from pathlib import Path

    from harness.models.resolve import resolve

    return resolve("tiny", cache=Path("unused"))


@pytest.fixture
def folder(tmp_path):
    """Return a data folder in the published layout, without a manifest; every item is made up."""
    from task_data import write_all

    write_all(tmp_path)
    return tmp_path


@pytest.fixture
def source(folder):
    """Return the made-up data folder as a source of real tasks' items."""
    from harness.data.source import LocalOrHubData

    return LocalOrHubData(folder=folder)


@pytest.fixture
def compress(tiny, tmp_path):
    """Return a function that makes a student of `tiny` by a method and returns it with what the
    method told.
    """
    import json
    from itertools import count

    from distilling import Quick

    import methods
    import suites
    from harness.contract import Budget, Job
    from harness.data.source import LocalOrHubData

    numbers = count()

    def make(
        name,
        settings=None,
        *,
        base=tiny,
        tasks=("gsm8k-mini",),
        rows=60,
        seed=1,
        tokens=3_000,
        source=None,
        **more,
    ):
        folder = tmp_path / f"made-{next(numbers)}"
        folder.mkdir()
        job = Job(
            teachers=(tiny,),
            student=str(base.path),
            student_base=base,
            tasks={task: suites.load(task) for task in tasks},
            source=source or LocalOrHubData(),
            budget=Budget(seen_tokens=tokens, rows=rows),
            seed=seed,
            workdir=folder,
            cache=tmp_path / "cache",
            **more,
        )
        made = Quick("method", methods.METHODS).build(name, settings or {}).compress(job)
        notes = json.loads((folder / "cost.json").read_text())["notes"]
        return made, notes.get(name, notes)

    return make
