"""Small tasks of every form that lm-eval's definitions take, as YAML and JSON lines in a folder."""

import json
import random
from pathlib import Path
from typing import Any

from _tokenizers import WORDS

ITEMS = 14  # of a task

_CODE = """
def halves(docs):
    return docs.filter(lambda doc: doc["number"] % 2 == 0)

def flipped(docs):
    return docs.select(list(reversed(range(len(docs)))))

def twice(docs):
    def doubled(rows):
        return {key: [value for value in values for _ in (0, 1)] for key, values in rows.items()}
    return docs.map(doubled, batched=True)

def which(doc):
    return doc["gold"]

def behind(doc):
    return doc["sentence"].split("_")[1].strip()

def contexts(doc):
    return [doc["sentence"].split("_")[0] + word for word in doc["options"]]

def near(doc, results):
    values = [value for value, _ in results]
    return {"acc": 1 / (1 + sum(value > values[doc["gold"]] for value in values))}

def shared_words(doc, results):
    written, wanted = set(results[0].split()), set(doc["answer"].split())
    f1 = 2 * len(written & wanted) / max(1, len(written) + len(wanted))
    return {"f1": f1, "misses": len(wanted - written)}
"""

_CHOOSE = """output_type: multiple_choice
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
_WRITE = """output_type: generate_until
doc_to_text: "Question: {{question}}?\\nAnswer:"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
_ENDS = """output_type: loglikelihood
doc_to_target: "{{' ' + answer}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
_OF_ALL = _CHOOSE.partition("metric_list")[0] + "metric_list:\n  - {metric: mcc}\n"
_TEXTS = {
    "question": '"Question: {{question}}?\\nAnswer:"',
    "lettered": '"{{question}}\\nA. {{options[0]}}\\nB. {{options[1]}}\\nAnswer:"',
}
_UNSPACED = 'target_delimiter: ""\ndoc_to_choice: "{{options}}"\n'
FORMS: dict[str, str] = {
    "letters": f'{_CHOOSE}doc_to_text: {_TEXTS["lettered"]}\ndoc_to_choice: ["A", "B", "C", "D"]\n',
    "cloze": f'{_CHOOSE}doc_to_text: {_TEXTS["question"]}\ndoc_to_choice: "{{{{options}}}}"\n',
    "unspaced": f'{_CHOOSE}doc_to_text: "{{{{question}}}}\\n- "\n{_UNSPACED}',
    "empty-context": f'{_CHOOSE}doc_to_text: ""\n{_UNSPACED}',
    "one-continuation": _CHOOSE.replace(
        "doc_to_target: gold", "doc_to_target: !function forms_code.behind"
    )
    + "doc_to_text: !function forms_code.which\ndoc_to_choice: !function forms_code.contexts\n",
    "uneven": f'{_CHOOSE}doc_to_text: {_TEXTS["question"]}\ndoc_to_choice: "{{{{uneven}}}}"\n',
    "shots": f"{_CHOOSE}doc_to_text: {_TEXTS['question']}\n"
    'doc_to_choice: "{{options}}"\nnum_fewshot: 2\nfewshot_split: train\n',
    "long": f'{_CHOOSE}doc_to_text: "{{{{page}}}}\\nQuestion: {{{{question}}}}?"\n'
    'doc_to_choice: "{{options}}"\n',
    "filtered": f"{_CHOOSE}process_docs: !function forms_code.halves\ndoc_to_text: "
    f"{_TEXTS['question']}\n"
    'doc_to_choice: "{{options}}"\n',
    "reordered": f"{_CHOOSE}process_docs: !function forms_code.flipped\n"
    f'doc_to_text: {_TEXTS["lettered"]}\ndoc_to_choice: ["A", "B"]\n',
    "expanded": f"{_CHOOSE}process_docs: !function forms_code.twice\ndoc_to_text: "
    f"{_TEXTS['question']}\n"
    'doc_to_choice: "{{options}}"\n',
    "stops": f'{_WRITE}generation_kwargs: {{until: ["\\n", " the", "?"], max_gen_toks: 10}}\n',
    "max-new-tokens": f"{_WRITE}generation_kwargs: "
    f"{{until: [], max_new_tokens: 5, do_sample: false, temperature: 0.0}}\n",
    "written-shots": f"{_WRITE}num_fewshot: 1\nfewshot_split: train\n"
    'generation_kwargs: {until: "\\n\\n", max_tokens: 6}\n',
    "fractional": f"{_CHOOSE}process_results: !function forms_code.near\ndoc_to_text: "
    f"{_TEXTS['question']}\n"
    'doc_to_choice: "{{options}}"\n',
    "written-fractional": _WRITE.replace("exact_match", "f1")
    + "process_results: !function forms_code.shared_words\n"
    'generation_kwargs: {until: ["\\n"], max_gen_toks: 8}\n',
    "lower-is-better": _WRITE.replace("exact_match", "misses").replace("true", "false")
    + "process_results: !function forms_code.shared_words\n"
    'generation_kwargs: {until: ["\\n"], max_gen_toks: 8}\n',
    "corpus": f'{_OF_ALL}doc_to_text: {_TEXTS["lettered"]}\ndoc_to_choice: ["A", "B"]\n',
    "ends": f'{_ENDS}doc_to_text: "{{{{page}}}}"\n',
    "ends-of-nothing": f'{_ENDS}doc_to_text: ""\n',
    "ends-shots": f'{_ENDS}doc_to_text: "{{{{question}}}}?"\nnum_fewshot: 2\n',
    "rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{page}}"\n'
    "metric_list:\n  - {metric: word_perplexity}\n",
}


GROUPS = {
    "group-by-size": ("true", ("letters", "filtered")),
    "group-of-equals": ("false", ("letters", "filtered")),
}


def document(number: int, split: str) -> dict[str, Any]:
    """Return a made-up document; some words are rare, so that bytes and unknown tokens are met."""
    draw = random.Random(f"{split}/{number}")

    def words(least: int, most: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randrange(least, most)))

    options = [
        words(1, 4) + rare
        for rare in draw.sample(["", " 42", " Ünal", " 日本", "x-ray", " 3.5", " ok"], 4)
    ]
    return {
        "number": number,
        "question": words(3, 12),
        "options": options,
        "gold": draw.randrange(2),
        "answer": words(1, 3),
        "uneven": options[: 2 + number % 3],
        "page": f"{words(20, 60)}. " * (1 + number % 5),
        "sentence": f"The {words(2, 5)} _ {words(1, 5)}.",
    }


def write_tasks(folder: Path) -> None:
    """Write every form as a task `form-NAME` with its data, and every group of them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "forms_code.py").write_text(_CODE, encoding="utf-8")
    for split, count in (("train", 12), ("test", ITEMS)):
        lines = (json.dumps(document(number, split), ensure_ascii=False) for number in range(count))
        (folder / f"forms_{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = "\n".join(
        f"    {split}: {(folder / f'forms_{split}.jsonl').resolve()}" for split in ("train", "test")
    )
    for form, body in FORMS.items():
        head = (
            f"task: form-{form}\ndataset_path: json\ndataset_kwargs:\n  "
            f"data_files:\n{files}\ntraining_split: train\ntest_split: test\n"
        )
        (folder / f"form_{form}.yaml").write_text(
            f"{head}{body}metadata: {{version: 1}}\n", encoding="utf-8"
        )
    for form, (by_size, members) in GROUPS.items():
        listed = "".join(f"  - form-{member}\n" for member in members)
        weights = (
            "aggregate_metric_list:\n  - "
            f"{{metric: acc, aggregation: mean, weight_by_size: {by_size}}}\n"
        )
        text = f"group: form-{form}\ntask:\n{listed}{weights}metadata: {{version: 1}}\n"
        (folder / f"form_{form}.yaml").write_text(text, encoding="utf-8")
