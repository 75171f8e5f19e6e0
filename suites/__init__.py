"""Tasks and suites, as literal tables: a name and where it lives. Listing imports no task's machinery."""

from harness.contract import Suite
from harness.errors import HarnessError, unknown

TASKS: dict[str, str] = {
    "gsm8k-mini": "suites.gsm8k_mini:Gsm8kMini",
    "mmlu-mini": "suites.mmlu_mini:MmluMini",
}

SUITES: dict[str, Suite] = {
    "math": Suite(name="math", version=1, tasks=("gsm8k",), help="grade-school word problems, solved step by step"),
    "knowledge": Suite(name="knowledge", version=1, tasks=("mmlu",), help="four-choice questions on what the weights know"),
    "mini": Suite(name="mini", version=1, tasks=("gsm8k-mini", "mmlu-mini"), help="both generated tasks, for any model: no data needed"),
}


def resolve(names: list[str], *, embedded: bool) -> dict[str, Suite]:
    """Return the named suites with tasks that exist for the teacher: `-mini` forms for the embedded pair."""
    for name in names:
        if name not in SUITES:
            raise unknown("suite", name, SUITES)
    found: dict[str, Suite] = {}
    for name in [name for name in SUITES if name in names]:  # one order, however they were typed: it orders the training rows
        suite = SUITES[name]
        wanted = [task if task.endswith("-mini") or not embedded else f"{task}-mini" for task in suite.tasks]
        missing = [task for task in wanted if task not in TASKS]
        if missing:
            raise HarnessError(
                f"suite {name!r} needs {', '.join(missing)} for a model from outside, "
                "which this version does not score yet; type --suite mini"
            )
        found[name] = Suite(name=name, version=suite.version, tasks=tuple(wanted), measure=suite.measure, help=suite.help)
    return found
