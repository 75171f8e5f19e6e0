"""Rows that other libraries pack: whatever a library raises is one line of its own row. The
libraries are planted, none is needed.
"""

import importlib
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

import methods
import suites
from harness.contract import Budget, Job
from harness.data.source import LocalOrHubData
from harness.errors import CellFailed, HarnessError, Skipped
from harness.registry import Registry
from methods.compression.external import (
    explaining_library_errors,
    require_package,
    save_library_student,
)

REGISTRY = Registry("method", methods.METHODS)
LIBRARIES = {
    "nf4": "bitsandbytes",
    "bnb-int8": "bitsandbytes",
    "torchao": "torchao",
    "quanto": "optimum-quanto",
}


class Foreign(Exception):
    """A library's own."""


class Panic(BaseException):
    """What bindings of other languages raise: no `Exception`."""


class Mute(Exception):
    """One that cannot be written."""

    def __str__(self):
        raise TypeError("no text")


RAISED = {
    "assertion": AssertionError(),
    "index": IndexError("index 3 is out of bounds"),
    "key": KeyError("w1"),
    "exit": SystemExit(3),
    "import": ImportError("libcuda.so.1: cannot open\nshared object file"),
    "module": ModuleNotFoundError("No module named 'triton'"),
    "file": FileNotFoundError(2, "No such file", "kernels.so"),
    "division": ZeroDivisionError("division by zero"),
    "stop": StopIteration(),
    "foreign": Foreign("first line\nsecond line\n" + "x" * 900),
    "panic": Panic("unwrap on None"),
    "mute": Mute(),
    "type": TypeError("bad"),
    "not built": NotImplementedError("no kernel"),
    "runtime": RuntimeError("CUDA error: invalid argument"),
    "value": ValueError("64"),
    "recursion": RecursionError("maximum recursion depth exceeded"),
    "text": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
}


@pytest.fixture
def job(random_model, tmp_path):
    return Job(
        teachers=(random_model,),
        student="untouched",
        student_base=random_model,
        tasks={"mmlu-mini": suites.load("mmlu-mini")},
        source=LocalOrHubData(),
        budget=Budget(seen_tokens=100, rows=4),
        seed=1,
        workdir=tmp_path,
        cache=tmp_path / "cache",
    )


@pytest.fixture
def unversioned(monkeypatch):
    """Hide the versions of libraries that are installed beside their stand-ins."""
    hidden = SimpleNamespace(
        version=lambda name: metadata.version(f"no-such-{name}"),
        PackageNotFoundError=metadata.PackageNotFoundError,
    )
    monkeypatch.setattr("methods.compression.external.metadata", hidden)


@pytest.fixture
def planted(tmp_path, monkeypatch, unversioned):
    """Plant stand-ins for the libraries; return a function that says what packing raises."""
    folder = tmp_path / "site"
    for name, text in {
        "bitsandbytes": "",
        "optimum": "",
        "optimum/quanto": "qint2 = qint4 = qint8 = None\ndef freeze(model): pass\nclass QLinear: "
        "pass\n",
        "torchao": "",
        "torchao/quantization": "def __getattr__(name): return lambda **_: name\n",
    }.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    # what an earlier test has loaded hides the stand-ins
    packages = ("bitsandbytes", "optimum", "torchao")
    loaded = {
        name: sys.modules.pop(name)
        for name in list(sys.modules)
        if name.partition(".")[0] in packages
    }
    import transformers

    plain = transformers.AutoModelForCausalLM.from_pretrained
    for name in ("TorchAoConfig", "BitsAndBytesConfig"):
        monkeypatch.setattr(transformers, name, lambda *_, **__: "settings", raising=False)

    def packing(problem):
        def fail(*_, **__):
            raise problem

        def opened(*parts, quantization_config=None, **named):
            return fail() if quantization_config is not None else plain(*parts, **named)

        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", opened)
        monkeypatch.setattr(
            importlib.import_module("optimum.quanto"), "quantize", fail, raising=False
        )

    yield packing
    for name in list(sys.modules):
        if name.partition(".")[0] in packages:
            del sys.modules[name]
    sys.modules.update(loaded)


