"""Where tasks come from: lm-eval's definitions, YAML files of the user's, generators, and
extractors of answers.

A task builds lm-eval's own task objects by `lm_eval`, grades by `numbers`, and is made by
`generated` where it is no benchmark from outside; `outside.OutsideTask` is any task that lm-eval
knows.
"""

__all__ = [
    "definition",
    "generated",
    "gold",
    "inputs",
    "lm_eval",
    "numbers",
    "outside",
    "statement",
]
