"""A teacher four times its student's size, with random weights and the embedded tokenizer."""

from pathlib import Path
from typing import Any

from harness.contract import Checkpoint
from harness.models.checkpoint import describe
from harness.models.resolve import EMBEDDED

SHAPES = {
    "student": {"hidden_size": 256, "intermediate_size": 768},
    "teacher": {"hidden_size": 512, "intermediate_size": 1536},
}


def random_pair(
    folder: Path, *, vocabulary: int = 1024, layers: int = 6
) -> tuple[Checkpoint, Checkpoint, float]:
    """Save both models; return teacher, student, and the ratio of their numbers of parameters."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tiny")
    checkpoints: dict[str, Any] = {}
    sizes = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        torch.manual_seed(index)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **shape,
            )
        )
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        model.generation_config = GenerationConfig(do_sample=False, **ends)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        checkpoints[name] = describe(folder / name, name=name)
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    return (
        checkpoints["teacher"],
        checkpoints["student"],
        round(sizes["teacher"] / sizes["student"], 2),
    )
