"""Training data of one's own: its forms, its shares, what is held out, and bad lines."""

import json
from dataclasses import replace

import pytest

import suites
from harness.data.contamination import evaluation_items
from harness.data.examples import examples_of, shares_of, training_examples
from harness.data.source import LocalOrHubData, NoSplit
from harness.data.training_sets import examples_of_row
from harness.data.typed_sets import parse_training_sets
from harness.errors import HarnessError

SOURCE = LocalOrHubData()
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(count, start=0):
    return [{"prompt": f"Q{n}", "completion": f" A{n}"} for n in range(start, start + count)]


def one_set(path, rows):
    [training_set] = parse_training_sets([write(path, rows)])
    return training_set


def test_each_form_becomes_examples(tmp_path):
    rows = [
        {"prompt": "Q", "completion": " A", "answer": "A", "id": 7},
        {"text": "A whole text."},
        {"messages": TALK},
    ]
    training_set = one_set(tmp_path / "mine.jsonl", rows)
    examples = [
        *training_set.examples("train", SOURCE),
        *training_set.examples("validation", SOURCE),
    ]
    found = {(example.prompt, example.completion) for example in examples}
    assert found == {
        ("Q", " A"),
        ("", "A whole text."),
        ("system: Be short.\nuser: Hi", "Hello"),
        ("system: Be short.\nuser: Hi\nassistant: Hello\nuser: 2+2?", "4"),
    }
    assert {example.task for example in examples} == {"own:mine.jsonl"}
    talks = [example for example in examples if example.conversation]
    assert len(talks) == 2
    assert talks[-1].conversation[-1] in {("user", "Hi"), ("user", "2+2?")}


def test_validation_is_a_twentieth_that_no_order_of_the_file_changes(tmp_path):
    rows = pairs(100)
    forward = one_set(tmp_path / "a.jsonl", rows)
    backward = one_set(tmp_path / "b.jsonl", rows[::-1])
    held_out = [
        {example.prompt for example in each.examples("validation", SOURCE)}
        for each in (forward, backward)
    ]
    trained = {example.prompt for example in forward.examples("train", SOURCE)}
    assert held_out[0] == held_out[1] and len(held_out[0]) == 5
    assert len(trained) == 95 and not trained & held_out[0]
    with pytest.raises(NoSplit, match="never scored"):
        next(forward.examples("test", SOURCE))


@pytest.mark.parametrize(
    ("rows", "weights", "shares"),
    [
        (10, [1, 1], [5, 5]),
        (11, [1, 1], [6, 5]),
        (10, [3, 1], [8, 2]),
        (10, [0.7, 0.2, 0.1], [7, 2, 1]),
        (7, [1, 1, 1], [3, 2, 2]),
        (1, [1, 5], [0, 1]),
    ],
)
def test_rows_are_shared_by_weight(rows, weights, shares):
    assert shares_of(rows, weights) == shares


def test_several_sets_give_rows_by_their_weights(tmp_path):
    paths = [write(tmp_path / f"{name}.jsonl", pairs(60, 100 * at)) for at, name in enumerate("ab")]
    sets = parse_training_sets([f"{paths[0]}=3", paths[1]])
    tasks = {each.name: each for each in sets}
    names = [example.task for example in examples_of(tasks, "train", SOURCE, rows=40)]
    assert names.count("own:a.jsonl") == 30 and names.count("own:b.jsonl") == 10


