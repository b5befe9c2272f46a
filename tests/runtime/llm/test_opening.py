"""What `--llm` can name, and `vzip.runtime.open_llm`."""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace

import pytest

from tests.places import GOLDEN
from tests.refusals import refused
from vzip import runtime
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.errors import CheckpointError, InvalidInputError
from vzip.runtime.llm.opening import RUNNERS, LlmChoice, own, parse


def bundle_from(model: str, revision: str | None = None):
    return SimpleNamespace(
        manifest=SimpleNamespace(model=SimpleNamespace(id=model, revision=revision), files={})
    )


def test_the_llm_is_the_one_that_the_bundle_was_exported_from():
    published = bundle_from("llava-hf/llava-1.5-7b-hf", "abc")
    assert own(published) == LlmChoice("transformers", "llava-hf/llava-1.5-7b-hf", "abc")
    with refused(CheckpointError, got="'/gone/llava'", cure="--llm"):
        own(bundle_from("/gone/llava"))


@pytest.mark.parametrize("whole", [True, False])
def test_open_llm_opens_what_is_named_for_a_bundle_or_its_folder(monkeypatch, whole):
    opened = []
    module = types.ModuleType("fake")
    module.open_for = lambda where, bundle: opened.append((where, bundle.path)) or "an LLM"
    monkeypatch.setitem(sys.modules, RUNNERS["vllm"].module, module)
    folder = GOLDEN / "tiny_bundle"
    bundle = read_bundle(folder) if whole else folder
    assert runtime.open_llm(bundle, "vllm:http://127.0.0.1:8000") == "an LLM"
    assert opened == [("http://127.0.0.1:8000", folder)]
    with refused(InvalidInputError, got="'vllm:'"):
        runtime.open_llm("/not/read", "vllm:")


@pytest.mark.parametrize(
    ("text", "name", "where"),
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
def test_a_name_and_what_it_opens(text, name, where):
    assert parse(text) == LlmChoice(name, where)


def test_a_folder_whose_name_has_a_colon(tmp_path, monkeypatch):
    (tmp_path / "a:b").mkdir()
    assert parse(f"{tmp_path}/a:b") == LlmChoice("transformers", f"{tmp_path}/a:b")
    monkeypatch.chdir(tmp_path)
    assert parse("./a:b") == LlmChoice("transformers", "./a:b")
    assert parse("a:b") == LlmChoice("transformers", "a:b")


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("llamacpp:m.gguf", {"got": "'llamacpp'", "expected": "llama.cpp:FILE.gguf"}),
        ("lama.cpp:/models/m.gguf", {"got": "'lama.cpp'", "expected": "llama.cpp:FILE.gguf"}),
        ("vllm:", {"expected": "vllm:URL"}),
        ("vllm:127.0.0.1:8000", {"expected": "vllm:http://127.0.0.1:8000"}),
        ("llama.cpp: ", {"expected": "llama.cpp:FILE.gguf"}),
    ],
)
def test_what_is_refused_before_any_work(text, fields):
    with refused(InvalidInputError, **fields):
        parse(text)


@pytest.mark.parametrize("text", ["transformers:lava-1.5-7b", "lava-1.5-7b"])
def test_an_alias_that_is_misspelt(text):
    with pytest.raises(CheckpointError, match=r"'llava-1\.5-7b'"):
        parse(text)


def test_every_llm_has_a_module_of_its_own():
    assert len({runner.module for runner in RUNNERS.values()}) == len(RUNNERS)
