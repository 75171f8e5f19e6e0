"""Teachers in memory: their logits at the trained positions, whatever their tokenizer."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from harness.machine.memory import synchronise
from harness.models.language_model import LanguageModel
from harness.models.logit_tail import LogitTail, logit_tail_of
from harness.models.position_head import PositionHead
from harness.renames.modules import by_old_name
from methods.training.positions import Distribution
from methods.training.row_attention import layout_of, padding_of
from methods.training.rows import Batch, TokenRow, batch_of
from methods.training.transfers import to_device


class TeacherSource(Protocol):
    """Where one teacher's distributions come from: the teacher itself, or a cache of them."""

    def read(self, batch: Batch, vocabulary: int | None) -> Distribution:
        """Return the teacher's distributions at the batch's trained positions.

        `vocabulary` is the number of leading logit columns to return; None for all.
        """
        ...

    @property
    def reads_in_parts(self) -> bool:
        """Tell whether `read_parts` can be used."""
        ...

    def read_parts(self, batch: Batch, vocabulary: int | None) -> Distribution:
        """Return the same as `read` without holding all logits at once."""
        ...


class TrainedPositionLogits(PositionHead):
    """Computes a model's logits at the trained positions of a batch, and no others."""

    def __call__(self, batch: Batch, *, through: Any = None) -> Tensor:
        """Return logits (N, V); `through` is the wrapped model, where training wraps it."""
        layout = layout_of(self.model, batch)
        with padding_of(layout):
            return self.logits_of(layout.ids, layout.trained_N, layout.inputs, through=through)

    def hidden(self, batch: Batch, *, through: Any = None) -> Tensor:
        """Return what goes into the head at the trained positions, (N, H)."""
        layout = layout_of(self.model, batch)
        with padding_of(layout):
            return self.hidden_of(layout.ids, layout.trained_N, layout.inputs, through=through)


class LiveTeacher:
    """A teacher in memory, run beside the student; counts its seconds and the tokens it reads."""

    def __init__(self, language_model: LanguageModel) -> None:
        self.language_model = language_model
        self.model = language_model.model.requires_grad_(False).eval()
        self.head = TrainedPositionLogits(self.model)
        self.tokens = 0
        self._stopwatch = _Stopwatch(language_model.device)

    @property
    def seconds(self) -> float:
        """The seconds that its forward passes took."""
        return self._stopwatch.seconds()

    def read(self, batch: Batch, vocabulary: int | None) -> Distribution:
        """Run the teacher on the student's own batch."""
        return Distribution(self._logits(batch)[:, :vocabulary])

    @property
    def reads_in_parts(self) -> bool:
        """Tell whether what the model does behind its head is known."""
        return self._tail is not None

    def read_parts(self, batch: Batch, vocabulary: int | None) -> Distribution:
        """Run the teacher's body on the batch; its head makes the logits of a part on request."""
        tail, head = self._tail, self.model.get_output_embeddings()
        assert tail is not None
        hidden_NH = self._timed(lambda: self.head.hidden(batch))
        self._count(batch)

        def logits_of(part: slice) -> Tensor:
            return self._timed(lambda: tail(head(hidden_NH[part])))[:, :vocabulary]

        return Distribution(None, logits_of=logits_of)

    @cached_property
    def _tail(self) -> LogitTail | None:
        return logit_tail_of(self.model)

    def _logits(self, batch: Batch) -> Tensor:
        """Return the teacher's logits."""
        self._count(batch)
        return self._timed(lambda: self.head(batch))

    def _count(self, batch: Batch) -> None:
        self.tokens += sum(len(row.ids) for row in batch.rows)

    def _timed(self, forward: Callable[[], Tensor]) -> Tensor:
        """Run a forward pass without gradient, and count its time."""
        with self._stopwatch.running(), torch.no_grad():
            return forward()


class CrossTokenizerTeacher(LiveTeacher):
    """A live teacher with another tokenizer, run on its own tokens of the same text."""

    @property
    def reads_in_parts(self) -> bool:
        """Tell that it does not: its positions are not the student's, so parts do not match."""
        return False

    def read(self, batch: Batch, vocabulary: int | None) -> Distribution:
        """Return the teacher's logits (M, W) at the aligned positions, in the rows' order."""
        teacher_rows = []
        aligned: list[int] = []  # indices into the teacher's trained positions of all rows
        start = 0
        for row in batch.rows:
            tokens = row.teacher_tokens
            assert tokens is not None
            teacher_rows.append(TokenRow(tokens.ids, tokens.trained_from))
            aligned += [start + teacher_position for _, teacher_position in tokens.pairs]
            start += teacher_rows[-1].trained_tokens
        pad_id = self.language_model.pad_id
        logits = self._logits(batch_of(teacher_rows, pad_id, batch.device))
        return Distribution(logits[to_device(torch.tensor(aligned), logits.device)])


class _Stopwatch:
    """Counts the seconds that a device works on something.

    On a GPU marks in its queue are compared, which nobody waits for while the queue is full. On
    other devices what was queued before is waited for first, so that it is not counted.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._seconds = 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what is done inside."""
        if self.device.startswith("cuda"):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            yield
            ended.record()
            self._marks.append((began, ended))
            return
        synchronise(self.device)
        start = time.perf_counter()
        yield
        synchronise(self.device)
        self._seconds += time.perf_counter() - start

    def seconds(self) -> float:
        """Return the seconds so far; a GPU is waited for where it has not come so far."""
        for began, ended in self._marks:
            ended.synchronize()
            self._seconds += began.elapsed_time(ended) / 1000
        self._marks.clear()
        return self._seconds


if not TYPE_CHECKING:  # a checker refuses old names; programs that use them go on working
    __getattr__ = by_old_name(__name__)
