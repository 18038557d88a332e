"""Each exercise of the README turns its test red: the function's body is replaced by
NotImplementedError, the test runs, and fails with that error."""

import ast
import importlib
import re
from pathlib import Path
from types import CodeType, FunctionType

import pytest
from hypothesis import Phase, settings

pytestmark = pytest.mark.docs

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXERCISES = re.findall(r"^\| \d+ \| `([\w/]+\.py)` `([\w.]+)` \|.*\| `(tests/\w+\.py::\w+)` \|$",
                       README, re.MULTILINE)


def definition(tree: ast.Module, name: str) -> ast.FunctionDef:
    """The function "f" or "Class.f" of a parsed file."""
    node = tree
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return node


def without_body(path: Path, name: str) -> CodeType:
    """The code of the function with its own arguments, but the body raises NotImplementedError."""
    function = definition(ast.parse(path.read_text(encoding="utf-8")), name)
    function.body = ast.parse(f"raise NotImplementedError('{name}')").body
    function.decorator_list, function.returns = [], None
    arguments = function.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = None  # would need the file's imports
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(None) for default in arguments.kw_defaults]
    space = {}
    module = ast.fix_missing_locations(ast.Module([function], []))
    exec(compile(module, str(path), "exec"), space)
    return space[function.name].__code__


def function_of(file: str, name: str) -> FunctionType:
    function = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        function = getattr(function, part)
    return getattr(function, "__wrapped__", function)  # behind @torch.no_grad() and the like


SETTINGS = "_hypothesis_internal_use_settings"  # where hypothesis keeps a test's @settings


class Reports:
    """Collects the results of an inner run of pytest."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failures, self.passed, self.monkeypatch = [], 0, monkeypatch

    def pytest_collection_modifyitems(self, items: list) -> None:
        """Keeps hypothesis from shrinking a failure to the smallest example: that takes minutes."""
        for item in items:
            given = getattr(item.obj, SETTINGS, None)
            if given:
                short = settings(given, phases=[Phase.generate])
                self.monkeypatch.setattr(item.obj, SETTINGS, short)

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.failures.append(str(report.longrepr))
        self.passed += report.passed and report.when == "call"


def run(node: str, monkeypatch: pytest.MonkeyPatch) -> Reports:
    reports = Reports(monkeypatch)
    options = ["-p", "no:terminal", "-p", "no:cacheprovider", "-o", "addopts=", "-x"]
    pytest.main([str(ROOT / node), *options, "--rootdir", str(ROOT)], plugins=[reports])
    return reports


def test_there_are_eight_exercises_or_more():
    assert len(set(EXERCISES)) == len(EXERCISES) >= 8
    assert len(re.findall(r"^\| \d+ \| `", README, re.MULTILINE)) == len(EXERCISES)


@pytest.mark.parametrize("file, name, node", EXERCISES)
def test_the_test_turns_red_when_the_body_is_deleted(file, name, node, monkeypatch):
    function, empty = function_of(file, name), without_body(ROOT / file, name)
    whole = function.__code__
    assert whole.co_filename == str(ROOT / file) and not function.__closure__
    function.__code__ = empty  # the function itself, so that every import of it sees the change
    try:
        reports = run(node, monkeypatch)
    finally:
        function.__code__ = whole
    assert len(reports.failures) == 1 and f"NotImplementedError: {name}" in reports.failures[0]


def test_with_its_body_the_test_is_green(monkeypatch):
    reports = run(EXERCISES[1][2], monkeypatch)
    assert reports.failures == [] and reports.passed > 0
