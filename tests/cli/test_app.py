"""The command line: its surface, its exit codes, and what it does not import."""

import json
import re
import subprocess
import sys

import pytest

OPTIONS = {
    "run": "--backend --grid --rounds --batch-size --budget --cache --chat-template --system "
    "--track --tune --include-path --noise "
    "--controls --data-dir --device --dry-run --dtype --force --help --limit --methods "
    "--no-controls "
    "--no-wait --out --rows --seeds --set --student --suite --teacher --wait --cell-timeout "
    "--allow-task-code --train-data --calibration --overlap --num-fewshot --checkpoint --subset",
    "score": "--allow-task-code --backend --batch-size --cache --cell-timeout --chat-template "
    "--data-dir --device --dtype --force --grid --include-path --limit --no-wait --num-fewshot "
    "--out --rounds --subset --suite --system --wait",
    "list": "--help",
    "cache": "--cache --help --kind --older-than",
    "lm-eval": "",
    "measure": "--cache --device --dtype --grid --help --out --rounds --threads",
    "plan": "--budget --cache --hardware --help --limit --methods --price --records --rows "
    "--student --suite --teacher",
    "check": "--baseline --margin --rows --decide --task-weights --alpha --frozen-alpha "
    "--tolerance --detect --exact --faster --measured "
    "--slower --json --junit --markdown --annotate --no-annotate",
    "compare": "--tasks --metric --filter --other-prompts --task-weights --alpha --tolerance "
    "--detect --json --junit --markdown --annotate --no-annotate",
    "recommend": "--keep --memory --faster --smaller --on --take --rows --alpha --json",
    "show": "--seed",
    "baseline": "",
    "data": "",
    "export": "",
    "verify": "--score",
    "report": "--out --keep --price --against --sort --forms --html --plots --explain",
    "train-tiny": "--budget --help --only --out",
}


def harness(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-P", "-m", "harness.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        **options,
    )


def test_the_surface_is_this_and_no_more():
    import typer
    from typer.main import get_command

    from harness.cli.app import app

    commands = get_command(app).commands
    assert isinstance(app, typer.Typer) and set(commands) == set(OPTIONS)
    inner = {
        name: set(re.findall(r"--[a-z-]+", str([p.opts for p in one.params])))
        for name, one in commands["baseline"].commands.items()
    }
    assert inner == {
        "update": {
            "--baseline",
            "--reason",
            "--rows",
            "--margin",
            "--own-margin",
            "--accept-regression",
            "--drop",
        },
        "show": set(),
        "diff": set(),
    }
    exported = {"--form", "--out", "--dtype", "--kind", "--check", "--tolerance", "--seed"}
    inner = {
        name: set(re.findall(r"--[a-z-]+", str([p.opts for p in one.params])))
        for name, one in commands["export"].commands.items()
    }
    assert inner == {
        "student": exported,
        "hub": {*exported, "--to", "--base", "--private", "--dry-run"},
        **{name: {"--out"} for name in ("lm-eval", "datasets")},
        **{name: {"--project"} for name in ("mlflow", "wandb", "trackio")},
    }
    for name, command in commands.items():
        found = {
            option
            for parameter in command.params
            for option in (*parameter.opts, *parameter.secondary_opts)
            if option.startswith("--")
        }
        assert found | {"--help"} == set(OPTIONS[name].split()) | {"--help"}, name


IMPORTS = """
import runpy, sys
sys.argv = ["harness", *sys.argv[1:]]
try:
    runpy.run_module("harness.cli", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers", "datasets", "lm_eval", "pandas"}
print("LOADED", sorted({name.partition(".")[0] for name in sys.modules} & heavy))
"""


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], []),
        (["run", "--help"], []),
        (["list", "methods"], []),
        (["list", "suites"], []),
        (["list", "tasks"], []),
        (["list", "models"], []),
        (["plan"], []),
        (["run", "--dry-run"], []),
        (["report", "--explain"], []),
        (["check", "--help"], []),
        (["export", "student", "--help"], []),
        (["show", "response", "results/distillation-tiny"], []),
        (["cache", "ls", "--cache", "."], []),
    ],
)
def test_commands_that_compute_nothing_import_nothing_heavy(arguments, allowed):
    done = subprocess.run(
        [sys.executable, "-P", "-c", IMPORTS, *arguments], capture_output=True, text=True
    )
    assert f"LOADED {allowed}" in done.stdout, done.stdout[-300:] + done.stderr[-2000:]