@pytest.mark.parametrize("kind", RAISED)
@pytest.mark.parametrize("name", LIBRARIES)
def test_whatever_a_library_raises_while_packing_is_one_line(name, kind, planted, job):
    planted(RAISED[kind])
    with pytest.raises(CellFailed) as caught:
        REGISTRY.build(name, {}).compress(job)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500 and not isinstance(caught.value, Skipped)
    # what it was given
    assert (
        message.startswith(name) and LIBRARIES[name] in message and "failed on random (" in message
    )
    assert type(RAISED[kind]).__name__ in message and message.endswith(
        ("use int8 or int4", "use int8 or int4, which need no library")
    )
    assert ("pip install --upgrade 'compression-harness[quant]'" in message) == isinstance(
        RAISED[kind], ImportError
    )
    assert not (Path(job.workdir) / "student").exists()


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize(
    "problem",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        OSError(28, "No space left on device"),
        KeyboardInterrupt(),
        HarnessError("ours"),
        CellFailed("ours too"),
    ],
    ids=repr,
)
def test_a_full_machine_and_our_own_lines_are_told_as_everywhere(name, problem, planted, job):
    planted(problem)
    with pytest.raises(type(problem)) as caught:
        REGISTRY.build(name, {}).compress(job)
    assert caught.value is problem


@pytest.mark.parametrize(
    ("name", "module"), [("torchao", "torchao/quantization"), ("quanto", "optimum/quanto")]
)
@pytest.mark.parametrize(
    "line",
    [
        "import no_such_kernel",
        "raise AttributeError('torch has no _x')",
        "raise SystemExit('old')",
        "1 / 0",
        "from os import no_such_name",
    ],
)
def test_a_library_that_cannot_be_imported_is_one_line(name, module, line, planted, job, tmp_path):
    planted(ValueError("never reached"))
    (tmp_path / "site" / module / "__init__.py").write_text(line + "\n")
    for known in [one for one in sys.modules if one.partition(".")[0] == module.partition("/")[0]]:
        del sys.modules[known]
    importlib.invalidate_caches()
    for cached in (tmp_path / "site").rglob("*.pyc"):
        cached.unlink()
    with pytest.raises(CellFailed, match=f"^{name}.*{LIBRARIES[name]} failed on random") as caught:
        REGISTRY.build(name, {}).compress(job)
    assert ("pip install" in str(caught.value)) == ("import" in line)


@pytest.mark.parametrize("at", ["save", "answer"])
@pytest.mark.parametrize("kind", ["assertion", "panic", "import", "foreign"])
def test_what_a_library_raises_while_saving_or_answering_is_one_line(
    at, kind, job, monkeypatch, unversioned
):
    from methods.compression.base import StudentBuilder

    making = StudentBuilder(job, "torchao", plain=True)

    def fail(*_, **__):
        raise RAISED[kind]

    monkeypatch.setattr(making.model, "save_pretrained" if at == "save" else "forward", fail)
    with pytest.raises(CellFailed, match=r"^torchao: torchao failed on random") as caught:
        save_library_student(making, making.model, {"library": "torchao"})
    assert (
        type(RAISED[kind]).__name__ in str(caught.value)
        and not (Path(job.workdir) / "student").exists()
    )


def test_a_part_of_a_package_that_is_not_there_is_skipped():
    for name in ("no_such_library", "no_such_library.quanto", "harness.no_such_part"):
        with pytest.raises(Skipped, match="pip install 'compression-harness"):
            require_package(name, "quant")
    require_package("json.decoder", "quant")


def test_what_goes_well_stays_as_it_is(random_model):
    with explaining_library_errors("torchao", "torchao", random_model):
        pass
    with (
        pytest.raises(CellFailed, match=r"pytest \d+\.\d+.* failed on random \(KeyError: 1\)"),
        explaining_library_errors("m", "pytest", random_model),
    ):
        raise KeyError(1)
    with (
        pytest.raises(CellFailed, match=r"compression-harness\[gptq\]"),
        explaining_library_errors("gptq", "optimum+gptqmodel", random_model),
    ):
        raise ImportError("x")
