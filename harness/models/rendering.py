"""How training items and prompts are shown to a model: as plain text or as a chat.

torch is imported inside functions.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from harness.contract import Checkpoint, Example, Prompting


class Rendering(NamedTuple):
    """How a model is shown training items and prompts."""

    render: Callable[[Example], Example]  # by the student's tokenizer
    show: Callable[[Any, str], str]  # (tokenizer, plain prompt) -> what its model is shown


def rendering_of(prompting: Prompting, base: Checkpoint) -> Rendering:
    """Return how training items and prompts are shown to models, as the scorer shows them."""
    if not prompting.chat:
        return Rendering(lambda example: example, lambda tokenizer, prompt: prompt)
    from harness.models.language_model import render_chat, student_tokenizer

    base_tokenizer = student_tokenizer(base)
    system = [{"role": "system", "content": prompting.system}] if prompting.system else []

    def show(tokenizer: Any, prompt: str) -> str:
        return render_chat(tokenizer, [*system, {"role": "user", "content": prompt}])

    def render(example: Example) -> Example:
        completion, answer = example.completion.lstrip(), example.answer.lstrip()
        return replace(
            example,
            prompt=show(base_tokenizer, example.prompt),
            plain=example.prompt,
            completion=completion,
            answer=answer,
        )

    return Rendering(render, show)
