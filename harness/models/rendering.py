"""How training items and prompts are shown to a model: as plain text, or as a conversation in its
chat template. No torch at import.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

from harness.contract import Checkpoint, Example, Prompting
from harness.errors import CellFailed


def rendering_of(
    prompting: Prompting, base: Checkpoint
) -> tuple[Callable[[Example], Example], Callable[[Any, str], str]]:
    """Return how training items are shown to the student, and prompts to a model by its tokenizer:
    as the scorer shows them.
    """
    from harness.models.language_model import render_chat, student_tokenizer

    @cache
    def tokenizer_of_student() -> Any:
        return student_tokenizer(base)

    def with_conversation(example: Example) -> Example:
        tokenizer = tokenizer_of_student()
        if not tokenizer.chat_template:
            raise CellFailed(
                f"{example.task} holds messages, and the tokenizer of {base.name} has no chat "
                "template to show them in; give prompt and completion in their place"
            )
        turns = [{"role": role, "content": content} for role, content in example.conversation]
        return replace(
            example,
            prompt=render_chat(tokenizer, turns),
            plain=example.prompt,
            completion=example.completion.lstrip(),
        )

    def as_text(example: Example) -> Example:
        return with_conversation(example) if example.conversation else example

    if not prompting.chat:
        return as_text, (lambda tokenizer, prompt: prompt)
    system = [{"role": "system", "content": prompting.system}] if prompting.system else []

    def show(tokenizer: Any, prompt: str) -> str:
        return render_chat(tokenizer, [*system, {"role": "user", "content": prompt}])

    def render(example: Example) -> Example:
        if example.conversation or not example.prompt:  # a text of its own, in no template
            return as_text(example)
        completion, answer = example.completion.lstrip(), example.answer.lstrip()
        return replace(
            example,
            prompt=show(tokenizer_of_student(), example.prompt),
            plain=example.prompt,
            completion=completion,
            answer=answer,
        )

    return render, show
