"""Methods, as a literal table: a row's name and the class that makes its student. Importing this imports no method.

A new method is one file in this folder and one line here (docs/add-a-method.md). Files with an underscore are
machinery; every other file carries at least one name of the table.
"""

METHODS: dict[str, str] = {
    "identity": "methods.identity:Identity",
    "untouched": "methods.untouched:Untouched",
    "sft": "methods.sft:SupervisedFineTuning",
    "answer-only": "methods.answer_only:AnswerOnly",
    "cot-human": "methods.sft:SupervisedFineTuning",  # another name of sft: gold rationales are what it trains on
    "response": "methods.response:ResponseDistillation",
    "feature": "methods.feature:FeatureDistillation",
    "attention": "methods.attention:AttentionDistillation",
    "cot": "methods.cot:ChainOfThought",
    "cot-unfiltered": "methods.cot:UnfilteredChainOfThought",
    "selective": "methods.selective:SelectiveDistillation",
    "selective-random": "methods.selective:RandomSelection",
    "multi-teacher": "methods.multi_teacher:MultiTeacher",
    "best-single-teacher": "methods.multi_teacher:BestSingleTeacher",
    "on-policy": "methods.on_policy:OnPolicyDistillation",
    "uld": "methods.uld:UniversalLogitDistillation",
}
