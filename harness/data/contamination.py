"""Finds evaluation text in text to train on, by equal questions and by shared runs of words."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from harness.contract import DataSource, Example, Task
from harness.data.examples import held_out_prompts


def overlapping_prompts(
    examples: Iterable[Example], tasks: Mapping[str, Task], source: DataSource, *, words: int = 13
) -> set[str]:
    """Return the prompts of examples that also stand in an evaluation split of their tasks.

    Found by equal text everywhere, by a shared run of `words` words only in data from outside: our
    generators share templates by design. The question alone is compared: shots stand before it in
    every prompt.
    """
    found: set[str] = set()
    for name, task in tasks.items():
        own = [example for example in examples if example.task == name]
        held_out = {_question(prompt) for prompt in held_out_prompts(task, source)}
        runs = (
            {run for text in held_out for run in _word_run_hashes(text, words)}
            if getattr(task, "files", ())
            else set()
        )
        for example in own:
            question = _question(example.asked)  # as the task has it, not in a chat template
            if question in held_out or (
                runs and not runs.isdisjoint(_word_run_hashes(question, words))
            ):
                found.add(example.prompt)
    return found


def contaminated_texts(
    texts: Sequence[str], tasks: Mapping[str, Task], source: DataSource, *, words: int = 13
) -> tuple[set[int], list[str]]:
    """Return the indices of free texts that share a run of `words` words with evaluation text, and
    the tasks compared with.

    Questions and whole documents of tasks read from outside: in generated ones n-grams mean
    nothing.
    """
    outside = {name: task for name, task in tasks.items() if getattr(task, "files", ())}
    runs = {
        run
        for task in outside.values()
        for text in _evaluation_texts(task, source)
        for run in _word_run_hashes(text, words)
    }
    found = {
        at
        for at, text in enumerate(texts)
        if runs and not runs.isdisjoint(_word_run_hashes(text, words))
    }
    return found, list(outside)


def evaluation_items(
    examples: Sequence[Example],
    tasks: Mapping[str, Task],
    source: DataSource,
    *,
    words: int = 13,
) -> dict[int, str]:
    """Return which examples of foreign data hold an item that is scored: index -> task.

    An example holds one where its prompt is an item's question, or where its text shares a run of
    `words` words with an item's question or document. Of tasks whose items are generated only equal
    questions count, because such items share their templates by design.
    """
    texts = [f"{example.prompt}\n{example.completion}" for example in examples]
    items: dict[int, str] = {}
    for name, task in tasks.items():
        with_runs, _ = contaminated_texts(texts, {name: task}, source, words=words)
        questions = {_question(prompt) for prompt in held_out_prompts(task, source)} - {""}
        for index, example in enumerate(examples):
            if index in with_runs or _question(example.prompt) in questions:
                items.setdefault(index, name)
    return items


def _evaluation_texts(task: Task, source: DataSource) -> Iterator[str]:
    """Yield a task's evaluation text: its questions, or the documents whose perplexity is
    measured.
    """
    if task.kind != "perplexity":
        yield from (_question(prompt) for prompt in held_out_prompts(task, source))
    elif hasattr(task, "texts"):
        yield from task.texts(source)
    else:
        for one in task.lm_eval_tasks(source).values():
            yield from (str(one.doc_to_target(doc)) for doc in one.eval_docs)


def _question(prompt: str) -> str:
    """Return a prompt's last paragraph, in lower case and single spaces: what is asked, without
    shots.
    """
    return " ".join(prompt.strip().rsplit("\n\n", 1)[-1].lower().split())


def _word_run_hashes(text: str, words: int) -> set[int]:
    """Return the hashes (this process's) of every run of so many words, in lower case and without
    what stands between them.
    """
    parts = re.findall(r"\w+", text.lower())
    return {hash(tuple(parts[at : at + words])) for at in range(len(parts) - words + 1)}
