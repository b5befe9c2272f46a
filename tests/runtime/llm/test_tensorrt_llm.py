"""TensorRT-LLM's three ways, against oracles of what each of them does with what it gets."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.runtime.llm.llm_server_stubs import (
    CONTRACTS,
    VOCABULARY,
    bundle_of,
    checkpoint_of,
    embedded,
    embeds_of,
    serving,
)
from vzip.runtime.errors import CheckpointError, InvalidInputError, MissingDependencyError
from vzip.runtime.llm.conversation import expand
from vzip.runtime.llm.experimental.tensorrt_llm import open_llm, prompt_table, request
from vzip.runtime.llm.local.transformers import TransformersLLM
from vzip.runtime.llm.text_checkpoint import TextCheckpoint

CONTRACT = CONTRACTS["tensorrt_llm"]
LEGACY = CONTRACTS["tensorrt_llm_legacy"]
QUESTION = "What digit is there?"
PARTS = [embeds_of(43, seed=1), embeds_of(5, seed=2)]
ENGINE = {"vocab_size": VOCABULARY, "max_multimodal_len": 48, "dtype": "float16"}


@pytest.fixture(scope="module")
def reference() -> TransformersLLM:
    return TransformersLLM.open("demo")


@pytest.fixture(scope="module")
def llava_15() -> TextCheckpoint:
    return TextCheckpoint.open("trtllm", "demo")


@pytest.fixture
def llava_next(tmp_path: Path) -> TextCheckpoint:
    folder = checkpoint_of(tmp_path / "next", model_type="llava_next")
    return TextCheckpoint.open("trtllm", folder)


@pytest.mark.parametrize("embeds", [PARTS[0], PARTS])
def test_the_llm_api_makes_the_prompt_of_transformers(llava_next, embeds):
    made = request(llava_next, embeds, QUESTION)
    assert set(made) == set(CONTRACT["prompt"])
    assert set(made["multi_modal_embeddings"]) == set(CONTRACT["modalities"])
    tensors = made["multi_modal_embeddings"]["image"]
    # attach_multimodal_embeddings: the tokenizer's own ids, then one placeholder per tensor becomes
    # as many ids as it has rows.
    ids = llava_next.tokenizer.encode(made["prompt"], special=True)
    assert ids.count(4) == len(tensors)
    fused, left = [], iter(tensors)
    for token in ids:
        fused += [4] * len(next(left)) if token == 4 else [token]
    shown = llava_next.shown(embeds, dtype="float16", takes_videos=False)
    assert fused == expand(llava_next.prompts, shown, QUESTION)
    for tensor, part in zip(tensors, shown.parts, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), part)


def test_the_beginning_of_the_sequence_is_written_once(tmp_path: Path):
    """A template may write it, and so does the tokenizer that the engine runs over the text."""
    folder = checkpoint_of(tmp_path / "next", model_type="llava_next")
    template = folder / "chat_template.jinja"
    template.write_text("<s>" + template.read_text())
    checkpoint = TextCheckpoint.open("trtllm", folder)
    text = request(checkpoint, PARTS[0], QUESTION)["prompt"]
    assert not text.startswith("<s>")
    assert checkpoint.tokenizer.encode(text, special=True).count(1) == 1
    checkpoint.tokenizer.encode = lambda text, *, special: [4]
    checkpoint.prompts._tokenizer.encode = checkpoint.tokenizer.encode
    checkpoint.prompts.first = lambda *_: [1, 4]
    with pytest.raises(CheckpointError, match=r"^trtllm: the tokenizer of .* makes other ids"):
        request(checkpoint, PARTS[0], QUESTION)


def test_the_llm_api_takes_llava_next_alone(llava_15):
    with pytest.raises(InvalidInputError, match=r"^trtllm: 'demo' is a 'llava' model, but") as got:
        request(llava_15, PARTS[0], QUESTION)
    assert "LLaVA-NeXT alone; use a bundle of one, such as llava-next-mistral-7b" in str(got.value)


@pytest.mark.parametrize("embeds", [PARTS[0], PARTS])
@pytest.mark.parametrize("runner", ["ModelRunner", "ModelRunnerCpp"])
def test_the_prompt_table_makes_the_prompt_of_transformers(reference, llava_15, embeds, runner):
    made = prompt_table(llava_15, embeds, QUESTION, **ENGINE)
    assert set(made) <= set(LEGACY["generate"])
    (ids,) = made["batch_input_ids"]
    assert ids.dtype == torch.int32
    assert made["prompt_table"].dtype == torch.float16
    (task,) = (int(each) for each in made["prompt_tasks"].split(","))
    if runner == "ModelRunner":  # flattens; an id counts from its task's first row
        rows = made["prompt_table"].shape[-2]
        table = made["prompt_table"].view(-1, 128)[task * rows : (task + 1) * rows]
    else:
        table = made["prompt_table"][task]
    words = ids < VOCABULARY
    with torch.no_grad():
        prompt = reference.model.get_input_embeddings()(torch.where(words, ids, 0)).clone()
    prompt[~words] = table[ids[~words].long() - VOCABULARY].float()
    shown = llava_15.shown(embeds, dtype="float16", takes_videos=False)
    rows = np.concatenate([part.astype(np.float16) for part in shown.parts])
    expected = embedded(reference, expand(reference.prompts, shown, QUESTION), rows)
    torch.testing.assert_close(prompt, expected, rtol=0, atol=0)
    assert made["end_id"] == reference.prompts.eos_id


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"max_multimodal_len": 42},
            "got 43 tokens of 1 images, but the engine's prompt table",
        ),
        ({"max_multimodal_len": 0}, "trtllm-build --max_multimodal_len 43 or more"),
        ({"vocab_size": 100}, "and a vocabulary of 100, beyond which ids are places of images"),
        (
            {"dtype": "fp16"},
            "got the dtype 'fp16', expected the engine's, one of float32",
        ),
        ({"embeds": PARTS[0] * 1e5}, "the LLM's dtype holds at most 65504"),
        ({"embeds": PARTS[0][:, :9]}, "got tokens of shape [43, 9]"),
        ({"question": ""}, "the question is empty"),
        ({"question": "<image>"}, "has 2 image placeholders"),
    ],
)
def test_what_is_checked_before_a_legacy_call(llava_15, changes, words):
    arguments = {"embeds": PARTS[0], "question": QUESTION, **ENGINE, **changes}
    with pytest.raises(InvalidInputError, match=r"^trtllm: ") as got:
        prompt_table(llava_15, **arguments)
    assert words in str(got.value)


def test_frames_are_images(llava_15):
    made = prompt_table(llava_15, embeds_of(12), QUESTION, frames=3, **ENGINE)
    assert made["prompt_table"].shape == (1, 12, 128)
    assert (made["batch_input_ids"][0] >= VOCABULARY).sum() == 12


def test_the_server_gets_what_it_reads():
    embeds = [embeds_of(43, seed=1), embeds_of(43, seed=2).astype(np.float16)]
    event = {"choices": [{"delta": {"content": "a cat"}, "finish_reason": "stop"}]}
    pages = {"/v1/models": {"data": [{"id": "llava-next"}]}}
    with serving(pages, "/v1/chat/completions", lambda _: iter([event])) as (url, bodies):
        llm = open_llm(url, bundle_of(family="llava-next"))
        conversation = llm.conversation(embeds)
        assert conversation.ask(QUESTION) == "a cat"
        with pytest.raises(InvalidInputError, match=r"^trtllm: the question contains '<image>'"):
            conversation.ask("an <image>?")
        with pytest.raises(InvalidInputError, match=r"^trtllm: got tokens of shape \[42, 128\]"):
            llm.conversation(embeds_of(42))
    (body,) = bodies
    *parts, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": QUESTION}
    for part, sent in zip(parts, embeds, strict=True):
        assert set(part) == set(CONTRACT["part"])
        assert part["type"] == CONTRACT["part"]["type"]
        assert set(part["image_embeds"]) == set(CONTRACT["part"]["image_embeds"])
        data = io.BytesIO(base64.b64decode(part["image_embeds"]["data"], validate=True))
        got = torch.load(data, weights_only=True, map_location="cpu")  # load_base64_image_embeds
        assert got.numpy().dtype == sent.dtype
        np.testing.assert_array_equal(got.numpy(), sent)


def test_the_server_takes_llava_next_alone():
    with pytest.raises(InvalidInputError, match=r"^trtllm: 'demo' is a 'llava' model, but of "):
        open_llm("http://127.0.0.1:1", bundle_of())


def test_torch_is_asked_for_before_the_server(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"^trtllm: making tensors needs .* 'torch'"):
        open_llm("http://127.0.0.1:1", bundle_of(family="llava-next"))


def test_dtypes_a_checkpoint_may_have(tmp_path: Path):
    folder = checkpoint_of(tmp_path / "next", dtype="float64")
    with pytest.raises(CheckpointError, match=r"^trtllm: .* says that its dtype is 'float64'"):
        TextCheckpoint.open("trtllm", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert TextCheckpoint.open("trtllm", folder).dtype == "bfloat16"
