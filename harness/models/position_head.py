"""Logits of a causal language model at wanted positions alone: its head is handed no others."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class PositionHead:
    """Makes logits at the wanted positions only, with gradients where the caller's mode keeps them.

    Everything behind the head (scales, caps) is the model's own. Logits of a whole batch would be
    the largest tensor of a step.
    """

    def __init__(self, model: Any) -> None:
        self._wanted: torch.Tensor | None = None
        self.model = model
        head = model.get_output_embeddings()
        self._hook = head.register_forward_pre_hook(self._select) if head is not None else None

    def _select(self, head: Any, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if (
            self._wanted is None
            or not given
            or given[0].ndim != 3
            or given[0].shape[1] != self._wanted.shape[1] + 1
        ):
            return None
        return (given[0][:, :-1][self._wanted][None], *given[1:])

    def at(
        self,
        ids_BT: "torch.Tensor",
        attention_BT: "torch.Tensor",
        wanted: "torch.Tensor",
        *,
        through: Any = None,
    ) -> "torch.Tensor":
        """Return logits (N, V) at the positions (B, T-1) that are wanted; `through` is the wrapped
        model, where training wraps it.
        """
        self._wanted = wanted
        try:
            logits = (through or self.model)(
                input_ids=ids_BT, attention_mask=attention_BT, use_cache=False
            ).logits
        finally:
            self._wanted = None
        count = int(wanted.sum())
        selected: torch.Tensor = (
            logits[0] if logits.shape[:2] == (1, count) else logits[:, :-1][wanted]
        )
        return selected

    def close(self) -> None:
        """Leave the model as it was."""
        if self._hook is not None:
            self._hook.remove()
