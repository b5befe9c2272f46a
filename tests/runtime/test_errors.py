"""Errors have fields, and one place makes one line of them."""

from __future__ import annotations

import ast
import importlib
import pickle
import re
from collections.abc import Iterator

import pytest

from tests import house
from tests.refusals import refused, says
from vzip.runtime import console
from vzip.runtime.errors import InvalidInputError, VzipError, missing
from vzip.runtime.files.codec import MisfitError
from vzip.runtime.service.admission import RefusedError

FIELDS = {"got", "expected", "cause", "cure"}
OF_HTTP = {"status", "code", "retry_after"}  # what a service's refusal has besides


def kinds() -> set[type[VzipError]]:
    """Every class of error, wherever it is defined."""
    for module, path in house.modules().items():
        if any(f"({each}" in path.read_text("utf-8") for each in ("VzipError", "BackendError")):
            importlib.import_module("vzip." + ".".join(module).removesuffix(".__init__"))

    def below(kind: type[VzipError]) -> Iterator[type[VzipError]]:
        yield kind
        for each in kind.__subclasses__():
            yield from below(each)

    return {each for each in below(VzipError) if each.__module__.startswith("vzip.")}


def test_every_kind_renders_in_one_line_and_crosses_processes() -> None:
    found = kinds()
    assert len(found) >= 9
    for kind in found - {MisfitError}:
        fields = {"expected": "that", "cause": "a cause\n  of two lines", "cure": "do it"}
        besides = {"status": 429, "code": "busy", "retry_after": 2}
        if not issubclass(kind, RefusedError):
            besides = {}
        error = kind("got\nthis ", **fields, **besides)
        assert str(error) == "got this, expected that; a cause of two lines; do it"
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind
        assert str(again) == str(error)
        assert {name: getattr(again, name) for name in besides} == besides
        says(again, got="got\nthis ", expected="that", cause="two lines", cure="do it")


def test_a_misfit_renders_in_one_line_and_crosses_processes() -> None:
    error = MisfitError("manifest.json", "a.b", "is\n1", "2")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "manifest.json: 'a.b' is 1, expected 2"
    assert (type(again), again.place, again.fault) == (MisfitError, "a.b", "is\n1")


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({}, "a fault"),
        ({"expected": "x"}, "a fault, expected x"),
        ({"cause": "y"}, "a fault; y"),
        ({"expected": "x", "cure": "z"}, "a fault, expected x; z"),
    ],
)
def test_empty_fields_are_left_out(fields: dict[str, str], line: str) -> None:
    assert str(VzipError("a fault", **fields)) == line


def test_no_call_makes_a_line_by_itself() -> None:
    """Every field is a phrase: no full stop, no line break, no field's text in another's."""
    names = {kind.__name__ for kind in kinds() - {MisfitError}}
    for path in house.modules().values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id not in names:
                continue
            where = f"{path}:{node.lineno}"
            assert len(node.args) <= 1, where
            assert {each.arg for each in node.keywords} <= FIELDS | OF_HTTP | {None}, where
            for value in (*node.args, *(each.value for each in node.keywords)):
                for part in ast.walk(value):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        assert "\n" not in part.value, where
                        assert ", expected " not in part.value, where
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    assert re.search(r"\w\.$", value.value) is None, where


def test_a_command_line_prints_the_line_and_no_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command() -> int:
        raise InvalidInputError("--tokens is 0", expected="1 or more", cure="give --tokens 64")

    assert console.run_command(command, prog="vzip ask") == console.FAILED
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == ("vzip ask: error: --tokens is 0, expected 1 or more; give --tokens 64\n")


def test_what_is_not_installed_is_named_with_its_extra() -> None:
    error = missing("onnxruntime", needed_for="vzip check", extra="export")
    says(error, got=("vzip check", "'onnxruntime'"), cure="pip install 'vzip[export]'")


def test_a_refusal_of_another_kind_or_field_is_not_taken_for_the_right_one() -> None:
    with pytest.raises(AssertionError, match="is not in cure"), refused(VzipError, cure="give"):
        raise VzipError("give")
    with pytest.raises(VzipError), refused(InvalidInputError, got="a"):
        raise VzipError("a")
