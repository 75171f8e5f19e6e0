"""The command's door: what is refused early, how a command ends, what its processes leave."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.cli import app
from harness.cli.ending import exit_code_of, stopped_line
from harness.errors import CellFailed, HarnessError, how_it_ended, says_no_memory
from harness.files.places import check_file, check_folder, make_folder, no_space_message
from harness.files.problems import describe_os_error, path_text
from harness.machine.process import ProcessEnd, end_process, shorten_log, tail_of, watch_process
from harness.planning.config import build_config, parse_seconds

STUDY = Path(__file__).parents[2] / "results" / "embedded" / "records"


@pytest.fixture
def typed(monkeypatch, capsys):
    """Return a function that runs a command line in this process: (exit code, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["harness", *map(str, arguments)])
        code = exit_code_of(app._command)
        return code, capsys.readouterr().err.strip()

    return run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    return tmp_path


def only_line(output, code=2):
    assert output[0] == code, output
    assert len(output[1].splitlines()) == 1 and output[1].startswith("harness: "), output[1]
    return output[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--suite", ""], "--suite is empty"),
        (["run", "--suite", " , "], "--suite is empty"),
        (["run", "--methods", ""], "--methods is empty"),
        (["run", "--methods", "int8", "--methods", ""], "--methods is empty"),
        (["run", "--teacher", ""], "--teacher is empty"),
        (["run", "--student", ""], "--student is empty"),
        (["run", "--out", ""], "--out is empty"),
        (["run", "--cache="], "--cache is empty"),
        (["run", ""], "FILE is empty"),
        (["report", ""], "PLACE is empty"),
        (["check", "--rows", ""], "--rows is empty"),
        (["check", "--baseline", ""], "--baseline is empty"),
        (["measure", ""], "MODELS is empty"),
        (["baseline", "show", ""], "BASELINE is empty"),
        (["plan", "--teacher", ""], "--teacher is empty"),
        (["cache", "ls", "--cache", ""], "--cache is empty"),
        (["run", "--methods", "int8,int8"], "int8 is named twice"),
        (["run", "--methods", "int8", "--methods", "int8"], "int8 is named twice"),
        (["run", "--suite", "math,math"], "math is named twice"),
        (["run", "--teacher", "tiny,tiny"], "tiny is named twice"),
        (["plan", "--methods", "cot", "--methods", "cot"], "--methods: cot is named twice"),
        (["plan", "--suite", "math,math"], "--suite: math is named twice"),
        (["report", "--against", "cot,cot"], "--against: cot is named twice"),
        (["report", "--forms", "md", "--forms", "md"], "--forms: md is named twice"),
        (["check", "--rows", "a", "--rows", "a"], "--rows: a is named twice"),
        (["run", "--batch-size", "²"], "--batch-size '²'"),
        (["run", "--batch-size", "1e3"], "--batch-size '1e3'"),
        (["run", "--batch-size", "9" * 5000], "--batch-size"),
        (["run", "--budget", "0"], "--budget 0"),
        (["train-tiny", "--budget", "0"], "--budget"),
        (["plan", "--budget", "0"], "--budget"),
        (["run", "--cell-timeout", "0"], "--cell-timeout"),
        (["run", "--cell-timeout", "-3s"], "--cell-timeout"),
        (["run", "--cell-timeout", "soon"], "90s, 30m, 2h"),
        (["check", "--faster", "nan"], "--faster nan"),
        (["check", "--faster", "inf"], "--faster inf"),
        (["check", "--faster", "-1"], "--faster -1"),
        (["check", "--faster", "0"], "--faster 0"),
        (["check", "--slower", "nan"], "--slower nan"),
        (["check", "--slower", "-1"], "--slower -1"),
        (["check", "--slower", "0.9"], "--slower 0.9"),
        (["check", "--tolerance", "nan"], "--tolerance nan"),
        (["check", "--tolerance", "-1"], "--tolerance -1"),
        (["check", "--detect", "inf"], "--detect inf"),
        (["check", "--alpha", "nan"], "--alpha nan"),
        (["check", "--frozen-alpha", "-0.1"], "--frozen-alpha -0.1"),
        (["report", "--price", "nan"], "--price"),
        (["report", "--price", "1e999"], "--price inf"),
        (["plan", "--price", "nan"], "--price"),
        (["cache", "prune", "--older-than", "nan"], "--older-than"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_done(arguments, message, typed, folder):
    line = only_line(typed(*arguments))
    assert message in line and len(line) < 500 + len(str(arguments))
    assert sorted(path.name for path in folder.iterdir()) == ["file"], "nothing is made"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--out", "file"], "file is a file, and a folder is needed"),
        (["run", "--out", "file/deeper/down"], "is a file, and a folder is needed"),
        (["run", "--cache", "file"], "--cache file"),
        (["run", "--out", "x" * 300], "give a shorter path"),
        (["run", "--out", "/".join(["x" * 200] * 40)], "give a shorter path"),
        (["run", "--out", "/proc/none"], "--out /proc/none"),
        (["report", STUDY, "--out", "file"], "file is a file, and a folder is needed"),
        (["report", STUDY, "--keep", "file"], "file is a file, and a folder is needed"),
        (["export", "datasets", STUDY, "--out", "file"], "file is a file, and a folder is needed"),
        (["check", STUDY, "--json", "."], "--json . is a folder"),
        (["check", STUDY, "--junit", "file/x.xml"], "--junit file: "),
        (
            ["baseline", "update", STUDY, "--baseline", ".", "--reason", "x"],
            "--baseline . is a folder",
        ),
        (["train-tiny", "--out", "file"], "file is a file, and a folder is needed"),
        (["measure", "tiny", "--out", "file"], "file is a file, and a folder is needed"),
        (["report", "x" * 300], "File name too long"),
        (["check", "x" * 300], "File name too long"),
        (["run", "."], "a folder stands where a file should be"),
    ],
)
def test_a_place_that_cannot_be_used_is_one_line_before_anything_is_computed(
    arguments, message, typed, folder
):
    line = only_line(typed(*arguments))
    assert message in line and len(line) < 600
    assert sorted(path.name for path in folder.iterdir()) == ["file"]


