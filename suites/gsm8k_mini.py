r"""`gsm8k-mini`: generated word problems of two to five steps, in GSM8K's exact answer form.

A laboratory animal for machines without GPU or network, not a stand-in for GSM8K. One item:

    Question: Lena has 3 boxes with 4 pens in each. Lena buys 5 more pens. How many pens does Lena
    have now? Answer: There are 3*4=12 pens. Then 12+5=17 pens. #### 17

Gold answers carry GSM8K's calculator marks (`3*4=<<3*4=12>>12`); training texts and traces do not.
Every intermediate result is an integer from 1 to 40. Version 1 is frozen: any change to a generated
character is version 2 (`tests/contracts/test_suites.py` holds the digest).
"""

import random
from collections.abc import Iterator
from typing import Any

from harness.contract import DataSource, Example, Grade, Split
from suites.loading.generated import Item, generate_split
from suites.loading.gold import final_number, without_marks
from suites.loading.lm_eval import build_task_over_rows, read_builtin

VERSION = 1
SIZES = {"train": 50_000, "validation": 500, "test": 1_000, "dev": 8}
STEPS = (2, 3, 4, 5)
LARGEST = 40  # two digits: long addition is not what this task is about

_NAMES = [
    "Lena",
    "Omar",
    "Ravi",
    "Mia",
    "Tom",
    "Sara",
    "Ben",
    "Ines",
    "Leo",
    "Nora",
    "Sam",
    "Ada",
    "Ivan",
    "Rosa",
    "Max",
    "Yuki",
    "Finn",
    "Eva",
    "Hugo",
    "Zoe",
]
_THINGS = [
    "apples",
    "pens",
    "books",
    "coins",
    "cards",
    "shells",
    "stamps",
    "beads",
    "marbles",
    "cookies",
    "eggs",
    "balls",
    "toys",
    "plums",
    "nuts",
]
_BOXES = ["boxes", "bags", "jars", "trays", "shelves", "baskets"]
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_TIMES = {2: "twice", 3: "3 times", 4: "4 times", 5: "5 times"}


class _Problem:
    """A word problem under construction: sentences told so far, steps solved so far, current
    number.
    """

    def __init__(self, stream: random.Random) -> None:
        self.random = stream
        self.name, self.friend = stream.sample(_NAMES, 2)
        self.things = stream.choice(_THINGS)
        self.sentences: list[str] = []
        self.steps: list[str] = []
        self.value = 0

    def tell(self, sentence: str) -> None:
        self.sentences.append(sentence)

    def step(self, words: str, left: int, sign: str, right: int, unit: str | None = None) -> None:
        """Write `words left sign right = result unit.` and make the result the current number."""
        result = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[sign]
        expression = f"{left}{sign}{right}"
        self.steps.append(
            f"{words} {expression}=<<{expression}={result}>>{result} {unit or self.things}."
        )
        self.value = result


def _open_story(p: _Problem) -> None:
    """Open the story: a plain amount (no step), equal groups, or two amounts (one step)."""
    pick = p.random.random()
    if pick < 0.4:
        p.value = p.random.randint(2, 15)
        p.tell(f"{p.name} has {p.value} {p.things}.")
    elif pick < 0.7:
        groups, each, boxes = (
            p.random.randint(2, 6),
            p.random.randint(2, 6),
            p.random.choice(_BOXES),
        )
        p.tell(f"{p.name} has {groups} {boxes} with {each} {p.things} in each.")
        p.step("There are", groups, "*", each)
    else:
        first, second = p.random.randint(2, 12), p.random.randint(2, 12)
        day, later = p.random.sample(_DAYS, 2)
        p.tell(f"{p.name} finds {first} {p.things} on {day} and {second} on {later}.")
        p.step(f"{p.name} finds", first, "+", second)


def _add_event(p: _Problem) -> bool:
    """Add one event of one step; False when the drawn event does not fit the current number."""
    event = p.random.randrange(6)
    if event == 0:
        more = p.random.randint(2, 9)
        if p.value + more > LARGEST:
            return False
        p.tell(
            p.random.choice(
                (
                    f"{p.name} buys {more} more {p.things}.",
                    f"{p.friend} gives {p.name} {more} more {p.things}.",
                )
            )
        )
        p.step("Then", p.value, "+", more)
    elif event == 1:
        if p.value < 4:
            return False
        less = p.random.randint(2, min(9, p.value - 1))
        p.tell(
            p.random.choice(
                (
                    f"{p.name} gives {less} {p.things} to {p.friend}.",
                    f"{p.name} loses {less} of the {p.things}.",
                )
            )
        )
        p.step("Then", p.value, "-", less)
    elif event == 2:
        factor = p.random.choice((2, 3))
        if p.value * factor > LARGEST:
            return False
        p.tell(f"Then the number of {p.things} grows to {_TIMES[factor]} as many.")
        p.step("It grows to", p.value, "*", factor)
    elif event == 3:
        if p.value % 2 or p.value < 4:
            return False
        p.tell(f"{p.name} sells half of the {p.things}.")
        p.step("Half is", p.value, "/", 2)
    elif event == 4:
        bags, each = p.random.randint(2, 4), p.random.randint(2, 6)
        if p.value + bags * each > LARGEST or len(p.steps) > 3:
            return False
        had = p.value
        p.tell(f"{p.name} gets {bags} bags of {each} {p.things}.")
        p.step("The bags hold", bags, "*", each)
        p.step("Then", had, "+", p.value)
    else:
        days, each = p.random.randint(2, 5), p.random.randint(2, 4)
        if p.value <= days * each or len(p.steps) > 3:
            return False
        had = p.value
        p.tell(f"{p.name} uses {each} {p.things} a day for {days} days.")
        p.step(f"{p.name} uses", each, "*", days)
        p.step("Then", had, "-", p.value)
    return True


