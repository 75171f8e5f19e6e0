"""Finds evaluation text in text to train on, by equal questions and by shared runs of words."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from harness.contract import DataSource, Example, Task
from harness.data.examples import held_out_prompts


class Contamination(NamedTuple):
    """Which free texts share words with evaluation text."""

    indices: set[int]  # of the texts
    tasks: list[str]  # that they were compared with


def overlapping_prompts(
    examples: Iterable[Example], tasks: Mapping[str, Task], source: DataSource, *, words: int = 13
) -> set[str]:
    """Return the prompts of examples that are also in an evaluation split of their tasks.

    Equal questions are found in all tasks, a shared run of `words` words only in data from outside:
    our generators share templates by design. Only the question is compared, since shots stand
    before it in every prompt.
    """
    prompts: set[str] = set()
    for name, task in tasks.items():
        if hasattr(task, "evaluated"):  # data of the user's own, which was checked when it was read
            continue
        task_examples = [example for example in examples if example.task == name]
        held_out_questions = {_question(prompt) for prompt in held_out_prompts(task, source)}
        from_outside = bool(getattr(task, "files", ()))
        held_out_runs = _runs_in(held_out_questions, words) if from_outside else set()
        for example in task_examples:
            question = _question(example.asked)  # as the task has it, not in a chat template
            if question in held_out_questions or _shares_run(question, held_out_runs, words):
                prompts.add(example.prompt)
    return prompts


def contaminated_texts(
    texts: Sequence[str], tasks: Mapping[str, Task], source: DataSource, *, words: int = 13
) -> Contamination:
    """Return which free texts share a run of `words` words with evaluation text of tasks.

    Compared are questions and documents of tasks that are read from outside; in generated ones
    shared runs of words mean nothing.
    """
    outside_tasks = {name: task for name, task in tasks.items() if getattr(task, "files", ())}
    evaluated = (
        text for task in outside_tasks.values() for text in _evaluation_texts(task, source)
    )
    runs = _runs_in(evaluated, words)
    indices = {index for index, text in enumerate(texts) if _shares_run(text, runs, words)}
    return Contamination(indices, list(outside_tasks))


def evaluation_items(
    examples: Sequence[Example],
    tasks: Mapping[str, Task],
    source: DataSource,
    *,
    words: int = 13,
) -> dict[int, str]:
    """Return which examples of foreign data hold an item that is scored: index -> task.

    An example holds one where its prompt, or a turn of the user, is an item's question, or where
    its text shares a run of `words` words with an item's question or document. Of tasks that say
    that their items are `generated` only equal questions count: they share their templates.
    """
    texts = [f"{example.prompt}\n{example.completion}" for example in examples]
    questions_by_example = [
        set(map(_question, _questions_asked(example))) - {""} for example in examples
    ]
    items: dict[int, str] = {}
    for name, task in tasks.items():
        generated = getattr(task, "generated", False)
        evaluated = () if generated else _evaluation_texts(task, source)
        runs = _runs_in(evaluated, words)
        questions = {_question(prompt) for prompt in held_out_prompts(task, source)}
        for index, text in enumerate(texts):
            if not questions.isdisjoint(questions_by_example[index]) or _shares_run(
                text, runs, words
            ):
                items.setdefault(index, name)
    return items


def _questions_asked(example: Example) -> list[str]:
    """Return what an example asks: its prompt, or each turn of the user."""
    if not example.conversation:
        return [example.prompt]
    return [content for role, content in example.conversation if role == "user"]


def _evaluation_texts(task: Task, source: DataSource) -> Iterator[str]:
    """Yield a task's evaluation texts: questions, or documents where it measures perplexity."""
    if task.kind != "perplexity":
        yield from (_question(prompt) for prompt in held_out_prompts(task, source))
    else:
        yield from documents_of(task, source)


def documents_of(task: Task, source: DataSource) -> Iterator[str]:
    """Yield the documents of a task that measures perplexity, in the order of its items."""
    if hasattr(task, "texts"):
        yield from task.texts(source)
    else:
        for lm_eval_task in task.lm_eval_tasks(source).values():
            yield from (str(lm_eval_task.doc_to_target(doc)) for doc in lm_eval_task.eval_docs)


def _question(prompt: str) -> str:
    """Return a prompt's last paragraph, which is the question, in lower case and single spaces."""
    return " ".join(prompt.strip().rsplit("\n\n", 1)[-1].lower().split())


def _runs_in(texts: Iterable[str], words: int) -> set[int]:
    """Return the hashes of all runs of so many words in several texts."""
    return {run for text in texts for run in _word_run_hashes(text, words)}


def _shares_run(text: str, runs: set[int], words: int) -> bool:
    """Tell whether a text holds one of these runs of words."""
    return bool(runs) and not runs.isdisjoint(_word_run_hashes(text, words))


def _word_run_hashes(text: str, words: int) -> set[int]:
    """Return the hashes of all runs of so many words, in lower case and without punctuation.

    Hashes are this process's own.
    """
    parts = re.findall(r"\w+", text.lower())
    return {hash(tuple(parts[start : start + words])) for start in range(len(parts) - words + 1)}
