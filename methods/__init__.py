"""Methods, as a literal table: a row's name and the class that makes its student. Importing this imports no method.

A new method is one file in this folder and one line here (docs/add-a-method.md). Files with an underscore are
machinery; every other file carries at least one name of the table.
"""

METHODS: dict[str, str] = {
    "identity": "methods.identity:Identity",
    "untouched": "methods.untouched:Untouched",
    "sft": "methods.sft:SupervisedFineTuning",
    "answer-only": "methods.answer_only:AnswerOnly",
    "response": "methods.response:ResponseDistillation",
    "cot": "methods.cot:ChainOfThought",
}
