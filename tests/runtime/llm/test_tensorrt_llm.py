"""TensorRT-LLM's three ways: a golden request, the prompt of transformers, and what is refused."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.refusals import refused
from tests.runtime.llm.llm_server_stubs import (
    REQUESTS,
    VOCABULARY,
    bundle_of,
    checkpoint_of,
    embedded,
    embeds_of,
    serving,
)
from vzip.runtime.errors import CheckpointError, InvalidInputError, MissingDependencyError
from vzip.runtime.llm import TokenSpec
from vzip.runtime.llm.experimental.tensorrt_llm import TrtllmServer, open_for, prompt_table, request
from vzip.runtime.llm.local.transformers import TransformersLLM
from vzip.runtime.llm.text_side import TextCheckpoint

GOLDEN = REQUESTS["tensorrt_llm"]
QUESTION = "What digit is there?"
PARTS = [embeds_of(3, seed=1), embeds_of(2, seed=2)]
ENGINE = {"vocab_size": VOCABULARY, "max_multimodal_len": 48, "dtype": "float16"}


@pytest.fixture(scope="module")
def llava_15() -> TextCheckpoint:
    return TextCheckpoint.open("trtllm", "demo")


@pytest.fixture
def llava_next(tmp_path: Path) -> TextCheckpoint:
    folder = checkpoint_of(tmp_path / "next", model_type="llava_next")
    return TextCheckpoint.open("trtllm", folder)


def test_the_server_gets_the_golden_request():
    event = {"choices": [{"delta": {"content": "a cat"}, "finish_reason": "stop"}]}
    pages = {"/v1/models": {"data": [{"id": "llava-next"}]}}
    content = GOLDEN["body"]["messages"][0]["content"]
    embeds = [np.array(each["image_embeds"]["data"], np.float32) for each in content[:2]]
    with serving(pages, "/v1/chat/completions", lambda _: iter([event])) as (url, bodies):
        llm = TrtllmServer(url, TokenSpec(2, 2, 4))
        assert llm.ask(embeds, QUESTION, max_new_tokens=9) == "a cat"
        half = llm.part(embeds[0].astype(np.float16), "name")["image_embeds"]["data"]
    (body,) = bodies
    for part in body["messages"][0]["content"][:2]:
        part["image_embeds"]["data"] = loaded(part["image_embeds"]["data"]).tolist()
    assert body == GOLDEN["body"]
    assert loaded(half).dtype == torch.float16


def loaded(data: str) -> torch.Tensor:
    """As inputs/utils.py load_base64_image_embeds."""
    file = io.BytesIO(base64.b64decode(data, validate=True))
    tensor: torch.Tensor = torch.load(file, weights_only=True, map_location="cpu")
    return tensor


def test_the_llm_api_gets_the_golden_prompt(llava_next, tmp_path):
    made = request(llava_next, PARTS, QUESTION)
    assert made.keys() == {"prompt", "multi_modal_embeddings"}
    assert made["prompt"] == GOLDEN["prompt"]
    images = made["multi_modal_embeddings"]["image"]
    for tensor, part in zip(images, PARTS, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), part)
    # A template may write the beginning of the sequence, and so does the tokenizer.
    folder = checkpoint_of(tmp_path / "bos", model_type="llava_next")
    template = folder / "chat_template.jinja"
    template.write_text("<s>" + template.read_text())
    written = TextCheckpoint.open("trtllm", folder)
    assert request(written, PARTS, QUESTION)["prompt"] == GOLDEN["prompt"]
    written.prompts.tokenizer.encode = lambda text, *, special: [4] if special else [1]
    written.prompts.first = lambda *_: [1, 4]
    with refused(CheckpointError, got="tokenizer", cure="--llm"):
        request(written, PARTS[0], QUESTION)


def test_the_prompt_table_makes_the_prompt_of_transformers(llava_15):
    made = prompt_table(llava_15, PARTS, QUESTION, **ENGINE)
    assert (made["prompt_tasks"], made["end_id"]) == (GOLDEN["prompt_tasks"], 2)
    (ids,) = made["batch_input_ids"]
    assert ids.dtype == torch.int32
    words = ids < VOCABULARY
    assert ids[~words].tolist() == GOLDEN["places"]
    assert made["prompt_table"].shape == (1, 5, 128)
    assert made["prompt_table"].dtype == torch.float16
    reference = TransformersLLM.open("demo")
    with torch.no_grad():
        prompt = reference.model.get_input_embeddings()(torch.where(words, ids, 0)).clone()
    prompt[~words] = made["prompt_table"][0][ids[~words].long() - VOCABULARY].float()
    shown = llava_15.shown(PARTS, largest=65504)
    rows = np.concatenate([part.astype(np.float16) for part in PARTS])
    expected = embedded(reference, reference.text.first(shown, QUESTION), rows)
    torch.testing.assert_close(prompt, expected, rtol=0, atol=0)
    frames = prompt_table(llava_15, embeds_of(12), QUESTION, frames=3, **ENGINE)
    assert (frames["batch_input_ids"][0] >= VOCABULARY).sum() == 12


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"max_multimodal_len": 2}, {"got": "3 tokens", "cure": "--max_multimodal_len 3"}),
        ({"vocab_size": 100}, {"got": "vocabulary of 100"}),
        ({"dtype": "fp16"}, {"got": "'fp16'", "expected": "float32"}),
        ({"embeds": PARTS[0] * 1e5}, {"expected": "65504"}),
        ({"question": ""}, {"got": "the question is empty"}),
        ({"question": "<image>"}, {"got": "2 image placeholders"}),
    ],
)
def test_what_is_checked_before_a_legacy_call(llava_15, changes, fields):
    arguments = {"embeds": PARTS[0], "question": QUESTION, **ENGINE, **changes}
    with refused(InvalidInputError, **fields):
        prompt_table(llava_15, **arguments)


def test_llava_next_alone_is_taken_and_torch_is_asked_for_first(llava_15, monkeypatch):
    for call in (
        lambda: request(llava_15, PARTS[0], QUESTION),
        lambda: open_for("http://127.0.0.1:1", bundle_of()),
    ):
        with refused(InvalidInputError, got=("'demo'", "'llava'"), cure="llava-next-mistral-7b"):
            call()
    monkeypatch.setitem(sys.modules, "torch", None)
    with refused(MissingDependencyError, got=("trtllm", "'torch'")):
        open_for("http://127.0.0.1:1", bundle_of(family="llava-next"))
