"""Training data that a teacher writes: answers, questions, what is left out, and resuming."""

import copy
import json
from dataclasses import replace
from itertools import islice

import pytest
from distilling import TASKS, job

from harness import catalog
from harness.contract import Example
from harness.data.examples import plain_examples
from harness.data.source import LocalOrHubData
from harness.data.teacher_sets import parse_teacher_set
from harness.errors import CellFailed
from harness.models.language_model import render_chat
from harness.models.rendering import prompt_for
from harness.running.teacher_data import whole_sentences, write_training_data
from harness.scoring.backend import Generation
from methods.training.traces import Traces

ONE_TASK = {"gsm8k-mini": TASKS["gsm8k-mini"]}


def asked(text, rows=10):
    return parse_teacher_set(text).data.planned(rows, "test")


def write(the_job, data, **changes):
    return write_training_data(the_job, data, **{"chat": False, "system": None, **changes})


@pytest.fixture
def tiny_job(tiny, tmp_path):
    return replace(job([tiny], tmp_path / "a" / "x"), tasks=ONE_TASK)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("One. Two is cut", "One."),
        ('He said "yes." Then', 'He said "yes."'),
        ("A line\nand another", "A line"),
        ("It costs 3.50 and then", ""),
        ("Ends well.\n", "Ends well."),
        ("nothing ends", ""),
        ("", ""),
    ],
)
def test_a_text_that_did_not_end_is_cut_behind_a_sentence(text, whole):
    assert whole_sentences(text) == whole


def test_the_teacher_answers_the_train_prompts_of_the_tasks(tiny_job):
    data = asked("teacher[longest=80]")
    text = write(tiny_job, data)
    prompts = [
        example.prompt for example in plain_examples(ONE_TASK, "train", tiny_job.source, rows=11)
    ]
    assert text.counts["written"] == data.asked == 11
    assert {example.prompt for example in text.examples} <= set(prompts)
    assert {example.task for example in text.examples} == {data.name}
    kept, left = (
        len(text.examples),
        sum(text.counts[name] for name in ("unfinished", "empty", "repeats")),
    )
    assert kept and kept + left == 11 and text.counts["cut"] == 0
    [cost] = text.costs
    assert cost["tokens"] == text.counts["tokens"] > kept and cost["flops"] > 0


def test_greedy_answers_are_those_that_the_scorer_would_read(tiny_job, embedded):
    from harness.scoring.generation import generate

    [example] = write(tiny_job, asked("teacher", rows=1)).examples[:1]
    [answer] = generate(embedded, [embedded.encode(example.prompt)], max_new_tokens=256)
    assert answer.stop == "eos" and example.completion.strip() == answer.text.strip()


def test_from_nothing_every_text_is_another_one_and_the_seed_decides(tiny_job, tmp_path):
    text = write(tiny_job, asked("teacher:free[longest=40]", rows=12))
    assert (
        text.counts["written"] == 13 and len({example.completion for example in text.examples}) > 5
    )
    assert all(example.prompt == "" for example in text.examples)
    elsewhere = replace(tiny_job, cache=tmp_path / "other")
    again = write(elsewhere, asked("teacher:free[longest=40]", rows=12))
    assert again.examples == text.examples
    other = write(elsewhere, asked("teacher:free[longest=40,seed=1]", rows=12))
    assert other.examples != text.examples


def test_what_was_written_is_read_and_the_teacher_is_not_opened(tiny_job, monkeypatch):
    from methods.training import traces

    data = asked("teacher:free[longest=40]")
    text = write(tiny_job, data)
    monkeypatch.setattr(traces, "open_model", lambda *a, **k: pytest.fail("it was opened again"))
    assert write(tiny_job, data) == text


def test_a_killed_writer_goes_on_where_it_was(tiny_job, tmp_path, monkeypatch):
    from methods.training import traces

    data = asked("teacher:free[longest=40]", rows=12)
    expected = write(replace(tiny_job, cache=tmp_path / "whole"), data)
    plain, prompts = traces.Writer.generate, []

    def killed(writer, rows, *, finished, **options):
        def until_the_kill(row, answer):
            finished(row, answer)
            if row >= 4:
                raise KeyboardInterrupt

        return plain(writer, rows, finished=until_the_kill, **options)

    monkeypatch.setattr(traces.Writer, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tiny_job, data)
    [part] = (tiny_job.cache / "traces").glob("*.part")
    kept = len(part.read_text().splitlines())
    assert 0 < kept < 13
    monkeypatch.setattr(
        traces.Writer,
        "generate",
        lambda writer, rows, **more: prompts.extend(rows) or plain(writer, rows, **more),
    )
    assert write(tiny_job, data).examples == expected.examples and len(prompts) == 13 - kept


