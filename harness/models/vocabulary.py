"""Compares the vocabularies of two models, from their tokenizer files alone."""

from collections.abc import Mapping
from pathlib import Path

from harness.errors import HarnessError, in_one_line
from harness.files.untrusted import MODEL_LIMITS, read_object


def common_vocabulary(
    student: Mapping[str, int],
    teacher: Mapping[str, int],
    *,
    names: tuple[str, str] = ("student", "teacher"),
) -> int:
    """Return how many leading logit columns mean the same token in both models.

    Models of one family pad their embedding rows differently (Qwen2.5: 151,936 and 152,064 for one
    tokenizer), so logits are cut to this number *before* the softmax. Different token maps raise
    `HarnessError`.
    """
    differing = sum(student.get(token) != index for token, index in teacher.items()) + sum(
        token not in teacher for token in student
    )
    if differing:
        raise HarnessError(
            f"{names[1]} and {names[0]} have different vocabularies ({len(teacher)} and "
            f"{len(student)} tokens, {differing} differ): matching logits needs one token map; "
            "type --methods cot (it distils text) or --methods uld (distributions, where tokens "
            "meet)"
        )
    return 1 + max(teacher.values())


def token_map(folder: Path) -> dict[str, int] | None:
    """Read a model folder's token map from `tokenizer.json`; None where it has no such file."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    data = read_object(path, MODEL_LIMITS)
    try:
        vocabulary = data["model"]["vocab"]
        if not isinstance(vocabulary, dict):  # unigram models list (token, score) pairs
            vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in data.get("added_tokens") or ()}
    except (LookupError, TypeError) as problem:
        raise HarnessError(
            f"{path}: no vocabulary in it ({in_one_line(problem)}); download or save the model "
            "again"
        ) from problem
    token_ids: dict[str, int] = {**vocabulary, **added}
    for token, number in token_ids.items():
        if type(number) is not int or number < 0:
            raise HarnessError(
                f"{path}: token {token[:60]!r} has no number of 0 or more; download or save the "
                "model again"
            )
    return token_ids
