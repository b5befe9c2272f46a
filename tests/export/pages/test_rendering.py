"""The one way to a web page: what a template prints stays text, and what it lacks is an error."""

from __future__ import annotations

import sys

import pytest

from tests.pages import HOSTILE
from tests.refusals import refused
from vzip.export.pages.rendering import bar, code, digits, is_numeric, render, size
from vzip.runtime.errors import MissingDependencyError


def test_the_base_template_escapes_its_title() -> None:
    text = render("vzip.export.pages", "base.jinja", title=HOSTILE)
    assert HOSTILE not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2
    assert text.startswith("<!doctype html>")


def test_a_name_that_is_not_given_is_an_error() -> None:
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError, match="title"):
        render("vzip.export.pages", "base.jinja")


def test_html_is_made_of_escaped_text() -> None:
    assert code("<b>") == "<code>&lt;b&gt;</code>"
    assert (
        bar(2, kind='"><b>') == '<span class="bar &#34;&gt;&lt;b&gt;" style="width:8.00rem"></span>'
    )
    assert "width:0.00rem" in bar(-1)
    assert [is_numeric(each) for each in ("1", "−2", "–", "fp32", "", bar(1))] == [
        True, True, True, False, False, False,
    ]  # fmt: skip


def test_numbers_as_one_reads_them() -> None:
    assert (digits(0.5, 3), digits(None, 3)) == ("0.500", "–")
    assert [size(n) for n in (512, 2**20, 3 * 2**30)] == ["0.5 KiB", "1.0 MiB", "3.0 GiB"]


def test_without_jinja2_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with refused(MissingDependencyError, got="jinja2", cure="vzip[report]"):
        render("vzip.export.pages", "base.jinja", title="t")
