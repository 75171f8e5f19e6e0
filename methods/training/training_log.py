"""`training.jsonl`: one line per step or validation; a tracker gets the same where one is set."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.files.lines import json_line, read_json_lines
from harness.files.writing import write_atomically


class TrainingLog:
    """The log of one training. A resumed one is first cut back to the step of its saved state."""

    def __init__(self, path: Path, *, keep_until: int, tracker: Any = None) -> None:
        lines = read_json_lines(path, skip_torn=True) if path.exists() else ()
        kept = (line for line in lines if isinstance(line, dict) and _stays(line, keep_until))
        write_atomically(path, "".join(json_line(line) for line in kept))
        self._stream = path.open("a", encoding="utf-8")
        self._tracker = tracker  # accelerate's accelerator, or None

    def write_step(self, line: Mapping[str, Any]) -> None:
        """Log an optimiser step."""
        self._write(line)
        if self._tracker is not None:
            values = {name: value for name, value in line.items() if name != "step"}
            self._tracker.log(values, step=line["step"])

    def write_validation(self, loss: float, *, step: int, epoch: int, tokens_seen: int) -> None:
        """Log the loss on the validation rows (nats per token)."""
        self._write({"step": step, "epoch": epoch, "seen": tokens_seen, "validation_ce": loss})
        if self._tracker is not None:
            self._tracker.log({"validation_ce": loss}, step=step)

    def end(self) -> None:
        """Tell the tracker that the training has ended, so that it writes what it still holds."""
        if self._tracker is not None:
            self._tracker.end_training()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()


def _stays(line: dict[str, Any], saved_step: int) -> bool:
    """Tell whether a line stays when training resumes from the state of `saved_step`.

    A state is saved after the line of its step and before the validation of that step, which will
    be repeated.
    """
    step = line.get("step")
    if not isinstance(step, int):
        return False
    return step < saved_step or (step == saved_step > 0 and "validation_ce" not in line)
