"""Chat templates, rendered alike for scoring and for training."""

import pytest


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (
            "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% "
            "endif %}{{ date_string }}",
            "26 Jul 2024",
        ),
        (
            "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}",
            "26 Jul 2024",
        ),
        (
            "{% macro day() %}{{ strftime_now('%Y-%m-%d, %-m %B') }}{% endmacro %}{{ day() }}",
            "2024-07-26, 07 July",
        ),
    ],
)
def test_a_template_that_writes_the_date_writes_the_same_one_every_day(template, told, small):
    """In what is scored and in what teacher and student are trained on alike."""
    from harness.contract import Prompting
    from harness.models.rendering import rendering_of
    from harness.scoring.lm_eval_model import HarnessLM

    opened = small("Llama")
    opened.tokenizer.chat_template = (
        template + "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    lm = HarnessLM(opened)
    turns = [{"role": "user", "content": "2 and 2?"}, {"role": "assistant", "content": "Answer:"}]
    assert lm.apply_chat_template(turns[:1]) == f"{told}<user>2 and 2?"
    assert (
        lm.apply_chat_template(turns, add_generation_prompt=False)
        == f"{told}<user>2 and 2?<assistant>Answer:"
    )
    _, show = rendering_of(Prompting(chat=True), opened.checkpoint)
    assert show(opened.tokenizer, "2 and 2?") == f"{told}<user>2 and 2?"


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def example_of(**fields):
    from harness.contract import Example

    filled = {"task": "own:x", "prompt": "", "completion": " B", "answer": "", "gold": ""} | fields
    return Example(**filled)


@pytest.mark.parametrize("chat", [True, False])
def test_a_conversation_is_shown_in_the_template_and_a_text_never_is(chat, small, monkeypatch):
    from harness.contract import Prompting
    from harness.models import language_model
    from harness.models.rendering import rendering_of

    opened = small("Llama")
    opened.tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(language_model, "student_tokenizer", lambda base: opened.tokenizer)
    render, _ = rendering_of(Prompting(chat=chat), opened.checkpoint)
    talk = render(example_of(conversation=(("system", "S"), ("user", "Q")), prompt="S Q"))
    assert (talk.prompt, talk.completion, talk.plain) == ("<system>S<user>Q", "B", "S Q")
    text = render(example_of(completion="A text."))
    assert (text.prompt, text.completion) == ("", "A text.")
    pair = render(example_of(prompt="Q"))
    assert (pair.prompt, pair.completion) == (("<user>Q", "B") if chat else ("Q", " B"))


def test_a_conversation_without_a_template_is_refused_with_what_to_give(small, monkeypatch):
    from harness.contract import Prompting
    from harness.errors import CellFailed
    from harness.models import language_model
    from harness.models.rendering import rendering_of

    opened = small("Llama")
    opened.tokenizer.chat_template = None
    monkeypatch.setattr(language_model, "student_tokenizer", lambda base: opened.tokenizer)
    render, _ = rendering_of(Prompting(), opened.checkpoint)
    with pytest.raises(CellFailed, match=r"own:x holds messages.*give prompt and completion"):
        render(example_of(conversation=(("user", "Q"),)))
