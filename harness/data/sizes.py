"""How many evaluation items each published task has."""

from collections.abc import Mapping

ITEMS_BY_TASK: Mapping[str, int] = {
    "gsm8k": 1_319,
    "gsm8k-cot": 1_319,
    "mmlu": 14_042,
    "mmlu-cloze": 14_042,
    "gsm8k-mini": 1_000,
    "mmlu-mini": 1_000,
    "wikitext": 62,
}