def test_a_folder_with_little_space_is_said_and_one_without_is_refused(tmp_path, monkeypatch):
    import shutil

    free = [500 * 2**20]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": free[0]}))
    messages = []
    check_folder(tmp_path / "a" / "b", "--cache", say=messages.append)
    assert messages == [f"--cache {tmp_path / 'a' / 'b'}: only 500 MiB are free there"]
    free[0] = 2**20
    with pytest.raises(HarnessError, match=r"--cache .*1\.0 MiB are free there, too few"):
        check_folder(tmp_path / "a", "--cache")
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_leave_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(HarnessError, match="Permission denied"):
        check_folder(tmp_path / "x", "--out")


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO]
)
def test_a_folder_that_takes_no_bytes_is_found_when_it_is_made(number, tmp_path, monkeypatch):
    def refused(self, data):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "write_bytes", refused)
    with pytest.raises(HarnessError, match=f"{os.strerror(number)}.*--cache"):
        make_folder(tmp_path / "c", "--cache")


@pytest.mark.parametrize(
    "problem",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError(
            'Error while serializing: IoError(Os { code: 28, message: "No space left on device" })'
        ),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ],
)
def test_a_full_disk_is_said_with_the_folder_that_is_full(problem, tmp_path):
    assert no_space_message(problem, {"--out": tmp_path, "--cache": tmp_path}).startswith(
        "no space left on the device (--"
    )
    assert no_space_message(ValueError("other"), {"--out": tmp_path}) == ""


def test_errors_of_the_system_are_one_line_with_a_way_out():
    for number in (
        errno.ENOTDIR,
        errno.ENOSPC,
        errno.EACCES,
        errno.EROFS,
        errno.ENAMETOOLONG,
        errno.EISDIR,
        errno.EMFILE,
        errno.ELOOP,
    ):
        line = describe_os_error(OSError(number, os.strerror(number), "a\nb" + "x" * 5000))
        assert os.strerror(number) in line and ";" in line and len(line) < 300 and "\n" not in line
    assert (
        describe_os_error(OSError("some library\nsays more")) == "OSError: some library says more"
    )
    assert (
        describe_os_error(OSError(errno.EBADF, "Bad file descriptor", 3)) == "Bad file descriptor"
    )
    assert len(path_text("y" * 5000)) <= 121


def test_commands_that_meet_an_error_of_the_system_exit_with_2(monkeypatch, capsys):
    for problem in (
        OSError(errno.EIO, "Input/output error", "/x"),
        PermissionError(errno.EACCES, "Permission denied", "/y"),
        OSError("odd"),
    ):

        def fails(problem=problem):
            raise problem

        assert exit_code_of(fails) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def cli_process(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "harness.cli", *map(str, arguments)], **options
    )