def test_a_changed_line_changes_the_digest_and_a_new_field_does_not(tmp_path):
    rows = pairs(5)
    same = one_set(tmp_path / "a.jsonl", [{**row, "note": 1} for row in rows])
    other = one_set(tmp_path / "b.jsonl", [*rows[:4], {"prompt": "Q4", "completion": " B"}])
    first = one_set(tmp_path / "c.jsonl", rows)
    assert first.digest == same.digest != other.digest


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "Q"}', "line 2: the field completion is missing"),
        ('{"completion": "A"}', "line 2: the field prompt is missing"),
        ('{"question": "Q", "answer": "A"}', "line 2: its fields are question, answer"),
        ("{}", "line 2: its fields are none"),
        ('{"prompt": "Q", "completion": 3}', "line 2: the field completion holds int"),
        ('{"prompt": ["Q"], "completion": "A"}', "line 2: the field prompt holds list"),
        ('{"prompt": "Q", "completion": " "}', "line 2: the field completion is empty"),
        ('{"text": ""}', "line 2: the field text is empty"),
        ('{"messages": "hi"}', "line 2: the field messages must be a list"),
        ('{"messages": []}', "line 2: the field messages must be a list"),
        ('{"messages": [{"role": "boss", "content": "x"}]}', r"line 2: messages\[0\] must have a"),
        ('{"messages": [{"role": "user", "content": [1]}]}', r"line 2: messages\[0\] must have a"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 2: no message is the assistant"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "the first message is the assi"),
        ("[1, 2]", "line 2: .* is no JSON object"),
        ("{not json", "line 2: no JSON"),
    ],
)
def test_a_line_of_another_form_is_named(tmp_path, line, said):
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps(pairs(1)[0])}\n{line}\n{json.dumps({'text': 'x'})}\n")
    [training_set] = parse_training_sets([str(path)])
    with pytest.raises(HarnessError, match=said):
        list(training_set.examples("train", SOURCE))


def test_what_is_typed_is_checked(tmp_path):
    path = write(tmp_path / "mine.jsonl", pairs(3))
    (tmp_path / "other").mkdir()
    twin = write(tmp_path / "other" / "mine.jsonl", pairs(3))
    for texts, said in (
        ([f"{path}=much"], "'much' is no weight"),
        ([f"{path}=0"], "'0' is no weight"),
        ([f"{path}=-1"], "'-1' is no weight"),
        ([f"{path}=nan"], "'nan' is no weight"),
        ([path, path], "twice"),
        ([path, twin], "two files of --train-data are called mine.jsonl"),
        (["./nowhere.jsonl"], "there is no such file"),
        (["data/nowhere.jsonl"], "there is no such file"),
        (["/nowhere/name"], "there is no such file"),
    ):
        with pytest.raises(HarnessError, match=said):
            parse_training_sets(texts)
    odd = write(tmp_path / "a=b.jsonl", pairs(3))
    assert (
        parse_training_sets([odd])[0].weight == 1
        and parse_training_sets([f"{odd}=2"])[0].weight == 2
    )


@pytest.mark.parametrize("rows", [[], pairs(1)])
def test_a_file_of_no_use_is_refused(tmp_path, rows):
    training_set = one_set(tmp_path / "small.jsonl", rows)
    with pytest.raises(HarnessError, match=r"holds (no line|1 examples of different prompts)"):
        list(training_set.examples("train", SOURCE))


def test_a_data_set_of_the_hub_is_read_and_a_hub_that_is_not_there_is_said(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, *, split):
        asked.append((name, split))
        if name == "org/missing":
            raise ConnectionError("no route to host")
        return pairs(4)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sets = parse_training_sets(["org/name", "org/other:part=2"])
    assert [each.name for each in sets] == ["own:org/name", "own:org/other:part"]
    assert len(list(sets[1].examples("train", SOURCE))) == 3
    assert asked == [("org/other", "part")]
    [missing] = parse_training_sets(["org/missing"])
    with pytest.raises(HarnessError, match=r"cannot be read from the Hugging Face Hub .*no route"):
        list(missing.examples("train", SOURCE))


def test_evaluation_items_are_found_by_equal_questions_and_by_runs_of_words():
    task = suites.load("gsm8k-mini")
    scored = next(iter(task.examples("test", SOURCE)))
    rows = [
        {"prompt": scored.prompt, "completion": " 1"},
        {"prompt": f"Shots.\n\n{scored.prompt}", "completion": " 1"},
        {"prompt": "Something else", "completion": " 1"},
    ]
    examples = [example for row in rows for example in examples_of_row(row, "own:x", "x")]
    assert evaluation_items(examples, {task.name: task}, SOURCE) == {0: task.name, 1: task.name}


class Documents:
    """A task read from outside: a question, and words that no other text has by chance."""

    name, kind, files = "outside", "generate", ("outside/test.jsonl",)
    words = tuple(f"word{number}" for number in range(20))

    def examples(self, split, source):
        if split != "test":
            raise NoSplit("only test")
        text = " ".join(self.words)
        yield from examples_of_row({"prompt": text, "completion": "x"}, self.name, "x")


