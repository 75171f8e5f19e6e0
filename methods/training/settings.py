"""What the loop is set to: hyperparameters, and what belongs to one training alone.

No torch at import.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.contract import Progress


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Hyperparameters of every trained method; equal in all rows of a table unless set."""

    learning_rate: float
    batch_size: int
    micro_batch_size: int
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    validation_rows: int
    gradient_checkpointing: bool = False
    patience: int = 0
    optimizer: Literal["adamw", "adamw-8bit", "muon"] = "adamw"
    packing: Literal["auto", "on", "off"] = "auto"


def _ignore_progress(_: Progress) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training: how many tokens it sees, its seed, and where its state and its log are.

    `stop_after_steps` ends the process's work early, with the state saved. The tests use it; a user
    presses Ctrl-C, which costs at most the seconds since the last state.
    """

    seen_tokens: int
    seed: int
    workdir: Path
    mixed_precision: Literal["no", "bf16"] = "no"
    track: str = ""  # tensorboard, wandb or trackio, beside training.jsonl
    progress: Callable[[Progress], None] = _ignore_progress
    stop_after_steps: int | None = None
