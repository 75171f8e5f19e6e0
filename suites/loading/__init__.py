"""Where tasks come from: lm-eval's definitions, users' YAML files, generators, answer extractors.

A task of ours builds lm-eval's task objects by `lm_eval` and grades by `numbers`; a generated task
makes its items by `generated`. `outside.LmEvalTask` is any task that lm-eval knows.
"""

__all__ = [
    "building",
    "definition",
    "generated",
    "gold",
    "grading",
    "inputs",
    "lm_eval",
    "numbers",
    "outside",
    "splits",
    "summary",
]
