"""A busy machine: how many threads, how they wait, and what of it is said."""

import os

import pytest

from harness.machine.load import (
    PASSIVE_WAITING,
    MachineLoad,
    measure_load,
    physical_cores,
    threads_for,
    users_environment,
    waiting_policy,
    waiting_variables,
)
from harness.machine.processor import CpuSeconds


def readings(*pairs):
    readings_left = iter(pairs)
    return lambda cpus: CpuSeconds(*next(readings_left))


@pytest.mark.parametrize(
    ("readings_", "busy"),
    [
        ([(10.0, 0.0), (10.0, 0.0)], False),
        ([(10.0, 0.0), (10.001, 0.0)], False),
        ([(10.0, 0.0), (10.2, 0.0)], True),
        ([(10.0, 0.0), (10.0, 0.1)], True),
        ([(None, None), (None, None)], False),
    ],
    ids=["idle", "a clock tick", "others", "a hypervisor's others", "a system that does not tell"],
)
def test_a_machine_is_busy_where_others_use_it(readings_, busy):
    load = measure_load(0.1, read=readings(*readings_))
    assert load.busy is busy and load.waiting == ("passive" if busy else "active")
    assert bool(waiting_variables(load, {})) is busy


def test_threads_follow_the_models_size_and_never_the_load(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [
        threads_for(size, cores=8) for size in (0, 100_000, 999_999, 1_700_000, 5_000_000, 10**12)
    ] == [1, 1, 1, 3, 8, 8]
    assert threads_for(10**9, cores=1) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads_for(10, cores=2) == 5, "what the user has said decides"
    monkeypatch.setenv("OMP_NUM_THREADS", "²")
    assert threads_for(10, cores=2) >= 1


def test_hyperthreads_are_one_core(tmp_path, monkeypatch):
    for cpu in range(4):
        place = tmp_path / f"cpu{cpu}" / "topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    monkeypatch.setattr("harness.machine.load.allowed_cpus", lambda: {0, 1, 2, 3})
    assert physical_cores(tmp_path) == 2
    assert physical_cores(tmp_path / "nowhere") == 4


@pytest.mark.parametrize("own", [*PASSIVE_WAITING])
def test_what_the_user_set_is_neither_replaced_nor_taken_away(own):
    busy = MachineLoad(2, 2.0)
    assert waiting_variables(busy, {own: "x"}) == {}
    assert users_environment({own: "x", "PATH": "p"}) == {own: "x", "PATH": "p"}


def test_timing_keeps_its_own_rule():
    given = {"PATH": "p", "OMP_NUM_THREADS": "2"}
    ours = {**given, **waiting_variables(MachineLoad(2, 2.0), given)}
    assert waiting_policy(ours) == "passive" and waiting_policy(given) == "active"
    assert users_environment(ours) == given


def test_a_plan_and_its_record_say_threads_and_waiting(tmp_path, monkeypatch):
    from harness.api import plan_run
    from harness.planning.config import build_config
    from harness.records.environment import current_environment
    from harness.records.record import Environment
    from harness.records.store import Store
    from harness.running import runner

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("harness.machine.load.physical_cores", lambda: 4)
    asked = {
        "methods": ("int8",),
        "suite": ("mini",),
        "out": tmp_path / "runs",
        "cache": tmp_path / "cache",
    }
    plan = plan_run(build_config(asked))
    assert plan.threads == 3, "1.7 million parameters"
    job = runner._cell_job(plan, plan.cells[0], Store(tmp_path / "runs"), MachineLoad(2, 1.234))
    assert (job.threads, job.cores_in_use) == (3, 1.23)
    assert runner._environment(plan, MachineLoad(2, 2.0))["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "OMP_WAIT_POLICY" not in {
        k: v
        for k, v in runner._environment(plan, MachineLoad(2, 0.0)).items()
        if k not in os.environ
    }
    monkeypatch.setattr("harness.machine.load.physical_cores", lambda: 2)
    assert plan_run(build_config(asked)).cells[0].key != plan.cells[0].key, (
        "threads are part of the key"
    )
    monkeypatch.setattr(
        "harness.machine.load.measure_load", lambda: pytest.fail("a plan asks for no load")
    )
    made = current_environment(
        device="cpu", dtype="float32", threads=3, waiting="passive", cores_in_use=1.2
    )
    assert (made.waiting, made.cores_in_use) == ("passive", 1.2)
    old = {
        key: value
        for key, value in made.model_dump().items()
        if key not in ("waiting", "cores_in_use")
    }
    assert (
        Environment.model_validate(old).waiting == ""
        and Environment.model_validate(old).cores_in_use is None
    )
