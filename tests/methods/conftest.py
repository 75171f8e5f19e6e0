"""Teachers and students that tests of methods share; nobody writes to them."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from distilling import TASKS

from harness.data.source import LocalOrHubData
from harness.models.resolve import resolve


@pytest.fixture(scope="session")
def specialist():
    return resolve("tiny-math", cache=Path("unused"))


@pytest.fixture(scope="session")
def short_sighted(tiny, tmp_path_factory):
    """The embedded teacher with a context of 70 tokens."""
    import shutil

    from harness.models.checkpoint import describe

    folder = tmp_path_factory.mktemp("short") / "short"
    shutil.copytree(tiny.path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 70}))
    return describe(folder, name="short")


@pytest.fixture(scope="session")
def other_tokenizer(tmp_path_factory):
    """Return a byte-level tokenizer of another vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    texts = [
        example.completion
        for example in islice(TASKS["gsm8k-mini"].examples("train", LocalOrHubData()), 50)
    ]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        pad_token="<end>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def foreign(tmp_path_factory, other_tokenizer):
    """Return a saved model of another vocabulary."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from harness.models.checkpoint import describe

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("foreign") / "other"
    config = LlamaConfig(
        vocab_size=len(other_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)
    other_tokenizer.save_pretrained(folder)
    return describe(folder, name="other")
