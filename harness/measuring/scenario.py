"""The grid of a timing: prompt lengths, batch sizes and forced answer lengths."""

import re
from dataclasses import dataclass
from itertools import product

from harness.errors import HarnessError

# By device. A GPU's are one that reads a long prompt for one user and one that writes for many: the
# full grid takes some ten minutes a row, which its user can ask for.
GRIDS = {"cpu": "128x1x32", "cuda": "2048x1x32 128x32x64"}
FULL = "full"
FULL_GRID = "128,512,2048x1,8,32x128"
VISIT_SECONDS = 0.15  # of one visit to a model: short runs are repeated until it is filled
MIN_WARMUP_SECONDS = 1.0
EAGER_TOKENS = 17  # of a run launched kernel by kernel, where captured steps are timed beside it


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One point of the grid: prompt tokens, batch size, forced answer tokens."""

    prompt_tokens: int = 128
    batch: int = 1
    new_tokens: int = 32

    def __str__(self) -> str:
        return (
            f"{self.prompt_tokens} prompt tokens, {self.new_tokens} new tokens, batch {self.batch}"
        )


def parse_grid(text: str) -> tuple[Scenario, ...]:
    """Parse `PROMPT_TOKENSxBATCHxNEW_TOKENS`, each a comma list, all combined.

    Several of these are separated by spaces or semicolons; `full` is all of the large grid. Raises
    `HarnessError` for anything else.
    """
    scenarios: list[Scenario] = []
    if text.strip().lower() == FULL:
        text = FULL_GRID
    for part in filter(None, re.split(r"[;\s]+", text.strip())):
        lists = part.lower().split("x")
        if len(lists) != 3 or not all(
            re.fullmatch(r"\d{1,9}(,\d{1,9})*", numbers) for numbers in lists
        ):
            raise HarnessError(
                f"--grid {part!r} is not PROMPT_TOKENSxBATCHxNEW_TOKENS; write for example "
                "128,512x1,8x32"
            )
        for prompt, batch, new in product(
            *([int(value) for value in numbers.split(",")] for numbers in lists)
        ):
            if prompt < 1 or batch < 1 or new < 2:
                raise HarnessError(
                    f"--grid {part!r}: prompt tokens and batches start at 1, new tokens at 2 (one "
                    "comes from the prefill)"
                )
            scenarios.append(Scenario(prompt_tokens=prompt, batch=batch, new_tokens=new))
    if not scenarios:
        raise HarnessError("--grid is empty; write for example 128,512x1,8x32")
    return tuple(dict.fromkeys(scenarios))
