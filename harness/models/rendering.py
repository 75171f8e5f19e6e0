"""How training items and prompts are shown to a model: as plain text, or as a conversation in its
chat template. No torch at import.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from harness.contract import Checkpoint, Example, Prompting


def rendering_of(
    prompting: Prompting, base: Checkpoint
) -> tuple[Callable[[Example], Example], Callable[[Any, str], str]]:
    """Return how training items are shown to the student, and prompts to a model by its tokenizer:
    as the scorer shows them.
    """
    if not prompting.chat:
        return (lambda example: example), (lambda tokenizer, prompt: prompt)
    from harness.models.language_model import render_chat, student_tokenizer

    own = student_tokenizer(base)
    system = [{"role": "system", "content": prompting.system}] if prompting.system else []

    def show(tokenizer: Any, prompt: str) -> str:
        return render_chat(tokenizer, [*system, {"role": "user", "content": prompt}])

    def render(example: Example) -> Example:
        completion, answer = example.completion.lstrip(), example.answer.lstrip()
        return replace(
            example,
            prompt=show(own, example.prompt),
            plain=example.prompt,
            completion=completion,
            answer=answer,
        )

    return render, show
