"""Made-up items of the real tasks in the published layout, and an oracle that answers them."""

import gzip
import json
from pathlib import Path

import pytest

from harness.errors import HarnessError

REAL = ("gsm8k", "gsm8k-cot", "mmlu", "mmlu-cloze", "wikitext")
LOCAL = Path(__file__).parents[1] / "tasks"
SUBJECTS = ("anatomy", "marketing")


def gsm8k_rows(split, count):
    return [
        {
            "question": f"A {split} crate holds {n} figs and {n + 1} dates. How many fruits are "
            "that?",
            "answer": f"Fruits are {n}+{n + 1}=<<{n}+{n + 1}={2 * n + 1}>>{2 * n + 1} in all.\nSo "
            f"it’s {2 * n + 1}.\n#### {2 * n + 1}",
        }
        for n in range(1, count + 1)
    ]


def mmlu_rows(split, count):
    return [
        {
            "id": f"{subject}/{split}/{n}",
            "subject": subject,
            "question": f" Which {split} word of {subject} has number {n}?\n",
            "choices": [f"word {n} {letter}" for letter in "stuv"],
            "answer": "ABCD"[n % 4],
        }
        for subject in SUBJECTS
        for n in range(count)
    ]


PAGES = [
    " = Old Mill = \n The mill , built in 1 @,@ 250 , stood on a hill . \n"
    ' = = Owners = = \n It was owned by " the abbey " . \n',
    " = River Song = \n A song in 3 @.@ 5 parts . \n = = = Verse = = = \n x = 3 is sung twice . \n",
]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(
        gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode()
    )


class Oracle:
    """Answers every request rightly: the gold choice, the gold text, and one nat per word."""

    def __new__(cls, answers):
        from lm_eval.api.model import LM

        class Knowing(LM):
            def loglikelihood(self, requests):
                return [
                    (0.0 if request.args[1] in answers[request.doc["question"]] else -9.0, True)
                    for request in requests
                ]

            def loglikelihood_rolling(self, requests):
                return [-float(len(request.doc["page"].split())) for request in requests]

            def generate_until(self, requests):
                return [answers[request.doc["question"]] for request in requests]

        return Knowing()


def evaluated(tasks, answers):
    from lm_eval.evaluator import evaluate

    return evaluate(Oracle(answers), tasks, bootstrap_iters=0, log_samples=True)


def refused(call, *parts):
    with pytest.raises(HarnessError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def write_all(folder):
    """Write every data set in its published layout."""
    write_rows(folder / "gsm8k/train.jsonl.gz", gsm8k_rows("train", 40))
    write_rows(folder / "gsm8k/test.jsonl", gsm8k_rows("test", 12))
    for split, count in (("dev", 5), ("val", 3), ("test", 8)):
        write_rows(folder / f"mmlu/{split}.jsonl.gz", mmlu_rows(split, count))
    (folder / "wikitext2").mkdir()
    raw = "".join(PAGES).replace("\n", "\r\n").encode()
    (folder / "wikitext2/wiki.test.raw.gz").write_bytes(gzip.compress(raw))
