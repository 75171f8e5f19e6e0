"""On-policy rows: the student continues the prompts itself, and is then trained on what it
wrote.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from harness.models.language_model import LanguageModel
from harness.scoring.backend import CanGenerate, Sampling
from harness.scoring.generation import Writer
from methods.training.rows import TokenRow


@dataclass
class Rollout:
    """Replaces the completions of a share of the steps by samples of the student's, drawn anew with
    its weights of that moment.

    Plain sampling: no top-k, no top-p, whatever the generation config says. Tokens are kept as they
    were drawn, never decoded and encoded again; an answer cut at `longest` has no EOS to learn.
    Step and seed decide every draw, so a resumed run draws the same.
    """

    share: float  # of the steps
    temperature: float
    longest: int
    seed: int
    readable: int = 2**31  # tokens of a row that the teacher can read
    seconds: float = field(default=0.0, compare=False)
    written: int = field(default=0, compare=False)

    def __call__(
        self, student: LanguageModel, rows: Sequence[TokenRow], number: int
    ) -> list[TokenRow]:
        """Return the step's rows: as they are, or with the student's own completions."""
        if random.Random(f"{self.seed}/{number}").random() >= self.share:
            return list(rows)
        began = time.monotonic()
        prompts = [row.ids[: row.trained_from] for row in rows]
        room = min(self.longest, min(student.context, self.readable) - max(map(len, prompts)))
        sampling = Sampling(
            temperature=self.temperature,
            seed=random.Random(f"{self.seed}/{number}/draw").randrange(2**31),
        )
        writer: CanGenerate = Writer(student)
        student.model.eval()
        written = writer.generate(prompts, max_new_tokens=room, sampling=sampling)
        student.model.train()
        self.seconds += time.monotonic() - began
        self.written += sum(one.tokens for one in written)
        return [
            TokenRow((*prompt, *one.ids), len(prompt), row.tag)
            for prompt, one, row in zip(prompts, written, rows, strict=True)
        ]
