"""What a teacher wrote: drawn again after a kill, and asked as its own template shows a
question.
"""

from dataclasses import replace

import pytest
from distilling import TASKS, job

from harness.data.examples import training_examples
from harness.data.source import LocalOrHubData


@pytest.mark.slow
def test_a_killed_writer_of_traces_goes_on_and_draws_the_same(tiny, tmp_path, monkeypatch):
    from methods.training import traces

    uninterrupted_job, killed_job = (
        job([tiny], tmp_path / "a" / "x"),
        job([tiny], tmp_path / "b" / "x"),
    )
    examples = training_examples(TASKS, uninterrupted_job.source, rows=30)
    options = {"samples": 2, "temperature": 1.0, "longest": 60}
    expected = traces.teacher_traces(uninterrupted_job, examples, **options)
    plain, prompts = traces.Writer.generate, []

    def killed(writer, rows, *, finished, **options):
        def until_the_kill(row, answer):
            if len(answered) == 25:
                raise KeyboardInterrupt
            answered.append(row)
            finished(row, answer)

        answered = []
        return plain(writer, rows, finished=until_the_kill, **options)

    monkeypatch.setattr(traces.Writer, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        traces.teacher_traces(killed_job, examples, **options)
    [part] = (killed_job.cache / "traces").glob("*.part")
    part.write_text(part.read_text()[:-9])  # and the last line torn
    monkeypatch.setattr(
        traces.Writer,
        "generate",
        lambda writer, rows, **more: prompts.extend(rows) or plain(writer, rows, **more),
    )
    assert traces.teacher_traces(killed_job, examples, **options).texts == expected.texts
    assert len(prompts) == 60 - 24 and not list((killed_job.cache / "traces").glob("*.part"))


def test_a_chat_template_adds_one_bos_and_each_model_is_shown_its_own(tiny, tmp_path):
    from harness.contract import Example
    from harness.models.encoding import encode_prompt
    from methods.training.rows import encode as rows_from

    class Begins:
        bos_token, eos_token_id = "<s>", 9

        def __call__(self, text, add_special_tokens=True):
            body = [7 if part == "<s>" else 5 for part in text.replace("<s>", "<s> ").split()]
            return {"input_ids": ([7] if add_special_tokens else []) + body}

    assert encode_prompt(Begins(), "<s>hello") == [7, 5] and encode_prompt(Begins(), "hello") == [
        7,
        5,
    ]
    [row], _ = rows_from(Begins(), [("<s>hello", " there")], longest=9)
    assert row.ids == (7, 5, 5, 9) and row.trained_from == 2
    shown = []
    source = LocalOrHubData(
        show=lambda tokenizer, prompt: shown.append((type(tokenizer).__name__, prompt)) or prompt
    )
    from methods.training.traces import teacher_traces

    example = Example(
        task="gsm8k-mini",
        prompt="[student's] Question: 1?",
        completion="",
        answer="",
        gold="1",
        plain="Question: 1?",
    )
    teacher_traces(
        replace(job([tiny], tmp_path / "x"), source=source),
        [example],
        samples=1,
        temperature=0.0,
        longest=4,
    )
    assert [prompt for _, prompt in shown] == ["Question: 1?"]
