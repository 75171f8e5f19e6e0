"""How the rows of a batch stand in what a model reads: padded to one width, or one after another.

Everything is computed from the rows' lengths, on the processor: no mask is read back from a GPU.

Legend: B rows, T tokens of the widest, P tokens of all rows together, N trained positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from methods.training.transfers import to_device

WIDTHS_ON_GPU = 64  # tokens: kernels are planned for a shape, so that few shapes are wanted


class RowShape(NamedTuple):
    """The length of a row, and its first trained token."""

    length: int
    trained_from: int


class RowLayout(Protocol):
    """Where the rows' tokens are in what a model reads, and what it is called with.

    Indices count the places of `ids` row after row.
    """

    @property
    def ids(self) -> Tensor:
        """Return the tokens."""
        ...

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Return what the model is given beside `ids`."""
        ...

    @property
    def trained_N(self) -> Tensor:
        """Return the places whose logits predict trained tokens."""
        ...

    @property
    def after_first(self) -> Tensor:
        """Return the places of all tokens but the first of each row."""
        ...


def rounded_width(width: int, device: Any, *, most: int | None = None) -> int:
    """Return the tokens to which rows are filled up: on a GPU a multiple of 64, at most `most`."""
    if torch.device(device).type != "cuda":
        return width
    rounded = -(-width // WIDTHS_ON_GPU) * WIDTHS_ON_GPU
    return rounded if most is None else max(width, min(rounded, most))


def _index(ranges: Sequence[range], device: Any) -> Tensor:
    places = list(chain.from_iterable(ranges))
    return to_device(torch.tensor(places, dtype=torch.long), device)


def _trained_places(shapes: Sequence[RowShape], starts: Sequence[int], device: Any) -> Tensor:
    """Return the places before trained tokens, of rows that start at given places."""
    return _index(
        [
            range(start + shape.trained_from - 1, start + shape.length - 1)
            for start, shape in zip(starts, shapes, strict=True)
        ],
        device,
    )


def _places_after_first(shapes: Sequence[RowShape], starts: Sequence[int], device: Any) -> Tensor:
    return _index(
        [
            range(start + 1, start + shape.length)
            for start, shape in zip(starts, shapes, strict=True)
        ],
        device,
    )


@dataclass(frozen=True)
class PaddedRows:
    """Rows padded on the right to one width."""

    ids: Tensor  # (B, T)
    attention: Tensor  # (B, T): 1 where a row has a token, 0 where it is padded
    shapes: tuple[RowShape, ...]

    @property
    def starts(self) -> range:
        """Where the rows start."""
        return range(0, self.ids.numel(), self.ids.shape[1])

    @property
    def has_padding(self) -> bool:
        """Tell whether a row is shorter than the width."""
        return any(shape.length < self.ids.shape[1] for shape in self.shapes)

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Return the attention mask."""
        return {"attention_mask": self.attention}

    @cached_property
    def trained_N(self) -> Tensor:
        """The places whose logits predict trained tokens, (N,)."""
        return _trained_places(self.shapes, self.starts, self.ids.device)

    @cached_property
    def after_first(self) -> Tensor:
        """The places of all tokens but the first of each row."""
        return _places_after_first(self.shapes, self.starts, self.ids.device)


@dataclass(frozen=True)
class PackedRows:
    """Rows one after another in a single row without padding; none attends to another.

    On a GPU a few tokens that nobody reads stand at the end, up to a multiple of 64.
    """

    ids: Tensor  # (1, P)
    shapes: tuple[RowShape, ...]

    @property
    def starts(self) -> list[int]:
        """Where the rows start."""
        return [0, *accumulate(shape.length for shape in self.shapes)][:-1]

    @property
    def tokens(self) -> int:
        """The number of tokens of all rows."""
        return sum(shape.length for shape in self.shapes)

    @property
    def width(self) -> int:
        """The tokens of a row where attention pads rows again."""
        return rounded_width(max(shape.length for shape in self.shapes), self.ids.device)

    @cached_property
    def inputs(self) -> Mapping[str, Any]:
        """Positions that start anew with each row; this layout, for the attention.

        A mask of four dimensions is what transformers passes on as it is; the attention does not
        read it.
        """
        spare = range(self.ids.shape[1] - self.tokens)
        positions = _index([*(range(shape.length) for shape in self.shapes), spare], "cpu")
        device = self.ids.device
        return {
            "attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device),
            "position_ids": to_device(positions[None], device),
            "packed_rows": self,
        }

    @cached_property
    def padded_places(self) -> Tensor:
        """Where each token stands when rows are padded to `width`, (tokens,) of B * width."""
        width = self.width
        return _index(
            [
                range(row * width, row * width + shape.length)
                for row, shape in enumerate(self.shapes)
            ],
            self.ids.device,
        )

    @cached_property
    def trained_N(self) -> Tensor:
        """The places whose logits predict trained tokens, (N,)."""
        return _trained_places(self.shapes, self.starts, self.ids.device)

    @cached_property
    def after_first(self) -> Tensor:
        """The places of all tokens but the first of each row."""
        return _places_after_first(self.shapes, self.starts, self.ids.device)

    def pad(self, states: Tensor) -> Tensor:
        """Return states (1, H, P, D) of packed rows as (B, H, width, D), padded with 0."""
        rows, width = len(self.shapes), self.width
        by_token = states[0].transpose(0, 1)[: self.tokens]
        places = by_token.new_zeros((rows * width, *by_token.shape[1:]))
        spread = places.index_copy(0, self.padded_places, by_token)
        return spread.unflatten(0, (rows, width)).transpose(1, 2)

    def pack(self, states: Tensor) -> Tensor:
        """Return states (B, width, H, D) of padded rows as (1, P, H, D)."""
        by_token = states.flatten(0, 1).index_select(0, self.padded_places)
        spare = self.ids.shape[1] - self.tokens
        if spare:
            by_token = torch.nn.functional.pad(by_token, (0, 0, 0, 0, 0, spare))
        return by_token[None]
