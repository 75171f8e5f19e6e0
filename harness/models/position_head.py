"""Logits of a causal language model at selected positions alone, without those of all others."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


class _Selection(NamedTuple):
    """Places among the tokens of a batch, counted row after row."""

    places_N: "torch.Tensor"
    shape: "torch.Size"  # (B, T)

    def of(self, states_BTX: "torch.Tensor") -> "torch.Tensor":
        """Return the states at the places, (N, X)."""
        return states_BTX.flatten(0, 1).index_select(0, self.places_N)


def places_of(selected: "torch.Tensor") -> "torch.Tensor":
    """Return the places, counted row after row in (B, T), that a mask (B, T-1) marks."""
    import torch

    return torch.nn.functional.pad(selected, (0, 1)).flatten().nonzero().flatten()


class PositionHead:
    """Computes logits at selected positions only.

    A hook hands the model's head the selected states alone, since logits of a whole batch would be
    the largest tensor of a step. Everything behind the head (scales, caps) is the model's own.
    Gradients are kept where the caller's mode keeps them.
    """

    def __init__(self, model: Any) -> None:
        self._selected: _Selection | None = None  # during a call
        self._kept: list[torch.Tensor] | None = None  # during a call of `hidden_of`
        self.model = model
        head = model.get_output_embeddings()
        self._hook = head.register_forward_pre_hook(self._select) if head is not None else None

    def _select(self, head: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        selected = self._selected
        if selected is None or not arguments:
            return None
        states, *others = arguments
        if states.ndim != 3 or states.shape[:2] != selected.shape:
            return None
        states = selected.of(states)[None]
        if self._kept is not None:
            self._kept.append(states[0])
            states = states[:, :1]  # the head shall not make the others' logits
        return (states, *others)

    def logits_at(
        self,
        ids_BT: "torch.Tensor",
        attention_BT: "torch.Tensor",
        selected: "torch.Tensor",
    ) -> "torch.Tensor":
        """Return logits (N, V) at the N positions that `selected` (B, T-1) marks."""
        return self.logits_of(ids_BT, places_of(selected), {"attention_mask": attention_BT})

    def logits_of(
        self,
        ids_BT: "torch.Tensor",
        places_N: "torch.Tensor",
        inputs: Mapping[str, Any],
        *,
        through: Any = None,
    ) -> "torch.Tensor":
        """Return logits (N, V) at places, which count all tokens row after row.

        `inputs` is what the model is given beside the tokens; `through` is the wrapped model, where
        training wraps it. Nothing is read back from a GPU.
        """
        self._selected = selection = _Selection(places_N, ids_BT.shape)
        try:
            logits: torch.Tensor = (through or self.model)(
                input_ids=ids_BT, use_cache=False, **inputs
            ).logits
        finally:
            self._selected = None
        return logits[0] if logits.shape[:2] == (1, len(places_N)) else selection.of(logits)

    def hidden_of(
        self,
        ids_BT: "torch.Tensor",
        places_N: "torch.Tensor",
        inputs: Mapping[str, Any],
        *,
        through: Any = None,
    ) -> "torch.Tensor":
        """Return what goes into the head at places, (N, H); no logits are made."""
        self._selected, self._kept = _Selection(places_N, ids_BT.shape), []
        try:
            (through or self.model)(input_ids=ids_BT, use_cache=False, **inputs)
            if len(self._kept) != 1:
                raise RuntimeError("the model calls its head in a way that is not known here")
            hidden = self._kept[0]
        finally:
            self._selected = self._kept = None
        return hidden

    def close(self) -> None:
        """Remove the hook from the model."""
        if self._hook is not None:
            self._hook.remove()
