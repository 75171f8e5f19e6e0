"""A pytest plugin whose tests are the rows: `pytest --harness-baseline FILE`.

Each finding of the check is one test. *regressed*, *missed* and *not comparable* fail; *cannot
tell* fails too unless the option says skip. A finding that cannot be told and does not count (a
pool, or a task that a pool settled) is skipped. Without `--harness-baseline` and the other options
the plugin does nothing, and imports nothing of ours.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from harness.gate.rules import Finding


_FINDINGS: "pytest.StashKey[tuple[Finding, ...]]" = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    options = parser.getgroup("compression-harness", "retention of compressed models")
    options.addoption("--harness-baseline", metavar="FILE", help="frozen rows; each becomes a test")
    options.addoption(
        "--harness-records",
        metavar="PLACE",
        help="run file, store, study or folder of records [results/runs]",
    )
    options.addoption(
        "--harness-margin",
        metavar="M",
        help="share of the teacher's score that must be kept (0.95), or 2points",
    )
    options.addoption(
        "--harness-task-weights",
        metavar="W",
        help="of the pooled decision: items, tasks, or mmlu=2,gsm8k=1 [items]",
    )
    options.addoption(
        "--harness-decide",
        metavar="HOW",
        help="tasks, or pooled: a pool that passed settles single tasks [tasks]",
    )
    options.addoption("--harness-rows", metavar="ROWS", help="only these rows, separated by commas")
    options.addoption(
        "--harness-cannot-tell",
        choices=("fail", "skip"),
        default="fail",
        help="what becomes of rows that too few items judge [fail]",
    )


class FindingItem(pytest.Item):  # type: ignore[misc,unused-ignore]
    """One finding as a test."""

    def __init__(self, *, finding: "Finding", skip: bool, **options: Any) -> None:
        super().__init__(**options)
        self.finding, self.skip = finding, skip

    def runtest(self) -> None:
        """Fail, skip or pass by the verdict."""
        from harness.gate.rules import Verdict

        if self.finding.verdict is Verdict.cannot_tell and (self.skip or not self.finding.counts):
            pytest.skip(f"cannot tell: {self.finding.told}")
        if self.finding.verdict is not Verdict.passed:
            pytest.fail(f"{self.finding.verdict.value}: {self.finding.told}", pytrace=False)

    def repr_failure(self, excinfo: Any, style: Any = None) -> str:
        """Say the verdict, no traceback."""
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Name the row where pytest names a file."""
        return self.path, None, self.name


class NoRowsItem(pytest.Item):  # type: ignore[misc,unused-ignore]
    """A test that fails because the records hold no row to judge."""

    def runtest(self) -> None:
        """Fail."""
        pytest.fail("cannot tell: no row was checked", pytrace=False)

    def repr_failure(self, excinfo: Any, style: Any = None) -> str:
        """Say so, no traceback."""
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Name it."""
        return self.path, None, self.name


def pytest_configure(config: pytest.Config) -> None:
    """Check the records once; a mistake in what was typed is one line, under pytest-xdist too."""
    options = {
        name: config.getoption(f"--harness-{name}")
        for name in ("baseline", "records", "margin", "rows", "task-weights", "decide")
    }
    if not any(options.values()):
        return
    from harness.errors import HarnessError
    from harness.gate.check import check
    from harness.gate.inputs import parse_decide, parse_margin, parse_task_weights, records_of
    from harness.gate.rules import Rules, rules_with_margin
    from harness.planning.spec import split_list
    from harness.records.baseline import read_baseline
    from harness.renames.labels import current_labels

    try:
        share, points = parse_margin(options["margin"])
        rules = Rules(
            margin=share,
            points=points,
            rows=tuple(
                current_labels(split_list(options["rows"] or ""), typed_in="--harness-rows")
            ),
            task_weights=parse_task_weights(options["task-weights"]),
            decide=parse_decide(options["decide"]),
        )
        frozen = read_baseline(Path(options["baseline"])) if options["baseline"] else None
        rules = rules_with_margin(frozen, rules)
        config.stash[_FINDINGS] = check(
            records_of(Path(options["records"] or "results/runs")), rules, frozen
        ).findings
    except HarnessError as problem:
        raise pytest.UsageError(str(problem)) from problem


def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Add a test for each finding."""
    findings = config.stash.get(_FINDINGS, None)
    if findings is None:
        return
    skip = config.getoption("--harness-cannot-tell") == "skip"
    items += [
        FindingItem.from_parent(session, name=finding.name, finding=finding, skip=skip)
        for finding in findings
    ]
    if not findings:
        items.append(NoRowsItem.from_parent(session, name="harness check"))
