"""A GGUF file as llama.cpp serves it: packed weights, its own kernels, one sequence at a time.

Needs llama-cpp-python. No torch at import.

Shapes: N positions, V vocabulary.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contract import Checkpoint
from harness.errors import CellFailed, HarnessError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PREFIX = "llama-cpp:"  # before a file that llama.cpp opens, in place of transformers
_BATCH = 512  # tokens that are read at once
_LENGTH_STEP = 1024  # the context grows in such steps, up to the model's own


def is_served(checkpoint: Checkpoint) -> bool:
    """Tell whether a checkpoint is a GGUF file that llama.cpp opens."""
    return checkpoint.path.suffix == ".gguf"


def version() -> str:
    """Return the version of llama-cpp-python."""
    import llama_cpp

    return str(llama_cpp.__version__)


class LlamaCppContext:
    """An open GGUF file, and llama.cpp's cache of the one text that was read last."""

    def __init__(self, path: Path, *, threads: int) -> None:
        """Open a file; it is computed by so many threads."""
        import llama_cpp

        self.threads = threads
        self._lib = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise HarnessError(
                f"llama.cpp cannot open {path.name}: it does not know this kind of model or file; "
                "upgrade llama-cpp-python, or give the file without llama-cpp:"
            )
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary = int(llama_cpp.llama_vocab_n_tokens(vocabulary))
        # the most tokens that the model was built for
        self.longest = int(llama_cpp.llama_model_n_ctx_train(self._model))
        self._context: Any = None
        self._length = 0
        self._read: list[int] = []  # tokens in the cache

    def logits(self, ids: Sequence[int], count: int, *, keep: int = 0) -> "NDArray[np.float32]":
        """Return the logits (N, V) behind each of the last `count` tokens of a text.

        Its first `keep` tokens were read before, as the beginning of the last text; the others are
        read now. So the numbers follow from the two parts alone, whatever was read before them.
        """
        import numpy as np

        if self._grow_to(len(ids)) or self._read[:keep] != list(ids[:keep]):
            keep = 0
        memory = self._lib.llama_get_memory(self._context)
        if not self._lib.llama_memory_seq_rm(memory, 0, keep, -1):
            self._lib.llama_memory_clear(memory, True)  # a state that cannot be cut, as Mamba's
            keep = 0
        self._read = list(ids[:keep])
        parts = range(keep, len(ids), _BATCH)
        rows = [
            row
            for start in parts
            for row in self._decode(ids[start : start + _BATCH], start, len(ids) - count)
        ]
        return np.stack(rows)

    @property
    def state_bytes(self) -> int:
        """The bytes of what is kept of the text that was read: its keys and values."""
        return int(self._lib.llama_state_seq_get_size(self._context, 0))

    def _grow_to(self, length: int) -> bool:
        """Make room for a text; tell whether what was read is lost with the smaller context."""
        if self._context is not None and length <= self._length:
            return False
        if length > self.longest:
            raise CellFailed(f"a text of {length:,} tokens; the model reads {self.longest:,}")
        if self._context is not None:
            self._lib.llama_free(self._context)
        self._length = min(self.longest, -(-length // _LENGTH_STEP) * _LENGTH_STEP)
        settings = self._lib.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = self._length, _BATCH, _BATCH
        settings.n_seq_max = 1
        settings.n_threads = settings.n_threads_batch = self.threads
        self._context = self._lib.llama_init_from_model(self._model, settings)
        self._read = []
        if not self._context:
            raise CellFailed(
                f"llama.cpp has no room for {self._length:,} tokens; give a machine with more "
                "memory"
            )
        return True

    def _decode(
        self, ids: Sequence[int], start: int, wanted_from: int
    ) -> "list[NDArray[np.float32]]":
        """Read tokens that stand from `start` on; return the logits of those from `wanted_from`."""
        import numpy as np

        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for index, token in enumerate(ids):
                batch.token[index] = token
                batch.pos[index] = start + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = start + index >= wanted_from
            if code := self._lib.llama_decode(self._context, batch):
                self._read = []
                raise CellFailed(f"llama.cpp could not read a text (code {code})")
        finally:
            self._lib.llama_batch_free(batch)
        self._read += ids
        positions = range(max(0, wanted_from - start), len(ids))
        return [
            np.ctypeslib.as_array(
                self._lib.llama_get_logits_ith(self._context, index), (self.vocabulary,)
            ).copy()
            for index in positions
        ]

    def close(self) -> None:
        """Give the memory back."""
        if self._context is not None:
            self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)
        self._context, self._model = None, None
