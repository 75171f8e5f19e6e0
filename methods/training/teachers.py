"""Where teachers' distributions come from: computed live, or by a model with other tokens."""

import time
from typing import Any, Protocol

import torch
from torch import Tensor

from harness.machine.memory import synchronise
from harness.models.language_model import LanguageModel
from methods.training.positions import Distribution
from methods.training.rows import Batch, Row, batch_of


class Source(Protocol):
    """Where one teacher's distributions come from: the teacher itself, or what was kept of it."""

    def read(self, batch: Batch, vocabulary: int | None) -> Distribution:
        """Return what the teacher thinks at the batch's trained positions."""
        ...


class Head:
    """Runs a causal language model and makes logits at the wanted positions only: the head is handed no others.

    Everything behind the head (scales, caps) is the model's own. Logits of a whole batch would be the largest tensor of the step.
    """

    def __init__(self, model: Any) -> None:
        self._wanted: Tensor | None = None
        self.model = model
        head = model.get_output_embeddings()
        self._hook = head.register_forward_pre_hook(self._select) if head is not None else None

    def _select(self, head: Any, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._wanted is None or not given or given[0].ndim != 3 or given[0].shape[1] != self._wanted.shape[1] + 1:
            return None
        return (given[0][:, :-1][self._wanted][None], *given[1:])

    def __call__(self, batch: Batch, *, through: Any = None) -> Tensor:
        """Return logits (N, V); `through` is the wrapped model, where training wraps it."""
        self._wanted = batch.mask
        try:
            logits = (through or self.model)(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False).logits
        finally:
            self._wanted = None
        count = int(batch.mask.sum())
        found: Tensor = logits[0] if logits.shape[:2] == (1, count) else logits[:, :-1][batch.mask]
        return found

    def close(self) -> None:
        """Leave the model as it was."""
        if self._hook is not None:
            self._hook.remove()


class Live:
    """A teacher in memory, run beside the student; counts the seconds spent in it and the tokens that it read."""

    def __init__(self, opened: LanguageModel) -> None:
        self.opened = opened
        self.model = opened.model.requires_grad_(False).eval()
        self.head = Head(self.model)
        self.seconds = 0.0
        self.tokens = 0

    def read(self, batch: Batch, vocabulary: int | None) -> Distribution:
        """Run the teacher on the student's own batch."""
        return Distribution(self._run(batch)[:, :vocabulary])

    def _run(self, batch: Batch) -> Tensor:
        """Return the teacher's logits; the seconds are its own: what a GPU was asked before is waited for."""
        synchronise(self.opened.device)
        began = time.perf_counter()
        with torch.no_grad():
            logits = self.head(batch)
        synchronise(self.opened.device)
        self.seconds += time.perf_counter() - began
        self.tokens += sum(len(row.ids) for row in batch.rows)
        return logits


class OtherTokens(Live):
    """A live teacher with a tokenizer of its own, run on its own tokens of the same text."""

    def read(self, batch: Batch, vocabulary: int | None) -> Distribution:
        """Return its logits (M, W) at the aligned positions, in the rows' order."""
        others = []
        wanted: list[int] = []
        start = 0
        for row in batch.rows:
            assert row.other is not None
            others.append(Row(row.other.ids, row.other.trained_from))
            wanted += [start + theirs for _, theirs in row.other.pairs]
            start += others[-1].trained
        logits = self._run(batch_of(others, self.opened.pad_id, batch.ids.device))
        return Distribution(logits[torch.tensor(wanted, device=logits.device)])
