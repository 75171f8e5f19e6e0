"""The order of calls to two timing processes, and what happens where steps cannot be captured."""

from types import SimpleNamespace

import pytest

from harness.errors import CellFailed
from harness.measuring import measure as measuring
from harness.measuring import turns
from harness.measuring.rounds import RoundsRule
from harness.measuring.scenario import Scenario
from harness.records import columns

SCENARIO = Scenario(prompt_tokens=8, batch=2, new_tokens=4)
EAGER = {"base": 0.022, "student": 0.020}  # seconds a step, launched one by one
CAPTURED = {"base": 0.008, "student": 0.002}


class Scripted:
    """A timing process on a card that is not there: what it is asked is kept in order."""

    def __init__(self, role, calls, problem="", noise=()):
        self.role, self.calls, self.problem = role, calls, problem
        self.noise = iter(noise)
        self.process = SimpleNamespace(pid=1)

    def restart(self):
        self.calls.append((self.role, "restart"))

    def ask(self, command, **arguments):
        self.calls.append((self.role, command))
        return getattr(self, f"_{command}")(**arguments)

    def _open(self):
        return {}

    def _warm(self, scenario, visit_seconds):
        return {"seconds": [0.2, 0.1], "runs": 3, "prefills": 2}

    def _capture(self, scenario, visit_seconds):
        if self.problem:
            raise CellFailed(f"measuring the {self.role}: {self.problem}")
        return {"seconds": [0.1], "runs": 5}

    def _release(self):
        return {}

    def _visit(self, scenario, runs, prefills, captured=0):
        factor = next(self.noise, 1.0)
        step = EAGER[self.role] * factor
        times = [0.0, 0.01] + [0.01 + step * number for number in (1, 2, 3)]
        answer = {"stamps": [times] * runs + [[0.0, 0.01]] * prefills}
        if captured:
            step = CAPTURED[self.role] * factor
            stamps = [0.0, 0.5] + [0.5 + step * number for number in (1, 2, 3)]
            answer["captured"] = [stamps] * captured
        return answer


def timed(rounds="2", *, on_gpu=True, not_captured=None, share=0.3, prefill_share=0.9, **problems):
    calls = []
    processes = {
        role: Scripted(role, calls, **problems.get(role, {})) for role in ("student", "base")
    }
    reasons = ({} if not_captured is None else not_captured) if on_gpu else None
    rule = RoundsRule.parse(rounds)
    timing = turns.time_alternately(
        processes, SCENARIO, rule, lambda _: None, visit_seconds=0.1, not_captured=reasons
    )
    measurements = measuring._speed_measurements(timing, SCENARIO, rule)
    if on_gpu:
        timing["busy"] = {"prefill": prefill_share, "decode": share}
        measurements += measuring._launch_measurements(timing, SCENARIO)
    return calls, timing, {measurement.name: measurement for measurement in measurements}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Let nothing of this machine stand in the remarks."""
    monkeypatch.setattr(turns.InterferenceMonitor, "begin", lambda self: None)
    monkeypatch.setattr(turns.InterferenceMonitor, "end", lambda self: ())


def test_on_a_cpu_nothing_is_captured_and_no_more_is_asked_than_before():
    calls, timing, by = timed(on_gpu=False)
    visits = [(role, "visit") for role in ("base", "student", "student", "base")] * 2
    assert calls == [("student", "warm"), ("base", "warm"), *visits]
    assert set(timing) == {"warm", "visits", "dirty"}
    assert by["decode_speedup"].value == pytest.approx(1.1)
    launched = {"eager", "skipped", "busy"}
    assert not [name for name in by if launched & set(name.split("_"))]


def test_captured_steps_are_the_figure_and_eager_ones_stand_beside():
    calls, timing, by = timed()
    assert calls[:4] == [
        (role, command) for command in ("warm", "capture") for role in ("student", "base")
    ]
    # a short run beside, and as many prefills as without (three runs and two prefills alone)
    assert [[len(times) for times in visit] for visit in timing["visits"]["student"]] == [
        [5, 2, 2, 2, 2]
    ] * 4
    assert [len(visit) for visit in timing["captured"]["base"]] == [5] * 4
    assert by["decode_speedup"].value == pytest.approx(4.0)
    assert by["eager_decode_speedup"].value == pytest.approx(1.1)
    assert by["tpot_seconds"].value == pytest.approx(0.002)
    assert by["eager_tpot_seconds"].value == pytest.approx(0.020)
    assert by["decode_tokens_per_second"].value == pytest.approx(2 / 0.002)
    # the prefill is not captured: its figures are those of eager runs
    assert by["ttft_seconds"].value == pytest.approx(0.01)
    assert by["decode_busy_share"].value == 0.3 and by["prefill_busy_share"].value == 0.9
    assert not [name for name in by if name.startswith("skipped")]


def test_a_student_whose_steps_cannot_be_captured_is_compared_eager_with_an_eager_base():
    problem = {"problem": "NotCaptured: its family has no static cache (KeyError)"}
    reasons = {}
    calls, timing, by = timed(student=problem, not_captured=reasons)
    # a stream may be broken: the process is another one, opened and warm; the base gives back
    assert calls[2:8] == [
        ("student", "capture"),
        ("student", "restart"),
        ("student", "open"),
        ("student", "warm"),
        ("base", "capture"),
        ("base", "release"),
    ]
    assert "captured" not in timing and by["decode_speedup"].value == pytest.approx(1.1)
    assert "eager_decode_speedup" not in by and by["tpot_seconds"].value == pytest.approx(0.020)
    assert by[columns.NOT_CAPTURED].remark == (
        "decoding is eager, not captured in a graph (its family has no static cache (KeyError)); "
        "bound by launches: the GPU worked for less than 80 % of the time"
    )
    # the next scenario does not try again
    calls, *_ = timed(student=problem, not_captured=reasons)
    assert ("student", "capture") not in calls and ("student", "restart") not in calls


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0.3, "bound by launches: the GPU worked for less than 80 % of the time"),
        (0.93, "the GPU worked for 80 % of the time or more"),
        (None, "whether launches bound it could not be measured"),
    ],
)
def test_what_an_eager_row_is_bound_by_is_measured(share, said):
    _, _, by = timed(base={"problem": "out of memory"}, share=share)
    remark = by[columns.NOT_CAPTURED].remark
    assert remark.endswith(said)
    assert "the base's step could not be: measuring the base: out of memory" in remark
    assert ("decode_busy_share" in by) == (share is not None)


def test_a_prefill_is_never_captured_and_is_said_to_be_bound_by_launches():
    """Its own share decides: the captured steps behind it are bound by nothing of the kind."""
    _, _, by = timed(prefill_share=0.5)
    said = by["skipped_prefill_capture"].remark
    assert said.startswith("reading the prompt is bound by launches: the GPU worked for less than")
    assert columns.NOT_CAPTURED not in by and by["prefill_busy_share"].value == 0.5


def test_rounds_end_when_prefill_and_decoding_are_narrow_and_no_sooner():
    _, timing, by = timed("auto:0.02:4-12")
    assert len(timing["visits"]["base"]) == 2 * 4 and len(by["decode_speedup"].values) == 4
    noise = [1.0, 1.0, 1.2, 1.2, 1.0, 1.0, 0.9, 0.9] * 6
    _, timing, by = timed("auto:0.02:4-12", student={"noise": noise})
    assert len(by["decode_speedup"].values) == 12
    assert by["decode_speedup"].low < 4.0 < by["decode_speedup"].high
    _, timing, by = timed("6", student={"noise": noise})
    assert len(by["decode_speedup"].values) == 6
