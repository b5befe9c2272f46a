"""LMDeploy's TurboMind: what its lowest level takes, against an oracle of what it does with it."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engines import needed
from tests.handoff.engine_stubs import (
    CONTRACTS,
    VOCABULARY,
    checkpoint_of,
    embedded,
    embeds_of,
)
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.handoff import lmdeploy
from vzip.runtime.handoff.decoding import expand
from vzip.runtime.handoff.lmdeploy import stream_infer_inputs
from vzip.runtime.handoff.text_checkpoint import TextCheckpoint
from vzip.runtime.handoff.transformers import TransformersLLM

CONTRACT = CONTRACTS["lmdeploy"]
QUESTION = "What digit is there?"
PARTS = [embeds_of(43, seed=1), embeds_of(5, seed=2)]


@pytest.fixture(scope="module")
def reference() -> TransformersLLM:
    return TransformersLLM.open("demo")


@pytest.fixture(scope="module")
def checkpoint() -> TextCheckpoint:
    return TextCheckpoint.open("lmdeploy", "demo")


@pytest.mark.parametrize("embeds", [PARTS[0], PARTS])
def test_the_engine_makes_the_prompt_of_transformers(reference, checkpoint, embeds):
    inputs = stream_infer_inputs(checkpoint, embeds, QUESTION, dtype="float16")
    assert set(inputs) <= set(CONTRACT["async_stream_infer"])
    ids, ranges = inputs["input_ids"], inputs["input_embedding_ranges"]
    assert type(ids) is list
    assert all(0 <= each < VOCABULARY for each in ids), "the engine looks them up first"
    # TurboMind: token embeddings, then each tensor over its range, the end excluded.
    with torch.no_grad():
        made = reference.model.get_input_embeddings()(torch.tensor(ids)).clone()
    assert len(ranges) == len(inputs["input_embeddings"])
    for (begin, end), tensor in zip(ranges, inputs["input_embeddings"], strict=True):
        assert tensor.shape == (end - begin, 128)
        made[begin:end] = tensor
    shown = checkpoint.shown(embeds, dtype="float16", takes_videos=True)
    expected = embedded(
        reference, expand(reference.prompts, shown, QUESTION), np.concatenate(shown.parts)
    )
    torch.testing.assert_close(made, expected, rtol=0, atol=0)


def test_frames_are_images_to_an_llm_without_videos(checkpoint):
    inputs = stream_infer_inputs(checkpoint, embeds_of(12), QUESTION, dtype="bfloat16", frames=3)
    assert [end - begin for begin, end in inputs["input_embedding_ranges"]] == [4, 4, 4]


def test_a_placeholder_need_not_be_a_row_of_the_table(tmp_path: Path):
    """LLaVA-NeXT's may lie one past the vocabulary: no dummy id is taken from it."""
    folder = checkpoint_of(tmp_path / "llava", model_type="llava_next")
    checkpoint = TextCheckpoint.open("lmdeploy", folder)
    inputs = stream_infer_inputs(checkpoint, PARTS[0], QUESTION, dtype="float16")
    ((begin, end),) = inputs["input_embedding_ranges"]
    assert set(inputs["input_ids"][begin:end]) == {0}


@pytest.mark.parametrize(
    ("embeds", "question", "dtype", "words"),
    [
        (PARTS[0], QUESTION, "float32", "got the dtype 'float32', expected that of TurboMind"),
        (PARTS[0], " ", "float16", "the question is empty"),
        (PARTS[0], "an <image>?", "float16", "has 2 image placeholders"),
        (PARTS[0][0], QUESTION, "float16", "got tokens of shape [128]"),
        (PARTS[0] * 1e5, QUESTION, "float16", "the LLM's dtype holds at most 65504"),
    ],
)
def test_what_is_checked_before_a_call(checkpoint, embeds, question, dtype, words):
    with pytest.raises(InvalidInputError, match=r"^lmdeploy: ") as got:
        stream_infer_inputs(checkpoint, embeds, question, dtype=dtype)
    assert words in str(got.value)


def test_the_contract_lists_turbominds_dtypes():
    assert set(lmdeploy._DTYPES) == set(CONTRACT["dtypes"])


@pytest.mark.engine
def test_lmdeploys_own_code_takes_it(checkpoint, monkeypatch):
    """Its Python side, without the CUDA library that it hands the prompt to."""
    needed("lmdeploy")
    turbomind = _turbomind(monkeypatch)
    parameters = inspect.signature(turbomind.TurboMindInstance.async_stream_infer).parameters
    assert set(CONTRACT["async_stream_infer"]) <= set(parameters)
    instance = object.__new__(turbomind.TurboMindInstance)
    for dtype in CONTRACT["dtypes"]:
        instance.tm_model = types.SimpleNamespace(engine_config=types.SimpleNamespace(dtype=dtype))
        inputs = stream_infer_inputs(checkpoint, PARTS, QUESTION, dtype=dtype)
        made, length = instance.prepare_inputs(gen_config=None, **inputs)
        assert length == len(inputs["input_ids"])
        assert made["input_ids"].dtype == torch.int32
        assert made["input_embedding_ranges"].tolist() == inputs["input_embedding_ranges"]
        rows = torch.tensor(np.concatenate(PARTS)).to(getattr(torch, dtype))
        torch.testing.assert_close(made["input_embeddings"], rows, rtol=0, atol=0)


def _turbomind(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import lmdeploy.turbomind.turbomind where its CUDA library can't be loaded."""
    with contextlib.suppress(ImportError, AttributeError):
        return importlib.import_module("lmdeploy.turbomind.turbomind")
    for name in [each for each in sys.modules if each.startswith("lmdeploy.turbomind")]:
        monkeypatch.delitem(sys.modules, name)
    library = types.ModuleType("_turbomind")
    # Base classes and annotations of lmdeploy's; nothing of the library is called.
    library.__dict__.update(dict.fromkeys(("TokenizerInfo", "TensorMap", "Tensor"), object))
    monkeypatch.setitem(sys.modules, "lmdeploy.turbomind._turbomind", library)
    return importlib.import_module("lmdeploy.turbomind.turbomind")
