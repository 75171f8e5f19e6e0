r"""`gsm8k-mini`: generated word problems of two to five steps, in GSM8K's exact answer form.

A test object for machines without GPU or network; it does not replace GSM8K. One item:

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
    """A word problem under construction: its sentences and solved steps so far."""

    def __init__(self, generator: random.Random) -> None:
        self.random = generator
        self.name, self.friend = generator.sample(_NAMES, 2)
        self.things = generator.choice(_THINGS)
        self.sentences: list[str] = []
        self.steps: list[str] = []
        self.value = 0  # the current number

    def tell(self, sentence: str) -> None:
        """Add a sentence to the question."""
        self.sentences.append(sentence)

    def step(self, words: str, a: int, sign: str, b: int, unit: str | None = None) -> None:
        """Write `words a sign b = result unit.` and make the result the current number."""
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
        expression = f"{a}{sign}{b}"
        self.steps.append(
            f"{words} {expression}=<<{expression}={result}>>{result} {unit or self.things}."
        )
        self.value = result


def _open_story(story: _Problem) -> None:
    """Begin the story: a plain amount (no step), equal groups, or two amounts (one step)."""
    pick = story.random.random()
    if pick < 0.4:
        story.value = story.random.randint(2, 15)
        story.tell(f"{story.name} has {story.value} {story.things}.")
    elif pick < 0.7:
        groups, per_box, boxes = (
            story.random.randint(2, 6),
            story.random.randint(2, 6),
            story.random.choice(_BOXES),
        )
        story.tell(f"{story.name} has {groups} {boxes} with {per_box} {story.things} in each.")
        story.step("There are", groups, "*", per_box)
    else:
        first, second = story.random.randint(2, 12), story.random.randint(2, 12)
        day, later = story.random.sample(_DAYS, 2)
        story.tell(f"{story.name} finds {first} {story.things} on {day} and {second} on {later}.")
        story.step(f"{story.name} finds", first, "+", second)


def _add_event(story: _Problem) -> bool:
    """Add one drawn event of one or two steps; False where it does not fit the current number."""
    event = story.random.randrange(6)
    if event == 0:
        count = story.random.randint(2, 9)
        if story.value + count > LARGEST:
            return False
        story.tell(
            story.random.choice(
                (
                    f"{story.name} buys {count} more {story.things}.",
                    f"{story.friend} gives {story.name} {count} more {story.things}.",
                )
            )
        )
        story.step("Then", story.value, "+", count)
    elif event == 1:
        if story.value < 4:
            return False
        less = story.random.randint(2, min(9, story.value - 1))
        story.tell(
            story.random.choice(
                (
                    f"{story.name} gives {less} {story.things} to {story.friend}.",
                    f"{story.name} loses {less} of the {story.things}.",
                )
            )
        )
        story.step("Then", story.value, "-", less)
    elif event == 2:
        factor = story.random.choice((2, 3))
        if story.value * factor > LARGEST:
            return False
        story.tell(f"Then the number of {story.things} grows to {_TIMES[factor]} as many.")
        story.step("It grows to", story.value, "*", factor)
    elif event == 3:
        if story.value % 2 or story.value < 4:
            return False
        story.tell(f"{story.name} sells half of the {story.things}.")
        story.step("Half is", story.value, "/", 2)
    elif event == 4:
        bags, per_bag = story.random.randint(2, 4), story.random.randint(2, 6)
        if story.value + bags * per_bag > LARGEST or len(story.steps) > 3:
            return False
        before = story.value
        story.tell(f"{story.name} gets {bags} bags of {per_bag} {story.things}.")
        story.step("The bags hold", bags, "*", per_bag)
        story.step("Then", before, "+", story.value)
    else:
        days, per_day = story.random.randint(2, 5), story.random.randint(2, 4)
        if story.value <= days * per_day or len(story.steps) > 3:
            return False
        before = story.value
        story.tell(f"{story.name} uses {per_day} {story.things} a day for {days} days.")
        story.step(f"{story.name} uses", per_day, "*", days)
        story.step("Then", before, "-", story.value)
    return True


def _add_question(story: _Problem) -> bool:
    """Add a drawn question of zero, one or two steps; False where it does not fit."""
    question = story.random.randrange(5)
    if question == 0:
        story.tell(f"How many {story.things} does {story.name} have now?")
    elif question == 1:
        price = story.random.randint(2, 6)
        if story.value * price > LARGEST:
            return False
        story.tell(f"Each of them costs {price} dollars. How many dollars are they worth?")
        story.step("They are worth", story.value, "*", price, "dollars")
    elif question == 2:
        friends = story.random.choice(
            [k for k in range(2, 10) if story.value % k == 0 and story.value // k > 0] or [0]
        )
        if not friends:
            return False
        story.tell(
            f"They are shared by {friends} friends. How many {story.things} does each friend get?"
        )
        story.step("Each gets", story.value, "/", friends)
    elif question == 3:
        goal = story.value + story.random.randint(2, 9)
        if goal > LARGEST:
            return False
        story.tell(
            f"{story.name} wants {goal} {story.things}. How many more does {story.name} need?"
        )
        story.step(f"{story.name} needs", goal, "-", story.value)
    else:
        factor, before = story.random.choice((2, 3)), story.value
        if before * (factor + 1) > LARGEST:
            return False
        story.tell(
            f"{story.friend} has {_TIMES[factor]} as many {story.things}. "
            "How many do they have together?"
        )
        story.step(f"{story.friend} has", before, "*", factor)
        story.step("Together", before, "+", story.value)
    return True


def _generate_item(stream: random.Random) -> Item:
    """Draw a number of steps, then problems until one has exactly so many."""
    steps = stream.choice(STEPS)
    while True:
        problem = _Problem(stream)
        _open_story(problem)
        for _ in range(stream.randint(0, 4)):
            _add_event(problem)
        if problem.value <= LARGEST and _add_question(problem) and len(problem.steps) == steps:
            answer = "\n".join([*problem.steps, f"#### {problem.value}"])
            return {"question": " ".join(problem.sentences), "answer": answer, "steps": steps}


def generated_items(split: str) -> Iterator[Item]:
    """Yield `{question, answer, steps}` of a split, in its fixed order."""
    return generate_split(
        split,
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
    generated = True

    def lm_eval_tasks(self, source: DataSource) -> dict[str, Any]:
        """Return lm-eval's gsm8k under our name, over the generated test split.

        Gold answers keep their calculator marks, as in GSM8K.
        """
        base = read_builtin("gsm8k/gsm8k.yaml")
        task = build_task_over_rows(
            base,
            rows=generated_items,
            splits=("test",),
            task=self.name,
            training_split=None,
            fewshot_split=None,
            num_fewshot=0,
            generation_kwargs=base["generation_kwargs"] | {"max_gen_toks": 128},
        )
        return {self.name: task}

    def examples(self, split: Split, source: DataSource) -> Iterator[Example]:
        """Yield prompts exactly as the scorer shows them, with the solution and the bare answer."""
        for item in generated_items(split):
            solution = without_marks(item["answer"])
            gold = final_number(item["answer"])
            yield Example(
                task=self.name,
                prompt=f"Question: {item['question']}\nAnswer:",
                completion=f" {solution}",
                answer=f" #### {gold}",
                gold=gold,
                ending=f"#### {gold}",
            )

    def grade(self, gold: str, text: str) -> tuple[Grade, ...]:
        """Grade by `#### N` (strict), the last number (flexible) and numeric equality."""
        # imported here, so that students do not depend on it (harness/planning/keys.py)
        from suites.loading.numbers import grade_number

        return grade_number(gold, text)
