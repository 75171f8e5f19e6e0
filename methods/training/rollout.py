"""On-policy rows: the student continues the prompts, and is then trained on what it wrote."""

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
    """Replaces the completions of a share of the steps by samples of the current student.

    Plain sampling: no top-k, no top-p, whatever the generation config says. Sampled tokens are kept
    as they are, never decoded and encoded again; an answer cut at `max_new_tokens` has no EOS to
    learn. Step and seed decide every sample, so a resumed run samples the same.
    """

    share: float  # of the steps
    temperature: float
    max_new_tokens: int
    seed: int
    teacher_context: int = 2**31  # tokens of a row that the teacher can read
    seconds: float = field(default=0.0, compare=False)
    written: int = field(default=0, compare=False)  # tokens

    def __call__(
        self, student: LanguageModel, rows: Sequence[TokenRow], step: int
    ) -> list[TokenRow]:
        """Return the step's rows: as they are, or with the student's own completions."""
        if random.Random(f"{self.seed}/{step}").random() >= self.share:
            return list(rows)
        began = time.monotonic()
        prompts = [row.ids[: row.trained_from] for row in rows]
        room = min(student.context, self.teacher_context) - max(map(len, prompts))
        sampling = Sampling(
            temperature=self.temperature,
            seed=random.Random(f"{self.seed}/{step}/draw").randrange(2**31),
        )
        writer: CanGenerate = Writer(student)
        student.model.eval()
        completions = writer.generate(
            prompts, max_new_tokens=min(self.max_new_tokens, room), sampling=sampling
        )
        student.model.train()
        self.seconds += time.monotonic() - began
        self.written += sum(completion.tokens for completion in completions)
        return [
            TokenRow((*prompt, *completion.ids), len(prompt), row.tag)
            for prompt, completion, row in zip(prompts, completions, rows, strict=True)
        ]