@pytest.mark.parametrize(
    "arguments", [["report", "--explain"], ["list", "methods"], ["run", "--help"]]
)
def test_a_reader_that_goes_away_is_no_verdict(arguments):
    process = cli_process(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # before a byte is read: `| true`
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors == b""


def test_a_check_keeps_its_code_whoever_reads_it(tmp_path):
    unpiped = cli_process(
        "check",
        STUDY,
        "--margin",
        "0.5",
        "--json",
        tmp_path / "a.json",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    unpiped.communicate(timeout=120)
    torn = cli_process(
        "check",
        STUDY,
        "--margin",
        "0.5",
        "--json",
        tmp_path / "b.json",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    torn.stdout.close()
    errors = torn.stderr.read()
    assert torn.wait(timeout=120) == unpiped.returncode and b"Traceback" not in errors
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_standard_output_that_takes_nothing_is_exit_code_2():
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        process = cli_process("list", "methods", stdout=full, stderr=subprocess.PIPE)
        _, errors = process.communicate(timeout=60)
    assert (
        process.returncode == 2
        and len(lines := errors.decode().splitlines()) == 1
        and "standard output: No space left on device" in lines[0]
    )


@pytest.mark.parametrize(
    "arguments", [["--version"], ["run", "--version"], ["baseline", "show", "--version"]]
)
def test_every_command_says_its_version(arguments, typed, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["harness", *arguments])
    assert exit_code_of(app._command) == 0
    assert capsys.readouterr().out.startswith("compression-harness ")


@pytest.mark.parametrize(
    "arguments",
    [[], ["run"], ["check"], ["baseline"], ["baseline", "update"], ["plan"], ["list"], ["report"]],
)
def test_every_command_knows_the_short_help(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["harness", *arguments, "-h"])
    assert exit_code_of(app._command) == 0
    assert "Usage: " in capsys.readouterr().out


def test_repeated_options_add_up():
    from harness.planning.spec import joined_lists

    assert joined_lists(["int8", "response,cot"]) == ["int8", "response", "cot"]
    assert [
        build_config({"cell_timeout": text}).cell_timeout for text in ("90", "90s", "1.5m", "2h", 7)
    ] == [90, 90, 90, 7200, 7]
    assert parse_seconds(None) is None


def test_the_configuration_is_checked_whoever_builds_it():
    for values in (
        {"suite": ()},
        {"teacher": ()},
        {"methods": ("a", "a")},
        {"student": " "},
        {"cell_timeout": float("nan")},
        {"cell_timeout": float("inf")},
        {"suite": ("",)},
        {"out": "a\0b"},
        {"student": "\0"},
        {"teacher": ("a\0",)},
        {"data_dir": Path("\0")},
    ):
        with pytest.raises(HarnessError):
            build_config(values)


def test_a_stopped_command_says_what_is_kept():
    assert stopped_line("SIGTERM", ["run", "--out", "a b"]).endswith(
        "finished work is kept; to go on, type: harness run --out 'a b'"
    )
    assert "type again: harness check x" in stopped_line("Ctrl-C", ["check", "x"])


def a_child(tmp_path, code):
    log = tmp_path / "log.txt"
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
    return process, log


GRANDCHILD = """
import json, subprocess, sys
held = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(json.dumps({"held": held.pid}), flush=True)
"""


def test_a_grandchild_that_holds_the_pipe_holds_nobody_up(tmp_path):
    process, log = a_child(tmp_path, GRANDCHILD)
    heard, began = [], time.monotonic()
    ended_so = watch_process(process, log, heard.append)
    os.kill(heard[0]["held"], signal.SIGKILL)
    assert ended_so.code == 0 and not ended_so.late and time.monotonic() - began < 20


@pytest.mark.slow
def test_a_process_whose_time_is_over_is_ended_with_what_it_started(tmp_path):
    process, log = a_child(
        tmp_path,
        GRANDCHILD
        + "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)",
    )
    heard = []
    began = time.monotonic()
    ending = watch_process(process, log, heard.append, seconds=1.5)
    assert ending.late and ending.code == -signal.SIGKILL and time.monotonic() - began < 30
    for _ in range(50):
        if (
            not Path(f"/proc/{heard[0]['held']}").exists()
            or " Z " in Path(f"/proc/{heard[0]['held']}/stat").read_text()
        ):
            break
        time.sleep(0.1)
    else:
        pytest.fail("what it started goes on")


def test_signs_that_are_none_are_passed_over(tmp_path):
    process, log = a_child(
        tmp_path, "print('{\"a\": 1}'); print('[1]'); print('torn {'); print('{\"b\": 2}', end='')"
    )
    heard = []
    assert watch_process(process, log, heard.append).code == 0
    assert heard == [{"a": 1}, {"b": 2}]


def test_a_log_is_cut_to_its_end_and_goes_on(tmp_path):
    log = tmp_path / "log.txt"
    with log.open("ab") as stream:
        stream.write(b"old\n" * 5_000)
        stream.write(b"newest\n")
        stream.flush()
        shorten_log(log, max_bytes=10_000, kept_bytes=100)
        assert log.stat().st_size < 300
        stream.write(b"later\n")
    text = log.read_text()
    assert text.startswith("[the first 19,907 bytes of this log were dropped]") and text.endswith(
        "newest\nlater\n"
    )
    assert tail_of(log, 6) == "later\n" and tail_of(tmp_path / "none") == ""


def test_a_process_that_writes_without_end_keeps_a_small_log(tmp_path, monkeypatch):
    from harness.machine import process as watched

    monkeypatch.setattr(watched, "POLL_SECONDS", 0.02)
    code = (
        "import sys\nfor _ in range(400): sys.stderr.write('x' * 100_000 + chr(10))\n"
        "sys.stderr.write('last words')"
    )
    process, log = a_child(tmp_path, code)
    ending = watch_process(process, log, lambda message: None)
    assert (
        log.stat().st_size <= watched.MAX_LOG_BYTES
        and ending.log.endswith("last words")
        and len(ending.log) <= watched.LOG_TAIL_BYTES
    )


CRASH_LOG = (
    'Current thread 0x00007f (most recent call first):\n  File "/x/kernels.py", line 7 in pack\n'
)
ORPHAN = '''
import os, subprocess, sys
CHILD = """import sys, time
from harness.machine.process import end_with_parent
end_with_parent(int(sys.argv[1]))
time.sleep(60)"""
child = subprocess.Popen([sys.executable, "-c", CHILD, str(os.getpid())], stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
{ends}
'''


@pytest.mark.parametrize(
    "ends", ["os._exit(0)", "import time; time.sleep(2); os._exit(0)"], ids=["at once", "later"]
)
def test_no_process_outlives_its_parent(ends):
    parent = subprocess.run(
        [sys.executable, "-c", ORPHAN.format(ends=ends)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    number = int(parent.stdout)
    for _ in range(100):
        stat = Path(f"/proc/{number}/stat")
        if not stat.exists() or ") Z " in stat.read_text():
            return
        time.sleep(0.1)
    os.kill(number, signal.SIGKILL)
    pytest.fail("the orphan lives on")


@pytest.mark.parametrize(
    ("code", "log", "message"),
    [
        (-signal.SIGSEGV, "", "crashed (SIGSEGV)"),
        (-signal.SIGSEGV, CRASH_LOG, "in pack, kernels.py line 7"),
        (
            -signal.SIGABRT,
            "terminate called after throwing an instance of 'std::bad_alloc'",
            "out of memory (SIGABRT)",
        ),
        (-signal.SIGKILL, "", "killed (SIGKILL, perhaps for want of memory)"),
        (
            1,
            "ImportError: libtorch_cpu.so: failed to map segment from shared object",
            "out of memory (ImportError",
        ),
        (1, "libgomp: Thread creation failed: Resource temporarily unavailable", "out of memory"),
        (1, "RuntimeError: can't start new thread", "out of memory"),
        (1, "MemoryError", "out of memory (MemoryError)"),
        (3, "KeyError: 'x'", "ended with status 3: KeyError: 'x'"),
    ],
)
def test_how_a_process_ended_is_said_so_that_it_helps(code, log, message):
    assert message in how_it_ended(code, log)


def test_what_is_no_want_of_memory_is_not_called_so():
    for text in (
        "KeyError: 'memory'",
        "ValueError: 12 is too many",
        "[Errno 122] quota",
        "the associative memory of layer 3",
    ):
        assert not says_no_memory(text)


def test_the_same_crash_twice_is_not_to_be_run_again(tmp_path):
    from harness.running.runner import _process_failure

    crash = ProcessEnd(-signal.SIGSEGV, "")
    first = _process_failure(crash, "", None, tmp_path / "log.txt")
    second = _process_failure(crash, first, None, tmp_path / "log.txt")
    assert "run again once" in first and "will not help" in second
    assert "will not help" in _process_failure(crash, second, None, tmp_path / "log.txt"), (
        "nor the third time"
    )
    assert "continue from the last saved state" in _process_failure(
        ProcessEnd(-signal.SIGKILL, ""), first, None, tmp_path
    )
    assert "--cell-timeout" in _process_failure(
        ProcessEnd(-signal.SIGTERM, "", late=True), "", 30.0, tmp_path
    )


@pytest.mark.parametrize(
    "result", ["student", None, 3, ("a", "b"), Path("student"), {"path": 1}], ids=str
)
def test_a_method_that_returns_no_checkpoint_is_told_what_to_return(result, tmp_path):
    from harness.running.student import _refuse_invalid_student

    with pytest.raises(
        CellFailed,
        match=r"mine\.compress returned .* must return a Checkpoint: save it in job\.workdir",
    ):
        _refuse_invalid_student("mine", result, tmp_path)


def test_a_checkpoint_elsewhere_is_told_where_it_belongs(tmp_path):
    from harness.contract import Checkpoint
    from harness.running.student import _refuse_invalid_student

    def at(path):
        return Checkpoint(path=path, name="x", digest="d", bytes_on_disk=1)

    for path in (tmp_path.parent, tmp_path / "student"):  # elsewhere; not there
        with pytest.raises(CellFailed, match=r"is no model folder in job\.workdir"):
            _refuse_invalid_student("mine", at(path), tmp_path)
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text("{}")
    _refuse_invalid_student("mine", at(tmp_path / "student"), tmp_path)


def test_a_killed_process_ends_within_its_grace(tmp_path):
    process, _ = a_child(
        tmp_path,
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('{}', flush=True); time.sleep(60)",
    )
    process.stdout.readline()
    began = time.monotonic()
    end_process(process, grace=0.3)
    assert process.returncode == -signal.SIGKILL and time.monotonic() - began < 10


@pytest.mark.slow
def test_task_files_run_only_where_they_are_allowed_to(typed, folder):
    (folder / "tasks").mkdir()
    (folder / "mine.toml").write_text(
        'name = "mine"\ntasks = ["lm-eval:x"]\ninclude_path = "tasks"\n'
    )
    for arguments in (
        ["--suite", "lm-eval:x", "--include-path", "tasks"],
        ["--suite", "mine.toml"],
    ):
        assert "type --allow-task-code" in only_line(typed("run", *arguments))
        code, output = typed("run", *arguments, "--allow-task-code")
        assert code == 2 and "--allow-task-code" not in output, (
            "allowed: the task itself is what is missing"
        )


def test_check_file_takes_what_can_be_written(tmp_path):
    check_file(tmp_path / "new" / "deep" / "x.json", "--json")
    (tmp_path / "old.json").write_text(json.dumps({}))
    check_file(tmp_path / "old.json", "--json")


class Templated:
    """A tokenizer whose template is code of its own."""

    chat_template = None

    def __init__(self, render):
        self.render = render

    def apply_chat_template(self, turns, **settings):
        return self.render(turns)


def endless(turns):
    while True:
        pass


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(10 ** 12) }}",
        "{% for i in range(99999) %}{{ 'xxxxxxxxxx' }}{% endfor %}",
    ],
    ids=["loops", "recursion", "a long range", "a long text"],
)
def test_a_template_cannot_take_for_ever(template, monkeypatch, tiny):
    import harness.models.language_model as model

    monkeypatch.setattr(model, "MAX_TEMPLATE_SECONDS", 0.5)
    tokenizer = model.student_tokenizer(tiny)
    tokenizer.chat_template = template
    began = time.monotonic()
    with pytest.raises(CellFailed, match=r"the chat template .*type --chat-template off"):
        model.render_chat(tokenizer, [{"role": "user", "content": "hello"}])
    assert time.monotonic() - began < 20


def test_a_template_is_bounded_in_a_thread_too(monkeypatch):
    import threading

    import harness.models.language_model as model

    monkeypatch.setattr(model, "MAX_TEMPLATE_SECONDS", 0.3)
    messages = []

    def render():
        try:
            model.render_chat(Templated(endless), [])
        except CellFailed as problem:
            messages.append(str(problem))

    thread = threading.Thread(target=render, daemon=True)
    thread.start()
    thread.join(20)
    assert messages == [
        "the chat template takes more than 0.3 s for one prompt; type --chat-template off"
    ]
    assert model.render_chat(Templated(lambda turns: "fine"), []) == "fine"


def test_the_alarm_of_others_goes_on():
    from harness.models.bounded import time_limit

    handler = signal.getsignal(signal.SIGALRM)
    signal.setitimer(signal.ITIMER_REAL, 50)
    with time_limit(1):
        pass
    remaining, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    assert 40 < remaining <= 50 and signal.getsignal(signal.SIGALRM) is handler


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt", "model.pkl"]
)
def test_pickles_are_refused_by_name(name, tmp_path):
    from harness.models.resolve import resolve

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(
        HarnessError,
        match=rf"{name} is a pickle, which is a program, and is not opened; "
        "save it with save_pretrained",
    ):
        resolve(str(tmp_path), cache=tmp_path)


