"""Installs the stand-in card in each Python process of a run when torch is imported there.

It needs `PYTHONPATH=tests/gpu/stand_in`.

`HARNESS_LACKS=nltk,evaluate` lets these packages be missing, as they are on a bare machine.
"""

import importlib.abc
import importlib.util
import os
import sys


class _AfterTorch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torch as usual, then lets `card` install itself."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        import card  # noqa: F401  installs itself


class _Missing(importlib.abc.MetaPathFinder):
    """Finds none of the packages that this machine shall lack."""

    lacks = frozenset(filter(None, os.environ.get("HARNESS_LACKS", "").split(",")))

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.lacks:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if _Missing.lacks:
    sys.meta_path.insert(0, _Missing())
if os.environ.get("HARNESS_STAND_IN_CARD"):
    sys.meta_path.insert(0, _AfterTorch())
