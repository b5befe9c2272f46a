"""The snippets of docs/llm/transformers.md."""

from __future__ import annotations

import pytest

from tests.snippets import run_snippets
from vzip.runtime import demo
from vzip.runtime.cli.main import main

pytestmark = pytest.mark.local_llm


@pytest.mark.slow
def test_the_page_runs(tmp_path, capsys):
    bundle = tmp_path / "bundle"
    assert main(["export", "--model", "demo", "--no-check", "-o", str(bundle)]) == 0
    picture = sorted(demo.pictures().glob("*.jpg"))[0]
    replaced = {"llava-64": str(bundle), "photo.jpg": str(picture), "llava-1.5-7b": "demo"}
    names = run_snippets("llm/transformers.md", replaced)
    assert names["answer"]
    assert names["second"]
    assert names["answer"] in capsys.readouterr().out
    assert len(names["answers"]) == len(names["texts"]) == len(names["made"]) == 2
