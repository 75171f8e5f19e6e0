r"""`mmlu-mini`: generated four-choice questions in MMLU's exact form, on facts in the weights.

A test object for machines without GPU or network; it does not replace MMLU. One item, as lm-eval's
own MMLU template prints it, but answered by the choice's text:

    The following are multiple choice questions (with answers) about geography.

    What is the capital of Peru?
    A. Rome
    B. Lima
    C. Cairo
    D. Oslo
    Answer: Lima

The likeliest of the four texts is the answer, not of the four letters: models of this size stay at
chance on letters (measured in docs/design.md), as small models do on MMLU itself (OLMES, arXiv
2406.08446). Splits share facts, because nobody can know a fact that training never showed. They
share no item: the same question with the same four choices, in any order, is in one split only.
Version 1 is frozen.
"""

import random
from collections.abc import Iterator
from typing import Any

from harness.contract import DataSource, Example, Grade, Split
from suites.loading.generated import Item, generate_split
from suites.loading.lm_eval import build_task_over_rows, read_builtin

VERSION = 1
SIZES = {"train": 50_000, "validation": 500, "test": 1_000, "dev": 50}
LETTERS = "ABCD"
_DESCRIPTION = "The following are multiple choice questions (with answers) about {}.\n\n"


def _pairs(text: str) -> dict[str, str]:
    """Read pairs of words, `France:Paris Italy:Rome`."""
    return dict(pair.split(":") for pair in text.split())


# subject -> (question forms, {what a question asks about: answer}); the answers of a subject are
# distinct, and so are its wrong choices.
FACTS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "geography": (
        ("What is the capital of {}?", "Which city is the capital of {}?"),
        _pairs(
            "France:Paris Italy:Rome Japan:Tokyo Egypt:Cairo Peru:Lima Cuba:Havana Norway:Oslo "
            "Greece:Athens "
            "Russia:Moscow China:Beijing Kenya:Nairobi Spain:Madrid Poland:Warsaw Ireland:Dublin"
        ),
    ),
    "chemistry": (
        ("What is the chemical symbol of {}?", "Which symbol stands for {}?"),
        _pairs(
            "hydrogen:H helium:He carbon:C oxygen:O sodium:Na iron:Fe copper:Cu silver:Ag gold:Au "
            "lead:Pb "
            "mercury:Hg tin:Sn potassium:K neon:Ne"
        ),
    ),
    "biology": (
        ("What is a young {} called?", "What is the name for a young {}?"),
        _pairs(
            "cat:kitten dog:puppy cow:calf horse:foal sheep:lamb goat:kid pig:piglet bear:cub "
            "duck:duckling "
            "goose:gosling swan:cygnet deer:fawn frog:tadpole hen:chick"
        ),
    ),
    "french": (
        ("What does the French word {} mean?", "Translate {} from French."),
        _pairs(
            "chien:dog maison:house eau:water livre:book pain:bread soleil:sun lune:moon "
            "arbre:tree fleur:flower "
            "rouge:red noir:black main:hand porte:door lait:milk"
        ),
    ),
    "literature": (
        ("Who wrote {}?", "Which author wrote {}?"),
        _pairs(
            "Hamlet:Shakespeare Faust:Goethe Emma:Austen Dracula:Stoker Ulysses:Joyce "
            "Candide:Voltaire "
            "Inferno:Dante Walden:Thoreau Middlemarch:Eliot Nostromo:Conrad Kim:Kipling "
            "Siddhartha:Hesse"
        ),
    ),
    "economics": (
        ("What is the currency of {}?", "With which currency does one pay in {}?"),
        _pairs(
            "Japan:yen India:rupee Brazil:real China:yuan Poland:zloty Turkey:lira Thailand:baht "
            "Vietnam:dong "
            "Korea:won Russia:ruble Denmark:krone Israel:shekel Mexico:peso Hungary:forint"
        ),
    ),
    "physics": (
        ("What is the unit of {}?", "In which unit does one measure {}?"),
        _pairs(
            "force:newton energy:joule power:watt pressure:pascal current:ampere voltage:volt "
            "resistance:ohm "
            "frequency:hertz temperature:kelvin mass:kilogram length:meter time:second "
            "charge:coulomb"
        ),
    ),
    "language": (
        ("What is the opposite of {}?", "Which word means the opposite of {}?"),
        _pairs(
            "hot:cold big:small fast:slow high:low early:late rich:poor hard:soft open:closed "
            "full:empty "
            "old:new strong:weak dark:light wet:dry loud:quiet"
        ),
    ),
    "mathematics": (
        (
            "Which number is written {} in Roman numerals?",
            "What is the value of the Roman numeral {}?",
        ),
        _pairs(
            "III:three IV:four VI:six VII:seven IX:nine XI:eleven XII:twelve XV:fifteen XX:twenty "
            "XL:forty L:fifty LX:sixty "
            "XC:ninety C:hundred"
        ),
    ),
    "sports": (
        ("In which sport does one use a {}?", "A {} belongs to which sport?"),
        _pairs(
            "racket:tennis puck:hockey bat:baseball saddle:riding oar:rowing foil:fencing "
            "shuttlecock:badminton "
            "glove:boxing hoop:basketball surfboard:surfing ski:skiing arrow:archery putter:golf "
            "cue:billiards"
        ),
    ),
}
SUBJECTS = tuple(FACTS)