def _add_question(p: _Problem) -> bool:
    """Close with a question of zero, one or two steps; False when the drawn one does not fit."""
    question = p.random.randrange(5)
    if question == 0:
        p.tell(f"How many {p.things} does {p.name} have now?")
    elif question == 1:
        price = p.random.randint(2, 6)
        if p.value * price > LARGEST:
            return False
        p.tell(f"Each of them costs {price} dollars. How many dollars are they worth?")
        p.step("They are worth", p.value, "*", price, "dollars")
    elif question == 2:
        friends = p.random.choice(
            [k for k in range(2, 10) if p.value % k == 0 and p.value // k > 0] or [0]
        )
        if not friends:
            return False
        p.tell(f"They are shared by {friends} friends. How many {p.things} does each friend get?")
        p.step("Each gets", p.value, "/", friends)
    elif question == 3:
        goal = p.value + p.random.randint(2, 9)
        if goal > LARGEST:
            return False
        p.tell(f"{p.name} wants {goal} {p.things}. How many more does {p.name} need?")
        p.step(f"{p.name} needs", goal, "-", p.value)
    else:
        factor, had = p.random.choice((2, 3)), p.value
        if had * (factor + 1) > LARGEST:
            return False
        p.tell(
            f"{p.friend} has {_TIMES[factor]} as many {p.things}. How many do they have together?"
        )
        p.step(f"{p.friend} has", had, "*", factor)
        p.step("Together", had, "+", p.value)
    return True


def _generate_item(stream: random.Random) -> Item:
    """Draw problems until one has exactly the drawn number of steps."""
    wanted = stream.choice(STEPS)
    while True:
        problem = _Problem(stream)
        _open_story(problem)
        for _ in range(stream.randint(0, 4)):
            _add_event(problem)
        if problem.value <= LARGEST and _add_question(problem) and len(problem.steps) == wanted:
            answer = "\n".join([*problem.steps, f"#### {problem.value}"])
            return {"question": " ".join(problem.sentences), "answer": answer, "steps": wanted}


def generated_items(split_name: str) -> Iterator[Item]:
    """Yield `{question, answer, steps}` of a split in its fixed order."""
    return generate_split(
        split_name,
        generate=_generate_item,
        identity=lambda item: str(item["question"]),
        sizes=SIZES,
        seed=f"gsm8k-mini/{VERSION}",
    )


class Gsm8kMini:
    """Generated grade-school word problems, 2 to 5 steps, GSM8K's answer form; 0-shot, greedy."""

    name = "gsm8k-mini"
    # ours; on lm-eval's gsm8k version 3, without shots, 128 new tokens at most
    version = f"{VERSION}+gsm8k3+0shot+128"
    kind = "generate"
    chance = 0.0
    primary = "strict-match"
    domain = "math"

    def lm_eval_tasks(self, source: DataSource) -> dict[str, Any]:
        """Return lm-eval's gsm8k, under our name, over the generated test split (marks kept in the
        gold, as upstream).
        """
        base = read_builtin("gsm8k/gsm8k.yaml")
        built = build_task_over_rows(
            base,
            rows=generated_items,
            splits=("test",),
            task=self.name,
            training_split=None,
            fewshot_split=None,
            num_fewshot=0,
            generation_kwargs=base["generation_kwargs"] | {"max_gen_toks": 128},
        )
        return {self.name: built}

    def examples(self, split_name: Split, source: DataSource) -> Iterator[Example]:
        """Yield prompts exactly as the scorer shows them, with the worked and the bare answer."""
        for item in generated_items(split_name):
            worked = without_marks(item["answer"])
            gold = final_number(item["answer"])
            yield Example(
                task=self.name,
                prompt=f"Question: {item['question']}\nAnswer:",
                completion=f" {worked}",
                answer=f" #### {gold}",
                gold=gold,
                ending=f"#### {gold}",
            )

    def grade(self, gold: str, text: str) -> tuple[Grade, ...]:
        """Grade by `#### N` (strict), the last number (flexible) and numeric equality, as lm-eval
        and we do.
        """
        # here: students do not depend on it (harness/planning/keys.py)
        from suites.loading.numbers import grade_number

        return grade_number(gold, text)
