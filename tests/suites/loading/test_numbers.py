"""Numbers as answers write them, and graders that agree with lm-eval's filters."""

import pytest

import suites
from suites.loading import numbers
from suites.loading.lm_eval import read_builtin

TEXTS = [
    "#### 18",
    "The answer is 18.",
    "The answer is $18.",
    "**18**",
    "$18.00",
    "18...",
    r"\boxed{18}",
    "17.5 which rounds to 18",
    "#### 1,800",
    "",
    "#### 18 .. verified in 2 ways",
    "#### -18",
    "#### 18.",
    "a 1 b 22 c 3",
    "-$5,000.50",
    "####18",
    "#### 18\n\nQuestion",
    "The answer is 18",
    "The answer is 18, so The answer is 19.",
    "The answer is 180",
    "The answer is -18.\n",
]


@pytest.mark.parametrize(
    ("name", "stated"),
    [("gsm8k", numbers.HASHES), ("gsm8k-cot", numbers.SENTENCE), ("gsm8k-mini", numbers.HASHES)],
)
def test_our_graders_agree_with_lm_evals_filters(name, stated, source):
    from lm_eval.api.instance import Instance

    (task,) = suites.load(name).lm_eval_tasks(source).values()
    doc = {"question": "?", "answer": "#### 18", "steps": 2}
    instances = [
        Instance(
            request_type="generate_until",
            doc=doc,
            arguments=("", {}),
            idx=0,
            metadata=("t", i, 1),
            resps=[text],
        )
        for i, text in enumerate(TEXTS)
    ]
    task._instances = instances
    task.apply_filters()
    assert (
        stated.pattern
        == read_builtin(f"gsm8k/{name.removesuffix('-mini')}.yaml")["filter_list"][0]["filter"][0][
            "regex_pattern"
        ]
    )
    for text, instance in zip(TEXTS, instances, strict=True):
        grades = suites.load(name).grade("18", text)
        assert [grade.extractor for grade in grades] == [
            "strict-match",
            "flexible-extract",
            "numeric",
        ]
        for grade in grades[:2]:
            filtered = instance.filtered_resps[grade.extractor]
            assert (filtered, bool(task.process_results(doc, [filtered])["exact_match"])) == (
                grade.extracted or "[invalid]",
                grade.correct,
            )


@pytest.mark.parametrize(
    ("text", "number", "equal"),
    [
        ("-$5", "-5", "-5"),
        ("$-5", "-5", "-5"),
        (".5", ".5", "0.5"),
        ("\u22125", "-5", "-5.0"),
        ("1/2", "1/2", ".5"),
        ("50/2=25", "25", "25"),
        ("#### -$5,000.50", "-5,000.50", "-5000.5"),
        (r"\boxed{-.5}", "-.5", "-1/2"),
        ("The answer is \u22123/4.", "-3/4", "-0.75"),
        ("on 12/25/2020", "2020", "2020"),
        ("1/0", "0", "0"),
        ("\u20ac 7", "7", "7"),
        ("18...", "18", "18.00"),
        ("3 - 2 = 1", "1", "1"),
    ],
)
def test_numbers_are_read_as_they_are_written(text, number, equal):
    assert numbers.stated_number(text) == number
    assert (
        numbers.grade_number(equal, text)[2].correct
        and not numbers.grade_number("77", text)[2].correct
    )
    assert not numbers.grade_number(equal, "no number")[2].correct