@pytest.mark.parametrize(("count", "found"), [(13, True), (12, False)])
def test_a_run_of_thirteen_words_of_a_task_from_outside_is_found(count, found):
    run = " ".join(Documents.words[3 : 3 + count])
    examples = examples_of_row({"text": f"Before, {run.upper()}: behind"}, "own:x", "x")
    assert bool(evaluation_items(examples, {"outside": Documents()}, SOURCE)) == found


def test_methods_read_a_set_as_they_read_a_task(tmp_path):
    training_set = one_set(tmp_path / "mine.jsonl", pairs(50))
    examples = training_examples({training_set.name: training_set}, SOURCE, rows=20)
    assert len(examples) == 20 and all(example.prompt.startswith("Q") for example in examples)


def test_examples_of_one_prompt_are_on_one_side(tmp_path):
    rows = [{"prompt": f"Q{n % 20}", "completion": f" A{n}"} for n in range(60)]
    training_set = one_set(tmp_path / "many.jsonl", rows)
    sides = [
        {example.prompt for example in training_set.examples(split, SOURCE)}
        for split in ("train", "validation")
    ]
    assert len(sides[1]) == 1 and not sides[0] & sides[1]
    tasks = {training_set.name: training_set}
    assert len(training_examples(tasks, SOURCE, rows=60)) == 57


def test_texts_without_a_prompt_are_no_evaluation_items_of_each_other(tmp_path):
    training_set = one_set(tmp_path / "texts.jsonl", [{"text": f"Text {n}"} for n in range(40)])
    assert len(training_examples({training_set.name: training_set}, SOURCE, rows=38)) == 38


def test_half_a_surrogate_pair_stops_nothing(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(f'{{"text": "\\ud800 {n}"}}\n' for n in range(3)))
    [training_set] = parse_training_sets([str(path)])
    assert len(training_set.digest) == 64 and len(list(training_set.examples("train", SOURCE))) == 2


def test_a_conversation_is_not_the_pair_that_reads_alike(tmp_path):
    talk = {"messages": TALK[1:3]}
    pair = {"prompt": "user: Hi", "completion": "Hello"}
    digests = {
        one_set(tmp_path / f"{name}.jsonl", [row, {"text": "x"}]).digest
        for name, row in (("talk", talk), ("pair", pair))
    }
    assert len(digests) == 2


def test_a_turn_of_the_user_that_is_scored_is_found():
    task = suites.load("gsm8k-mini")
    scored = next(iter(task.examples("test", SOURCE)))
    turns = [{"role": "user", "content": scored.prompt}, {"role": "assistant", "content": "7"}]
    examples = examples_of_row({"messages": turns}, "own:x", "x")
    assert evaluation_items(examples, {task.name: task}, SOURCE) == {0: task.name}


def test_runs_are_looked_for_in_every_task_that_does_not_say_it_is_generated():
    class Plugged(Documents):
        files = ()

    class Generated(Documents):
        files, generated = (), True

    run = " ".join(Documents.words[:15])
    examples = examples_of_row({"text": run}, "own:x", "x")
    assert evaluation_items(examples, {"a": Plugged()}, SOURCE) == {0: "a"}
    assert evaluation_items(examples, {"a": Generated()}, SOURCE) == {}


def test_fields_that_are_null_are_not_there():
    row = {"messages": None, "text": None, "prompt": "Q", "completion": " A", "answer": None}
    [example] = examples_of_row(row, "own:x", "x")
    assert (example.prompt, example.answer) == ("Q", "")


def test_what_one_set_holds_out_the_other_does_not_train(tmp_path):
    shared = pairs(40)
    first = one_set(tmp_path / "a.jsonl", shared)
    second = one_set(tmp_path / "b.jsonl", shared + pairs(40, 100))
    held_out = first.held_out_texts | second.held_out_texts
    sets = {
        data.name: replace(data, held_out_elsewhere=held_out - data.held_out_texts)
        for data in (first, second)
    }
    examples = training_examples(sets, SOURCE, rows=60)
    assert not {example.prompt for example in examples} & held_out
