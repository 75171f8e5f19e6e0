"""A GGUF file that llama.cpp holds, with the call of a transformers model: one text at a time.

Timing and opening call it as they call any other model.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from harness.errors import CellFailed
from harness.models.llama_cpp import LlamaCppContext


class _ReadTokens:
    """What stands for the cache in an output: the tokens read, and bytes that llama.cpp holds."""

    def __init__(self, ids: list[int], held_bytes: int) -> None:
        self.ids = ids
        # no memory: its size is what counts
        self.held = torch.empty(held_bytes, dtype=torch.uint8, device="meta")


class ServedModel(torch.nn.Module):  # type: ignore[misc]
    """Reads texts through llama.cpp and returns the logits behind their last token."""

    # builds the same architecture in transformers, of a configuration
    plain_class: ClassVar[Callable[[Any], Any]] = AutoModelForCausalLM.from_config

    def __init__(self, path: Path, description: Path, *, threads: int) -> None:
        """Open a file; `description` is the folder with its configuration."""
        super().__init__()
        self.config = AutoConfig.from_pretrained(description)
        self.generation_config = GenerationConfig.from_pretrained(description)
        self.context = LlamaCppContext(path, threads=threads)
        self.kernel_bytes = path.stat().st_size  # of packed weights, which stay as they are

    @property
    def dtype(self) -> torch.dtype:
        """The type of its logits."""
        return torch.float32

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: _ReadTokens | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 1,
    ) -> CausalLMOutputWithPast:
        """Read (1, T) token ids behind those that were read; return logits (1, 1, V)."""
        if len(input_ids) != 1 or logits_to_keep != 1:
            raise CellFailed("llama.cpp is asked for one text, and the end of it, at a time")
        read_ids = past_key_values.ids if past_key_values else []
        ids = [*read_ids, *input_ids[0].tolist()]
        logits = torch.from_numpy(self.context.logits(ids, 1, keep=len(read_ids)))[None]
        cache = _ReadTokens(ids, self.context.state_bytes) if use_cache else None
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)
