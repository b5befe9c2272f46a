"""What `--llm` can name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vzip.runtime.errors import CheckpointError, InvalidInputError
from vzip.runtime.llm.programs import ENGINES, Choice, own, parse


def bundle_from(model: str, revision: str | None = None):
    return SimpleNamespace(
        manifest=SimpleNamespace(model=SimpleNamespace(id=model, revision=revision), files={})
    )


def test_the_llm_is_the_one_that_the_bundle_was_exported_from():
    published = bundle_from("llava-hf/llava-1.5-7b-hf", "abc")
    assert own(published) == Choice("transformers", "llava-hf/llava-1.5-7b-hf", "abc")


def test_a_bundle_whose_checkpoint_is_gone_asks_for_llm():
    with pytest.raises(
        CheckpointError, match=r"exported from '/gone/llava', which is not here .* --llm"
    ):
        own(bundle_from("/gone/llava"))


@pytest.mark.parametrize(
    ("text", "engine", "where"),
    [
        ("demo", "transformers", "demo"),
        ("llava-hf/llava-1.5-7b-hf", "transformers", "llava-hf/llava-1.5-7b-hf"),
        ("transformers:demo", "transformers", "demo"),
        ("llama.cpp:/models/a:b.gguf", "llama.cpp", "/models/a:b.gguf"),
        ("onnxruntime:bundle", "onnxruntime", "bundle"),
        ("vllm:http://127.0.0.1:8000", "vllm", "http://127.0.0.1:8000"),
        ("sglang:https://host/v1", "sglang", "https://host/v1"),
    ],
)
def test_an_engine_and_what_it_opens(text, engine, where):
    assert parse(text) == Choice(engine, where)


def test_a_folder_whose_name_has_a_colon(tmp_path, monkeypatch):
    (tmp_path / "a:b").mkdir()
    assert parse(f"{tmp_path}/a:b") == Choice("transformers", f"{tmp_path}/a:b")
    monkeypatch.chdir(tmp_path)
    assert parse("./a:b") == Choice("transformers", "./a:b")
    assert parse("a:b") == Choice("transformers", "a:b")


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("llamacpp:m.gguf", InvalidInputError, "'llamacpp' is no engine, expected one of transfor"),
        ("lama.cpp:/models/m.gguf", InvalidInputError, "'lama.cpp' is no engine, expected one"),
        ("vllm:", InvalidInputError, "expected vllm:URL; say what"),
        ("vllm:127.0.0.1:8000", InvalidInputError, "such as vllm:http://127.0.0.1:8000; give"),
        ("llama.cpp: ", InvalidInputError, "expected llama.cpp:FILE.gguf"),
        ("transformers:lava-1.5-7b", CheckpointError, "did you mean 'llava-1.5-7b'"),
        ("lava-1.5-7b", CheckpointError, "did you mean 'llava-1.5-7b'"),
    ],
)
def test_what_is_refused_before_any_work(text, error, says):
    with pytest.raises(error) as caught:
        parse(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_engine_has_a_module_of_its_own():
    assert len({engine.module for engine in ENGINES.values()}) == len(ENGINES)