def test_what_a_killed_run_left_in_the_cache_goes_and_what_is_being_written_stays(tmp_path):
    from filelock import FileLock

    from harness.models.artefacts import remove_unfinished

    for name in (".dead.12.part", ".alive.13.part", "whole"):
        (tmp_path / "teachers" / name).mkdir(parents=True)
        (tmp_path / "teachers" / name / "log_p-000.npy").write_bytes(b"x")
    with FileLock(tmp_path / "teachers" / "alive.lock"):
        assert [path.name for path in remove_unfinished(tmp_path)] == [".dead.12.part"]
    assert {path.name for path in (tmp_path / "teachers").iterdir() if path.is_dir()} == {
        ".alive.13.part",
        "whole",
    }
    assert remove_unfinished(tmp_path / "nowhere") == []


def test_a_stage_whose_process_was_killed_leaves_nothing_beside_its_student(tmp_path):
    from harness.running.runner import _delete_partial_files

    (tmp_path / ".student.7.part").mkdir()
    (tmp_path / ".done.json.7.part").write_text("{")
    (tmp_path / "student").mkdir()
    _delete_partial_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


TTY = "needs a pseudo-terminal"


@pytest.mark.slow
def test_sigterm_ends_every_process_shows_the_cursor_and_says_how_to_go_on(tmp_path):
    pty = pytest.importorskip("pty", reason=TTY)
    ours, theirs = pty.openpty()
    line = [
        "run",
        "--methods",
        "sft",
        "--no-controls",
        "--suite",
        "mini",
        "--grid",
        "none",
        "--noise",
        "0",
        "--limit",
        "2",
        "--budget",
        "5000000",
        "--out",
        tmp_path / "runs",
        "--cache",
        tmp_path / "cache",
    ]
    process = cli_process(*line, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    output = b""
    deadline = time.monotonic() + 120
    while b" train" not in output:
        assert time.monotonic() < deadline and process.poll() is None, output[-500:]
        output += os.read(ours, 65536)
    process.send_signal(signal.SIGTERM)
    while chunk := _read(ours):
        output += chunk
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    text = output.decode()
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0, "the cursor is shown again"
    last = " ".join(text.rsplit("harness: ", 1)[1].split())
    assert last.startswith(
        "stopped (SIGTERM); finished work is kept; to go on, type: harness run --methods sft"
    )
    survivors = [
        path
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if str(tmp_path).encode() in _bytes(path)
    ]
    assert not survivors


def _read(number):
    try:
        return os.read(number, 65536)
    except OSError:  # its other end is closed
        return b""


def _bytes(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
def test_a_cell_that_takes_longer_than_it_may_is_a_failed_row_and_the_others_go_on(tmp_path):
    import harness

    run = harness.run(
        ["identity"],
        "mini",
        cell_timeout=0.4,
        out=tmp_path / "runs",
        cache=tmp_path / "cache",
        grid="none",
        noise=0,
    )
    assert [result.record.status for result in run.cells] == ["failed", "failed"]
    for result in run.cells:
        assert (
            result.record.reason == "stopped after 0.4 s (--cell-timeout); give a longer time "
            "and run again, to continue from the last saved state"
        )
    again = [
        cell.key
        for cell in harness.api.plan_run(
            harness.planning.config.build_config(
                {
                    "methods": ["identity"],
                    "suite": ["mini"],
                    "grid": "none",
                    "noise": 0,
                    "out": tmp_path / "runs",
                    "cache": tmp_path / "cache",
                }
            )
        ).cells
    ]
    assert again == [result.cell.key for result in run.cells], (
        "how long a cell may take is no part of its key"
    )