def test_in_a_chat_template_it_asks_first_and_answers_then(tiny_job, embedded, monkeypatch):
    """The teacher's words are written here: no embedded model knows a template."""
    tokenizer = copy.copy(embedded.tokenizer)
    tokenizer.chat_template = (
        "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}[end]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    source = LocalOrHubData(
        show=lambda tokenizer, prompt: render_chat(tokenizer, [{"role": "user", "content": prompt}])
    )
    questions = [("Why?", "eos"), (" How?", "eos"), ("Why?", "eos"), ("", "eos"), ("Wh", "length")]
    shown = []

    def write_traces(job, prompts, *, samples, temperature, longest):
        shown.append([prompt_for(job.source, tokenizer, prompt) for prompt in prompts])
        texts = [[Generation(text, 3, stop) for text, stop in questions]]
        if len(shown) == 2:
            texts = [[Generation("Because.", 2, "eos")], [Generation("So", 1, "length")]]
        assert (samples, temperature, longest) == ((7, 1, 256), (1, 1, 256))[len(shown) - 1]
        return Traces(str(len(shown)), texts, 15, 1.0, 9.0)

    monkeypatch.setattr(catalog, "write_traces", write_traces)
    the_job = replace(tiny_job, source=source)
    text = write(the_job, asked("teacher:free", rows=6), chat=True, system="Be short.")
    assert shown == [
        ["[system]Be short.[end][user]"],
        ["[user]Why?[end][assistant]", "[user]How?[end][assistant]"],
    ]
    assert [(each.prompt, each.completion) for each in text.examples] == [("Why?", "Because.")]
    assert len(text.costs) == 2 and text.counts["tokens"] == 30 and text.counts["unfinished"] == 1
    assert text.counts["joules"] is None  # no counter could be read


def test_a_template_that_changes_what_is_asked_is_refused(tiny_job, monkeypatch):
    from harness.models import language_model

    monkeypatch.setattr(language_model, "render_chat", lambda tokenizer, turns: "nothing of it")
    with pytest.raises(CellFailed, match="chat template does not show a user's words"):
        write(tiny_job, asked("teacher:free"), chat=True)


def test_no_text_that_ends_is_said_with_what_to_type(tiny_job):
    with pytest.raises(CellFailed, match=r"11 did not end within 2 tokens.*teacher\[longest=4\]"):
        write(tiny_job, asked("teacher[longest=2]"))


def test_several_answers_to_each_prompt_are_several_examples(tiny_job):
    data = asked("teacher[samples=3,temperature=1.0,longest=80]", rows=8)
    text = write(tiny_job, data)
    assert text.counts["written"] == 9 and len({example.prompt for example in text.examples}) <= 3


def test_a_model_without_bos_begins_behind_eos_and_one_without_both_is_refused():
    from types import SimpleNamespace

    from methods.training.traces import _first_token

    def opened(bos, eos):
        tokenizer = SimpleNamespace(bos_token_id=bos, eos_token_id=eos)
        return SimpleNamespace(tokenizer=tokenizer, checkpoint=SimpleNamespace(name="m"))

    assert _first_token(opened(1, 2)) == 1 and _first_token(opened(None, 2)) == 2
    with pytest.raises(CellFailed, match="neither BOS nor EOS"):
        _first_token(opened(None, None))


def test_joules_and_seconds_are_counted_where_a_counter_is(tiny_job, monkeypatch):
    from methods.training import traces

    class Counter:
        def __init__(self, device):
            assert device == "cpu"

        def joules(self):
            return 2.0

    monkeypatch.setattr(traces, "EnergyMeter", Counter)
    counts = write(tiny_job, asked("teacher:free[longest=20]", rows=3)).counts
    assert counts["joules"] == 2.0 * (4 + 1) and counts["seconds"] > 0
    lines = [*islice((tiny_job.cache / "traces").glob("*.json"), 2)]
    assert json.loads(json.loads(lines[0].read_text())["payload"])["joules"] == 10.0


def test_an_example_of_a_file_and_one_of_a_teacher_look_alike(tiny_job):
    [example] = write(tiny_job, asked("teacher", rows=1)).examples[:1]
    assert isinstance(example, Example) and example.gold == example.answer == ""
