"""Where tasks come from: lm-eval's definitions, users' YAML files, generators, answer extractors.

A task of ours builds lm-eval's task objects by `lm_eval` and grades by `numbers`; a generated task
makes its items by `generated`. `outside.LmEvalTask` is any task that lm-eval knows; `hub_folder`
finds its data set in the data folder, where `fetching` writes it.
"""

__all__ = [
    "building",
    "definition",
    "fetching",
    "generated",
    "gold",
    "grading",
    "hub_folder",
    "hub_splits",
    "inputs",
    "lm_eval",
    "numbers",
    "outside",
    "shots",
    "splits",
    "summary",
]