def test_report_imports_pandas_and_no_torch(tmp_path):
    from harness.records import record
    from harness.records.conditions import ModelReference
    from harness.records.record import RunRecord

    empty = RunRecord(
        key="k",
        status="failed",
        reason="made up",
        label="cot",
        method="cot",
        family="x",
        is_control=False,
        suites=("math",),
        tasks=("gsm8k-mini@1",),
        device="cpu",
        dtype="float32",
        teachers=(),
        student_recipe="depth:0.5",
        student_base=ModelReference(name="tiny", digest="d"),
        budget_tokens=1,
        budget_rows=1,
        path="",
    )
    record.write_record(tmp_path / "one.json", empty)
    done = subprocess.run(
        [sys.executable, "-P", "-c", IMPORTS, "report", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert "LOADED ['pandas']" in done.stdout, done.stdout[-300:] + done.stderr[-2000:]
    assert "cot failed: made up" in done.stdout
    assert (tmp_path / "tables" / "table.md").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--methods", "respones"], "did you mean 'response'"),
        (["run", "--suite", "maths"], "did you mean 'math'"),
        (["run", "--teacher", "org"], "unknown model 'org'"),
        (["run", "--seeds", "0"], "--seeds 0"),
        (["run", "--no-such-option"], "--no-such-option"),
        (["list", "nonsense"], "nonsense"),
        (["report", "nowhere"], "no records at nowhere"),
        (["run", "--data-dir", "nowhere"], "no data folder at nowhere"),
        (["train-tiny", "--only", "huge"], "huge"),
        (["run", "--backend", "vllm"], "pip install vllm"),
        (["run", "--grid", "128x1"], "--grid '128x1'"),
        (["run", "--limit", "-3"], "--limit gsm8k=20,mmlu=100"),
        (["run", "--limit", "mmlu="], "--limit 'mmlu=' is neither"),
        (["cache", "ls", "--kind", "trace"], "did you mean 'traces'"),
        (["cache", "ls", "--cache", "nowhere"], "no cache folder at nowhere"),
        (["measure"], "no model is named"),
        (["measure", "tiny", "--grid", "8x1"], "--grid '8x1'"),
        (["measure", "tiny", "--rounds", "0"], "at least one round"),
        (["measure", "tiny", "--rounds", "auto:2"], "write a number of rounds, or auto"),
        (["run", "--rounds", "0"], "at least one round"),
        (["run", "--rounds", "often"], "write a number of rounds, or auto"),
        (["measure", "tiny", "--device", "cuda"], "torch sees no GPU here"),
        (["report", "--form", "md"], "(type: harness report --help)"),
        (["data", "fetch"], "(type: harness data fetch --help)"),
        (["bogus"], "(type: harness --help)"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, said, tmp_path):
    done = harness(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = harness(
        "run",
        "--methods",
        "identity",
        "--out",
        tmp_path / "file" / "runs",
        "--cache",
        tmp_path / "cache",
    )
    assert done.returncode == 2 and "give another folder with --out" in done.stderr


def test_a_truncated_and_a_foreign_record_are_named_and_skipped(tmp_path):
    (tmp_path / "half.json").write_text('{"schema": 1, "kind":')
    (tmp_path / "foreign.json").write_text(json.dumps({"model": "x", "results": {}}))
    done = harness("report", tmp_path)
    assert done.returncode == 1
    assert "half.json" in done.stderr and "foreign.json" in done.stderr


def test_dry_run_prints_every_cell_and_computes_nothing(tmp_path):
    done = harness("run", "--methods", "cot,response", "--dry-run", "--seeds", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for row in (
        "teacher",
        "cot seed 1",
        "cot seed 2",
        "answer-only seed 1 (control)",
        "untouched (control)",
        "sft seed 2 (control)",
    ):
        assert f"  {row}:" in done.stdout
    lines = {line.strip().partition(":")[0]: line for line in done.stdout.splitlines()}
    assert "; recipe full; peak " in lines["cot seed 1"] and "recipe" not in lines["teacher"]
    assert all("; peak " in lines[row] for row in ("teacher", "cot seed 1", "untouched (control)"))
    assert "10 cells" in done.stdout and not any(tmp_path.iterdir())


def test_report_explains_its_columns():
    done = harness("report", "--explain")
    assert "retention" in done.stdout and "95 %" in done.stdout


def test_packages_resolve_to_one_parent_folder():
    import harness as package
    import methods
    import suites

    parents = {
        str(__import__("pathlib").Path(module.__file__).parent.parent)
        for module in (package, methods, suites)
    }
    assert len(parents) == 1


@pytest.mark.slow
def test_lm_evals_own_command_asks_our_model(tmp_path):
    from pathlib import Path

    # lm-eval resolves a task's data files against the working directory
    tasks = Path(__file__).parents[1] / "tasks"
    done = harness(
        "lm-eval",
        "--model",
        "harness",
        "--model_args",
        "pretrained=tiny",
        "--tasks",
        "svamp_style",
        "--include_path",
        tasks,
        "--batch_size",
        "auto",
        cwd=tasks,
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.startswith("harness (")
        and "'pretrained': 'tiny'" in done.stdout
        and "exact_match" in done.stdout
    )
