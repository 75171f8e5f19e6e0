"""Tokenised training rows: how text becomes rows, how they are padded, and in which order."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.errors import CellFailed
from harness.models.encoding import encode_pair

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
    """Rows padded on the right, as tensors (B, T)."""

    rows: tuple[TokenRow, ...]
    ids: Tensor
    attention: Tensor  # 1 where a row has a token, 0 where it is padded
    trained: Tensor  # true at the tokens that are trained

    @property
    def mask(self) -> Tensor:
        """Which logits are trained, (B, T-1): those at position t - 1 predict token t."""
        return self.trained[:, 1:]

    @property
    def labels_N(self) -> Tensor:
        """The trained tokens, row by row."""
        return self.ids[:, 1:][self.mask]

    def to(self, device: Any) -> "Batch":
        """Return the batch on a device."""
        return Batch(
            self.rows, self.ids.to(device), self.attention.to(device), self.trained.to(device)
        )


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


def collate(rows: Sequence[TokenRow], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pad on the right; return ids, attention mask and trained-token mask, all (B, T)."""
    width = max(len(row.ids) for row in rows)
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
    return Batch(tuple(rows), *collate(rows, pad_id)).to(device)


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
