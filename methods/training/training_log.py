"""`training.jsonl`: one line a step or validation, shown in a tracker too where one was
asked for.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.files.lines import json_line, read_json_lines
from harness.files.writing import write_atomically


class TrainingLog:
    """The log of one training. On resume it is cut back to the state's step."""

    def __init__(self, path: Path, *, keep_until: int, tracker: Any = None) -> None:
        lines = read_json_lines(path, skip_torn=True) if path.exists() else ()
        kept = (
            line
            for line in lines
            if isinstance(line, dict) and _is_older_than_state(line, keep_until)
        )
        write_atomically(path, "".join(json_line(line) for line in kept))
        self._stream = path.open("a", encoding="utf-8")
        self._tracker = tracker  # accelerate's accelerator, or None

    def write_step(self, line: Mapping[str, Any]) -> None:
        """Log an optimiser step."""
        self._write(line)
        if self._tracker is not None:
            shown = {name: value for name, value in line.items() if name != "step"}
            self._tracker.log(shown, step=line["step"])

    def write_validation(self, loss: float, *, step: int, epoch: int, seen: int) -> None:
        """Log the loss on the validation rows (nats a token)."""
        self._write({"step": step, "epoch": epoch, "seen": seen, "validation_ce": loss})
        if self._tracker is not None:
            self._tracker.log({"validation_ce": loss}, step=step)

    def end(self) -> None:
        """Let the tracker finish what it shows: the training is whole."""
        if self._tracker is not None:
            self._tracker.end_training()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()


def _is_older_than_state(line: dict[str, Any], keep_until: int) -> bool:
    """Tell whether a line is older than the state.

    A state is saved after its step's line and before the validation of that step, which will come
    again.
    """
    step = line.get("step")
    if not isinstance(step, int):
        return False
    return step < keep_until or (step == keep_until > 0 and "validation_ce" not in line)
