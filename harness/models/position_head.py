"""Logits of a causal language model at selected positions alone, without those of all others."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class PositionHead:
    """Computes logits at selected positions only.

    A hook hands the model's head the selected states alone, since logits of a whole batch would be
    the largest tensor of a step. Everything behind the head (scales, caps) is the model's own.
    Gradients are kept where the caller's mode keeps them.
    """

    def __init__(self, model: Any) -> None:
        self._selected: torch.Tensor | None = None  # (B, T-1), during a call
        self._kept: list[torch.Tensor] | None = None  # during a call of `hidden_at`
        self.model = model
        head = model.get_output_embeddings()
        self._hook = head.register_forward_pre_hook(self._select) if head is not None else None

    def _select(self, head: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        selected = self._selected
        if selected is None or not arguments:
            return None
        states, *others = arguments
        if states.ndim != 3 or states.shape[1] != selected.shape[1] + 1:
            return None
        states = states[:, :-1][selected][None]
        if self._kept is not None:
            self._kept.append(states[0])
            states = states[:, :1]  # the head shall not make the others' logits
        return (states, *others)

    def logits_at(
        self,
        ids_BT: "torch.Tensor",
        attention_BT: "torch.Tensor",
        selected: "torch.Tensor",
        *,
        through: Any = None,
    ) -> "torch.Tensor":
        """Return logits (N, V) at the N positions that `selected` (B, T-1) marks.

        `through` is the wrapped model, where training wraps it.
        """
        self._selected = selected
        try:
            logits = (through or self.model)(
                input_ids=ids_BT, attention_mask=attention_BT, use_cache=False
            ).logits
        finally:
            self._selected = None
        count = int(selected.sum())
        result: torch.Tensor = (
            logits[0] if logits.shape[:2] == (1, count) else logits[:, :-1][selected]
        )
        return result

    def hidden_at(
        self,
        ids_BT: "torch.Tensor",
        attention_BT: "torch.Tensor",
        selected: "torch.Tensor",
        *,
        through: Any = None,
    ) -> "torch.Tensor":
        """Return what goes into the head at the selected positions, (N, H); no logits are made."""
        self._selected, self._kept = selected, []
        try:
            (through or self.model)(input_ids=ids_BT, attention_mask=attention_BT, use_cache=False)
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
