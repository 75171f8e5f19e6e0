"""What a run reports while it computes cells, and at its end."""

from types import SimpleNamespace

from harness.running.runner import CellResult, callbacks_by_old_names, failure_lines


def test_callbacks_written_for_the_former_class_are_called():
    calls = []
    callbacks = callbacks_by_old_names(
        begin=lambda cell, number, total: calls.append(("begin", number, total)),
        alive=lambda cell, progress: calls.append(("alive", progress)),
        say=lambda line: calls.append(("say", line)),
    )
    callbacks.on_start(None, 1, 2)
    callbacks.on_progress(None, "progress")
    callbacks.on_end(None)
    callbacks.on_message("line")
    assert calls == [("begin", 1, 2), ("alive", "progress"), ("say", "line")]


def test_a_cell_without_success_is_one_line_with_its_reason():
    def result(label, seed, record, note=""):
        return CellResult(SimpleNamespace(label=label, seed=seed), record, cached=False, note=note)

    success = SimpleNamespace(status="success", reason="")
    failure = SimpleNamespace(status="failed", reason="out of memory")
    results = [
        result("teacher", None, success),
        result("sft", 2, failure),
        result("int8", None, None, "computed by process 7"),
    ]
    assert failure_lines(results) == [
        "sft (seed 2): failed: out of memory",
        "int8: not waited for, computed by process 7",
    ]
