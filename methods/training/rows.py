"""Tokenised training rows: how text becomes them, how they are padded, and in which order they are
seen.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.errors import CellFailed
from harness.models.encoding import encode_pair


@dataclass(frozen=True)
class TokenRow:
    """One tokenised training item; tokens from `trained_from` on are trained."""

    ids: tuple[int, ...]
    trained_from: int
    # what kind of row it is, where a method has several: its task, or its half of a pair
    tag: int = 0
    other: "TeacherTokens | None" = (
        None  # the same text in a teacher's tokens, where those are others
    )

    @property
    def trained(self) -> int:
        """Number of trained tokens."""
        return len(self.ids) - self.trained_from


@dataclass(frozen=True)
class TeacherTokens:
    """A row's text in another tokenizer, and which trained positions of the two stand behind the
    same text.
    """

    ids: tuple[int, ...]
    trained_from: int
    pairs: tuple[tuple[int, int], ...]  # (ours, theirs), each counted from the first trained token


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right: ids, attention and trained-token masks (B, T), and which logits are
    trained (B, T-1).
    """

    rows: tuple[TokenRow, ...]
    ids: Tensor
    attention: Tensor
    trained: Tensor

    @property
    def mask(self) -> Tensor:
        """The causal shift: logits at t - 1 stand against token t."""
        return self.trained[:, 1:]

    def to(self, device: Any) -> "Batch":
        """Return the batch on a device."""
        return Batch(
            self.rows, self.ids.to(device), self.attention.to(device), self.trained.to(device)
        )


def encode(
    tokenizer: Any, pairs: Iterable[tuple[Any, ...]], *, longest: int
) -> tuple[list[TokenRow], int]:
    """Tokenise (prompt, completion[, tag]), EOS appended; return rows and the number left out as
    too long.

    Prompt and completion are encoded as one text, which is what the scorer reads and what the model
    goes on from.
    """
    end = required_eos_id(tokenizer)
    rows: list[TokenRow] = []
    too_long = 0
    for prompt, completion, *tag in pairs:
        before, after = encode_pair(tokenizer, prompt, completion)
        if len(before) + len(after) + 1 > longest:
            too_long += 1
            continue
        rows.append(TokenRow((*before, *after, end), len(before), *tag))
    return rows, too_long


def required_eos_id(tokenizer: Any) -> int:
    """Return the token that ends a text: what a model must learn to write behind its answer."""
    if tokenizer.eos_token_id is None:
        raise CellFailed(
            "the student's tokenizer has no EOS, so no answer could end; set eos_token in its "
            "tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def collate(rows: Sequence[TokenRow], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pad on the right; return ids, attention mask and trained-token mask, all (B, T)."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    attention = torch.zeros((len(rows), width), dtype=torch.long)
    trained = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        attention[index, : len(row.ids)] = 1
        trained[index, row.trained_from : len(row.ids)] = True
    return ids, attention, trained


def batch_of(rows: Sequence[TokenRow], pad: int, device: Any = "cpu") -> Batch:
    """Return rows as one batch on a device."""
    return Batch(tuple(rows), *collate(rows, pad)).to(device)


def shuffled_steps(
    rows: Sequence[TokenRow], *, batch_size: int, seed: int
) -> Iterator[tuple[int, list[TokenRow]]]:
    """Yield (epoch, rows of one optimiser step) without end.

    Rows are shuffled each epoch and sorted by length inside windows of 16 steps, which halves the
    padding.
    """
    epoch = 0
    while True:
        order = random.Random(f"{seed}/{epoch}")
        shuffled = list(rows)
        order.shuffle(shuffled)
        steps: list[list[TokenRow]] = []
        window = batch_size * 16
        for start in range(0, len(shuffled), window):
            part = sorted(shuffled[start : start + window], key=lambda row: len(row.ids))
            steps += [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
        order.shuffle(steps)
        for step in steps:
            yield epoch, step
        epoch += 1


def rows_within_budget(rows: Sequence[TokenRow], left: int) -> list[TokenRow]:
    """Return the leading rows whose tokens fit into what is left of a budget."""
    kept: list[TokenRow] = []
    for row in rows:
        if left < len(row.ids):
            break
        left -= len(row.ids)
        kept.append(row)
    return kept
