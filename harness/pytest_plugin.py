"""A pytest plugin whose tests are the rows: `pytest --harness-baseline FILE --harness-records PLACE`.

Each finding of the check is one test: *regressed* and *not comparable* fail, *cannot tell* fails too unless it is told to skip.
Without one of the options the plugin does nothing, and imports nothing of ours.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from harness.gate import Finding


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    options = parser.getgroup("compression-harness", "retention of compressed models")
    options.addoption("--harness-baseline", metavar="FILE", help="frozen rows; each becomes a test")
    options.addoption("--harness-records", metavar="PLACE", help="run file, store, study or folder of records [results/runs]")
    options.addoption("--harness-margin", metavar="M", help="share of the teacher's score that must be kept (0.95), or 2points")
    options.addoption("--harness-rows", metavar="ROWS", help="only these rows, separated by commas")
    options.addoption(
        "--harness-cannot-tell", choices=("fail", "skip"), default="fail", help="what becomes of rows that too few items judge [fail]"
    )


class RowItem(pytest.Item):  # type: ignore[misc,unused-ignore]
    """One finding as a test."""

    def __init__(self, *, finding: "Finding", skip: bool, **more: Any) -> None:
        super().__init__(**more)
        self.finding, self.skip = finding, skip

    def runtest(self) -> None:
        """Fail, skip or pass by the verdict."""
        from harness.gate import Verdict

        if self.finding.verdict is Verdict.cannot_tell and self.skip:
            pytest.skip(f"cannot tell: {self.finding.told}")
        if self.finding.verdict is not Verdict.passed:
            pytest.fail(f"{self.finding.verdict.value}: {self.finding.told}", pytrace=False)

    def repr_failure(self, excinfo: Any, style: Any = None) -> str:
        """Say the verdict, no traceback."""
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Name the row where pytest names a file."""
        return self.path, None, self.name


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add a test for each finding."""
    baseline, place, margin = (config.getoption(f"--harness-{name}") for name in ("baseline", "records", "margin"))
    if not (baseline or place or margin):
        return
    from harness.baseline import read_baseline, rules_of
    from harness.cli_check import parse_margin, records_of
    from harness.config import split_list
    from harness.errors import HarnessError
    from harness.gate import Rules, check

    try:
        share, points = parse_margin(margin)
        rows = config.getoption("--harness-rows")
        rules = Rules(margin=share, points=points, rows=tuple(split_list(rows)) if rows else ())
        frozen = read_baseline(Path(baseline)) if baseline else None
        if frozen is not None:
            rules = rules_of(frozen, rules)
        elif share is None:
            rules = Rules(margin=0.95, rows=rules.rows)
        checked = check(records_of(Path(place or "results/runs")), rules, frozen)
    except HarnessError as problem:
        raise pytest.UsageError(str(problem)) from problem
    skip = config.getoption("--harness-cannot-tell") == "skip"
    items += [RowItem.from_parent(session, name=one.name, finding=one, skip=skip) for one in checked.findings]
