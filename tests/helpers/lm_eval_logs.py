"""Sample logs in the form of lm-eval 0.4.13, made up; a slow test holds the form to lm-eval's."""

import hashlib
import json

DATE = "2026-11-27T10-00-00.000001"


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def line(number, value, *, metric="acc", filter_name="none", document="", prompt="", **changes):
    """Return one line of a log: an item under one filter."""
    document = document or f"document {number}"
    fields = {
        "doc_id": number,
        "doc": {"question": document},
        "target": "0",
        "arguments": {"gen_args_0": {"arg_0": prompt or document, "arg_1": " a"}},
        "resps": [[[str(-1.0 - value), "False"]], [[str(-2.0 + value), "False"]]],
        "filtered_resps": [[str(-1.0 - value), "False"], [str(-2.0 + value), "False"]],
        "filter": filter_name,
        "metrics": [metric],
        "doc_hash": digest(document),
        "prompt_hash": digest(prompt or document),
        "target_hash": digest("0"),
        metric: value,
    }
    return {**fields, **changes}


def lines_of(outcomes, **changes):
    """Return a line for each outcome, "1" or "0"."""
    return [line(number, float(mark), **changes) for number, mark in enumerate(outcomes)]


def write_log(folder, lines, *, task="letters", date=DATE):
    """Write a log as lm-eval names it; return the file."""
    path = folder / f"samples_{task}_{date}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in lines), encoding="utf-8")
    return path
