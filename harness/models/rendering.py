"""How training items and prompts are shown to a model. No torch at import.

Plainly, or as a conversation in the model's chat template.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from harness.contract import Checkpoint, DataSource, Example, Prompting
from harness.errors import CellFailed


class Rendering(NamedTuple):
    """How a model is shown training items and prompts."""

    render: Callable[[Example], Example]  # by the student's tokenizer
    show: Callable[[Any, str], str]  # (tokenizer, plain prompt) -> what its model is shown


def rendering_of(prompting: Prompting, base: Checkpoint) -> Rendering:
    """Return how training items and prompts are shown to models, as the scorer shows them.

    A conversation of the user's own data is always shown in the student's chat template; a text
    without a prompt never is.
    """
    from harness.models.language_model import render_chat, student_tokenizer

    @cache
    def base_tokenizer() -> Any:
        return student_tokenizer(base)

    def as_text(example: Example) -> Example:
        return _in_template(example, base, base_tokenizer()) if example.conversation else example

    if not prompting.chat:
        return Rendering(as_text, lambda tokenizer, prompt: prompt)
    system = [{"role": "system", "content": prompting.system}] if prompting.system else []

    def show(tokenizer: Any, prompt: str) -> str:
        return render_chat(tokenizer, [*system, {"role": "user", "content": prompt}])

    def render(example: Example) -> Example:
        if example.conversation or not example.prompt:
            return as_text(example)
        return replace(
            example,
            prompt=show(base_tokenizer(), example.prompt),
            plain=example.prompt,
            completion=example.completion.lstrip(),
            answer=example.answer.lstrip(),
        )

    return Rendering(render, show)


def prompt_for(source: DataSource, tokenizer: Any, example: Example, *, before: str = "") -> str:
    """Return what a model with a tokenizer of its own is shown of an example.

    As the student is shown it, in the other model's template; `before` stands before what is asked.
    """
    from harness.models.language_model import render_chat

    if example.conversation and tokenizer.chat_template:
        turns = [{"role": role, "content": content} for role, content in example.conversation]
        turns[-1]["content"] = before + turns[-1]["content"]
        return render_chat(tokenizer, turns)
    if not example.asked:
        return before
    return source.show(tokenizer, before + example.asked)


def _in_template(example: Example, base: Checkpoint, tokenizer: Any) -> Example:
    """Return an example whose prompt is the conversation before it.

    Raises `CellFailed` where the tokenizer has no template.
    """
    from harness.models.language_model import render_chat

    if not tokenizer.chat_template:
        raise CellFailed(
            f"{example.task} holds messages, and the tokenizer of {base.name} has no chat template "
            "to show them in; give prompt and completion in their place"
        )
    turns = [{"role": role, "content": content} for role, content in example.conversation]
    return replace(
        example,
        prompt=render_chat(tokenizer, turns),
        plain=example.prompt,
        completion=example.completion.lstrip(),
    )
