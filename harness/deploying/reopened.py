"""Opens an export in a fresh process with plain transformers, and compares every weight.

`python -P -m harness.deploying.reopened STUDENT EXPORT`: it prints one JSON object. Nothing of ours
is known to transformers while it opens the export; only then are the student's own files read.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import CellFailed, how_it_ended


class Reopened(NamedTuple):
    """How an export compares with the student that it was written from."""

    weights: int  # tensors that were compared
    missing: tuple[str, ...]  # that the opened export does not have
    largest_change: float  # of a weight, relative to the largest of its tensor
    where: str  # the tensor with that change; "" where all are equal
    libraries: tuple[str, ...]  # with their versions


def reopen(student: Path, export: Path) -> Reopened:
    """Open an export in a process of its own. Raises `CellFailed` where it cannot be opened."""
    command = [sys.executable, "-P", "-m", "harness.deploying.reopened", str(student), str(export)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CellFailed(
            f"{export} cannot be opened again by transformers: "
            f"{how_it_ended(done.returncode, done.stderr)}"
        )
    result = json.loads(done.stdout.splitlines()[-1])
    lists = {name: tuple(result[name]) for name in ("missing", "libraries")}
    return Reopened(**{**result, **lists})


def main(argv: list[str]) -> int:
    """Compare an export with its student, and print what was found."""
    student, export = Path(argv[1]), Path(argv[2])
    model, libraries = _opened(export)
    state = model.state_dict()
    print(json.dumps({**_compared(student, state)._asdict(), "libraries": libraries}))
    return 0


def _opened(export: Path) -> tuple[Any, list[str]]:
    """Return the opened model in fp32, unpacked by its own library, and what opened it."""
    from importlib import metadata

    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    opened_by = ["transformers"]
    if export.suffix == ".gguf":
        opened_by.append("gguf")
        model = AutoModelForCausalLM.from_pretrained(
            export.parent,
            gguf_file=export.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    else:
        from harness.models.checkpoint import model_class
        from harness.models.formats import packing_library

        model = model_class(export).from_pretrained(export, dtype=torch.float32)
        if library := packing_library(export):
            opened_by.append(library)
            with torch.no_grad():  # compressed-tensors unpacks at the first forward pass
                model(input_ids=torch.zeros((1, 2), dtype=torch.long))
    return model, [f"{name} {metadata.version(name)}" for name in opened_by]


def _compared(student: Path, state: dict[str, Any]) -> Reopened:
    """Compare every weight of a student with those of an opened export."""
    from harness.deploying.stored import StoredStudent

    stored = StoredStudent(student, student.name)
    names, missing = list(stored.names()), []
    largest, where = 0.0, ""
    for name in names:
        own = stored.plain(name)
        if name not in state or state[name].shape != own.shape:
            missing.append(name)
            continue
        opened, own = state[name].double(), own.double()
        gap = float((opened - own).abs().max())
        change = gap / max(float(own.abs().max()), 1e-300)
        if not change <= largest:  # a number that is none counts too
            largest, where = change, name
    return Reopened(len(names), tuple(missing), largest, where, ())


if __name__ == "__main__":
    sys.exit(main(sys.argv))
