"""Tokenised training rows: how text becomes rows, how they are padded, and in which order."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from harness.errors import CellFailed
from harness.models.encoding import encode_pair
from methods.training.layouts import PackedRows, PaddedRows, RowShape, rounded_width
from methods.training.transfers import to_device

STEPS_PER_WINDOW = 16  # rows are sorted by length inside windows of so many optimiser steps


@dataclass(frozen=True)
class TokenRow:
    """One tokenised training item; tokens from `trained_from` on are trained."""

    ids: tuple[int, ...]
    trained_from: int
    # what kind of row it is, where a method has several: its task, or its half of a pair
    tag: int = 0
    # the same text in the tokens of a teacher that has another tokenizer
    teacher_tokens: "TeacherTokens | None" = None

    @property
    def trained_tokens(self) -> int:
        """Number of trained tokens."""
        return len(self.ids) - self.trained_from


@dataclass(frozen=True)
class TeacherTokens:
    """A row's text in the teacher's tokens, and which trained positions of the two align."""

    ids: tuple[int, ...]
    trained_from: int
    # (student, teacher) positions behind the same text, counted from the first trained token
    pairs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Batch:
    """Rows that are read together; tensors are made of them when they are asked for.

    Legend: B rows, T tokens of the widest, N trained tokens of all rows, row by row.
    """

    rows: tuple[TokenRow, ...]
    pad_id: int
    device: Any = "cpu"

    @cached_property
    def shapes(self) -> tuple[RowShape, ...]:
        """The rows' lengths."""
        return tuple(RowShape(len(row.ids), row.trained_from) for row in self.rows)

    @cached_property
    def _padded(self) -> dict[int, PaddedRows]:
        return {}

    def padded(self, *, most: int | None = None) -> PaddedRows:
        """Return the rows padded on the right; on a GPU to a multiple of 64, at most `most`."""
        longest = max(shape.length for shape in self.shapes)
        width = rounded_width(longest, self.device, most=most)
        if width not in self._padded:
            ids, attention, _ = collate(self.rows, self.pad_id, width)
            self._padded[width] = PaddedRows(
                to_device(ids, self.device), to_device(attention, self.device), self.shapes
            )
        return self._padded[width]

    @cached_property
    def packed(self) -> PackedRows:
        """The rows one after another."""
        tokens = [token for row in self.rows for token in row.ids]
        spare = rounded_width(len(tokens), self.device) - len(tokens)
        ids = torch.tensor([tokens + [self.pad_id] * spare], dtype=torch.long)
        return PackedRows(to_device(ids, self.device), self.shapes)

    @property
    def ids(self) -> Tensor:
        """The rows' tokens, padded, (B, T)."""
        return self.padded().ids

    @property
    def attention(self) -> Tensor:
        """1 where a padded row has a token, 0 where it is padded, (B, T)."""
        return self.padded().attention

    @cached_property
    def trained(self) -> Tensor:
        """True at the tokens that are trained, (B, T)."""
        return to_device(collate(self.rows, self.pad_id, self.ids.shape[1])[2], self.device)

    @property
    def mask(self) -> Tensor:
        """Which logits are trained, (B, T-1): those at position t - 1 predict token t."""
        return self.trained[:, 1:]

    @property
    def trained_tokens(self) -> int:
        """N."""
        return sum(row.trained_tokens for row in self.rows)

    @cached_property
    def labels_N(self) -> Tensor:
        """The trained tokens, row by row."""
        labels = [token for row in self.rows for token in row.ids[row.trained_from :]]
        return to_device(torch.tensor(labels, dtype=torch.long), self.device)

    @cached_property
    def beyond_first_N(self) -> Tensor:
        """False where a trained token is predicted at the first position of its row."""
        beyond = [
            position > 0
            for row in self.rows
            for position in range(row.trained_from - 1, len(row.ids) - 1)
        ]
        return to_device(torch.tensor(beyond, dtype=torch.bool), self.device)

    def to(self, device: Any) -> "Batch":
        """Return the batch on a device."""
        return Batch(self.rows, self.pad_id, device)


def encode(
    tokenizer: Any, pairs: Iterable[tuple[Any, ...]], *, longest: int
) -> tuple[list[TokenRow], int]:
    """Tokenise (prompt, completion[, tag]) with EOS appended; also count what is too long.

    Prompt and completion are encoded as one text: the scorer reads such a text, and the model goes
    on from it. Rows of more than `longest` tokens are left out; their number is the second value.
    """
    eos_id = required_eos_id(tokenizer)
    rows: list[TokenRow] = []
    too_long = 0
    for prompt, completion, *tag in pairs:
        prompt_ids, completion_ids = encode_pair(tokenizer, prompt, completion)
        if len(prompt_ids) + len(completion_ids) + 1 > longest:
            too_long += 1
            continue
        # nothing stands before a text's first token, so nothing predicts it
        trained_from = max(1, len(prompt_ids))
        rows.append(TokenRow((*prompt_ids, *completion_ids, eos_id), trained_from, *tag))
    return rows, too_long


def required_eos_id(tokenizer: Any) -> int:
    """Return the token that ends a text; raise `CellFailed` where the tokenizer has none.

    A model must learn to write it after its answer.
    """
    if tokenizer.eos_token_id is None:
        raise CellFailed(
            "the student's tokenizer has no EOS, so no answer could end; set eos_token in its "
            "tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def collate(
    rows: Sequence[TokenRow], pad_id: int, width: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pad on the right; return ids, attention mask and trained-token mask, all (B, T).

    T is `width`, else the length of the longest row.
    """
    width = width or max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    attention = torch.zeros((len(rows), width), dtype=torch.long)
    trained = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        attention[index, : len(row.ids)] = 1
        trained[index, row.trained_from : len(row.ids)] = True
    return ids, attention, trained


def batch_of(rows: Sequence[TokenRow], pad_id: int, device: Any = "cpu") -> Batch:
    """Return rows as one batch on a device."""
    return Batch(tuple(rows), pad_id, device)


def shuffled_steps(
    rows: Sequence[TokenRow], *, batch_size: int, seed: int
) -> Iterator[tuple[int, list[TokenRow]]]:
    """Yield (epoch, rows of one optimiser step) without end.

    Rows are shuffled each epoch and sorted by length inside windows of 16 steps, which halves the
    padding.
    """
    epoch = 0
    while True:
        generator = random.Random(f"{seed}/{epoch}")
        shuffled = list(rows)
        generator.shuffle(shuffled)
        steps: list[list[TokenRow]] = []
        window_rows = batch_size * STEPS_PER_WINDOW
        for start in range(0, len(shuffled), window_rows):
            window = sorted(shuffled[start : start + window_rows], key=lambda row: len(row.ids))
            steps += [
                window[first : first + batch_size] for first in range(0, len(window), batch_size)
            ]
        generator.shuffle(steps)
        for step in steps:
            yield epoch, step
        epoch += 1


def rows_within_budget(rows: Sequence[TokenRow], tokens_left: int) -> list[TokenRow]:
    """Return the leading rows whose tokens fit into what is left of a budget."""
    kept: list[TokenRow] = []
    for row in rows:
        if tokens_left < len(row.ids):
            break
        tokens_left -= len(row.ids)
        kept.append(row)
    return kept