def _generate_item(stream: random.Random) -> Item:
    """Draw a subject, a fact, and three wrong choices from the other facts of the subject."""
    subject = stream.choice(SUBJECTS)
    forms, facts = FACTS[subject]
    term, gold = stream.choice(list(facts.items()))
    choices = [gold, *stream.sample([answer for answer in facts.values() if answer != gold], 3)]
    stream.shuffle(choices)
    return {
        "subject": subject,
        "question": stream.choice(forms).format(term),
        "choices": choices,
        "answer": choices.index(gold),
    }


def _identity(item: Item) -> str:
    """Return the question with its choices in alphabetical order."""
    return "\n".join([item["question"], *sorted(item["choices"])])


def generated_items(split: str) -> Iterator[Item]:
    """Yield `{subject, question, choices, answer}` of a split, in its fixed order.

    The answer is its position, 0 to 3.
    """
    return generate_split(
        split,
        generate=_generate_item,
        identity=_identity,
        sizes=SIZES,
        seed=f"mmlu-mini/{VERSION}",
    )


class MmluMini:
    """Generated four-choice questions on ten subjects; 0-shot, by each choice's log-probability."""

    name = "mmlu-mini"
    # lm-eval's mmlu version 1, no shots, choices scored by their text
    version = f"{VERSION}+mmlu1+0shot+text"
    kind = "choose"
    chance = 0.25
    primary = "acc"
    domain = "knowledge"
    generated = True

    def lm_eval_tasks(self, source: DataSource) -> dict[str, Any]:
        """Return lm-eval's MMLU template under our name, over the generated test split.

        Each prompt names the subject.
        """
        task = build_task_over_rows(
            read_builtin("mmlu/default/_default_template_yaml"),
            rows=generated_items,
            splits=("test",),
            task=self.name,
            description=_DESCRIPTION.format("{{subject}}"),
            fewshot_split=None,
            fewshot_config=None,
            doc_to_choice="{{choices}}",
            num_fewshot=0,
        )
        return {self.name: task}

    def examples(self, split: Split, source: DataSource) -> Iterator[Example]:
        """Yield prompts exactly as the scorer shows them; completion and answer are equal."""
        for item in generated_items(split):
            lines = [
                f"{letter}. {choice}"
                for letter, choice in zip(LETTERS, item["choices"], strict=True)
            ]
            gold = item["choices"][item["answer"]]
            prompt = "\n".join(
                [_DESCRIPTION.format(item["subject"]) + item["question"], *lines, "Answer:"]
            )
            yield Example(
                task=self.name, prompt=prompt, completion=f" {gold}", answer=f" {gold}", gold=gold
            )

    def grade(self, gold: str, text: str) -> tuple[Grade, ...]:
        """Grade an answer that a teacher wrote; scores come from log-probabilities."""
        choice = text.strip() or None
        return (Grade(extractor="acc", extracted=choice, correct=choice == gold),)
