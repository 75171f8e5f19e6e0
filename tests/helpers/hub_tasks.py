"""Two tasks in YAML over data sets of the Hub, and a data folder that holds their rows."""

from task_data import write_rows

SCIENCE = """task: science
dataset_path: someone/science
dataset_name: Easy
output_type: multiple_choice
training_split: train
validation_split: validation
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
ENDINGS = """task: endings
dataset_path: someone/endings
output_type: loglikelihood
test_split: test
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
WORDS = ("apples", "pears", "coins", "books", "shells")


def science_rows(split, count):
    return [
        {
            "id": f"{split}-{number}",
            "question": f"Which {split} thing has number {number}?",
            "choices": {
                "text": [f"thing {number + place}" for place in range(4)],
                "label": list("ABCD"),
            },
            "answerKey": "ABCD"[number % 4],
        }
        for number in range(count)
    ]


def ending_rows(count):
    return [
        {"text": f"Tom has {number} {word} and Ann has {number + 1} {word}"}
        for number in range(count)
        for word in [WORDS[number % len(WORDS)]]
    ]


def write_tasks(folder):
    """Write the tasks' YAML; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "science.yaml").write_text(SCIENCE, encoding="utf-8")
    (folder / "endings.yaml").write_text(ENDINGS, encoding="utf-8")
    return folder


def write_hub(folder, *, splits=("test",)):
    """Write both data sets below hub/; return the data folder."""
    for split in splits:
        write_rows(
            folder / "hub" / "someone" / "science" / "Easy" / f"{split}.jsonl.gz",
            science_rows(split, 12),
        )
    write_rows(folder / "hub" / "someone" / "endings" / "default" / "test.jsonl", ending_rows(20))
    return folder
