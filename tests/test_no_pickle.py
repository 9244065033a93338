"""Nothing is unpickled, anywhere: what a file or a peer says can never become code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("benchmarks", "docker", "fl_*", "regularizers", "strategies")
MODULES = (
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal",
    "pickletools", "shelve",
)  # fmt: skip
METHODS = {"read_pickle": "of pandas", "to_pickle": "of pandas"}


def objections(source: str) -> list[str]:
    """Each use of pickle in this source, or of what reads pickles, with its line."""
    return [f"line {n.lineno}: {text}" for n in ast.walk(ast.parse(source)) for text in _in(n)]


def _in(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [f"import {a.name}" for a in node.names if a.name.split(".")[0] in MODULES]
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        names = [f"{module}.{a.name}".strip(".") for a in node.names]
        named = [n for n in names if set(n.split(".")) & {*MODULES, *METHODS}]
        # Under another name a call could not be told: these are called as torch.load, numpy.load.
        loose = [n for n in names if n in ("torch.load", "numpy.load", "yaml.load")]
        return [f"import {name}" for name in named + loose]
    if isinstance(node, ast.Attribute) and node.attr in (*MODULES, *METHODS):
        return [ast.unparse(node)]
    if not isinstance(node, ast.Call):
        return []
    called = ast.unparse(node.func)
    given = {k.arg: ast.unparse(k.value) for k in node.keywords}
    if called in ("__import__", "importlib.import_module", "import_module"):
        names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
        return [f"import {n}" for n in names if str(n).split(".")[0] in MODULES]
    if called == "torch.load":
        return [] if given.get("weights_only") == "True" else [f"{called} without weights_only"]
    if given.get("allow_pickle", "False") != "False":
        return [f"{called} with allow_pickle"]
    if called.endswith(("np.load", "numpy.load")) and len(node.args) > 2:
        return [f"{called} with allow_pickle"]
    safe = ("yaml.safe_load", "yaml.safe_load_all")
    if re.fullmatch(r"yaml\.\w*load\w*", called) and called not in safe:
        return [called]
    return []


def files() -> list[Path]:
    return sorted(f for pattern in PACKAGES for d in ROOT.glob(pattern) for f in d.rglob("*.py"))


def test_no_product_file_uses_pickle():
    found = {str(f.relative_to(ROOT)): objections(f.read_text()) for f in files()}
    assert len(found) > 100
    assert {name for name in found if name.startswith("fl_client/")}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, pickle as p",
        "def f():\n    import _pickle",
        "import cloudpickle.compat",
        "from pickle import loads",
        "from six.moves import cPickle",
        "from multiprocessing.reduction import pickle",
        "import dill",
        "import shelve",
        "import marshal",
        "from joblib import load",
        "from torch import load",
        "from numpy import load as f",
        "__import__('pickle')",
        "importlib.import_module('dill')",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)",
        "numpy.load(f, allow_pickle=True)",
        "np.load(f, None, True)",
        "np.lib.format.read_array(f, allow_pickle=flag)",
        "np.save(f, x, allow_pickle=True)",
        "pandas.read_pickle(f)",
        "frame.to_pickle(f)",
        "torch.serialization.pickle.loads(b)",
        "yaml.load(f)",
        "yaml.load(f, yaml.Loader)",
        "yaml.unsafe_load(f)",
        "yaml.full_load_all(f)",
    ],
)
def test_the_check_sees(source: str):
    assert len(objections(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f, weights_only=True)",
        "np.load(f)",
        "np.load(f, allow_pickle=False)",
        "json.load(f)",
        "yaml.safe_load(f).values()",
        "safetensors.torch.load(b)",
        "# pickle\n'pickle'",
    ],
)
def test_the_check_lets_pass(source: str):
    assert objections(source) == []
