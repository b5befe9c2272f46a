"""SGLang's native server: a golden request, and a stand-in with the demo model's LLM behind it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.refusals import refused
from tests.runtime.llm.llm_server_stubs import (
    REQUESTS,
    VOCABULARY,
    WIDTH,
    bundle_of,
    checkpoint_of,
    embedded,
    embeds_of,
    greedy,
    serving,
)
from tests.snippets import run_snippets
from vzip.runtime import demo
from vzip.runtime.errors import BackendError, CheckpointError, InvalidInputError
from vzip.runtime.llm import Shown
from vzip.runtime.llm.experimental.embedding_table import EmbeddingTable
from vzip.runtime.llm.experimental.sglang import SglangLLM, generate_request, open_for
from vzip.runtime.llm.local.transformers import TransformersLLM
from vzip.runtime.llm.text_side import TextCheckpoint

GOLDEN_BODY = REQUESTS["sglang"]["body"]
QUESTIONS = ("What is there?", "What color is it?", "Where is the circle?")
MODEL_INFO = {"architectures": ["LlamaForCausalLM"], "is_generation": True}
SERVER_INFO = {
    "disable_radix_cache": True,
    "dtype": "bfloat16",
    "incremental_streaming_output": False,
    "model_impl": "auto",
}


@pytest.fixture(scope="module")
def reference() -> TransformersLLM:
    return TransformersLLM.open("demo")


@pytest.fixture
def sglang(reference: TransformersLLM):
    """Start a stand-in, with the demo LLM behind it."""

    def start(model_info=MODEL_INFO, **server_info):
        info = {**SERVER_INFO, **server_info}

        def answer(body):
            assert body.keys() == GOLDEN_BODY.keys()
            sampling = body["sampling_params"]
            ids: list[int] = []
            for token in greedy(
                reference, torch.tensor(body["input_embeds"]), sampling["max_new_tokens"]
            ):
                ids.append(token)
                ended = token in sampling["stop_token_ids"]
                cut = len(ids) == sampling["max_new_tokens"]
                reason = "stop" if ended else "length" if cut else None
                yield {
                    "text": None,
                    "output_ids": [token] if info["incremental_streaming_output"] else ids,
                    "meta_info": {"finish_reason": None if reason is None else {"type": reason}},
                }

        return serving({"/model_info": model_info, "/server_info": info}, "/generate", answer)

    return start


def test_the_golden_request():
    embeds = np.array(GOLDEN_BODY["input_embeds"], np.float32)
    body = generate_request(embeds, eos_ids=[7, 2], max_new_tokens=5, stream=True)
    assert json.loads(json.dumps(body)) == GOLDEN_BODY
    for bad in (embeds[0], embeds.astype(np.float64), embeds[:0], embeds * np.nan):
        with refused(InvalidInputError, got=str(bad.dtype), expected="[m, L]"):
            generate_request(bad, eos_ids=[2])


@pytest.mark.parametrize("incremental", [False, True])
def test_the_answers_are_those_of_transformers(sglang, reference, incremental):
    embeds = embeds_of(43)
    with sglang(incremental_streaming_output=incremental) as (url, bodies):
        conversation = open_for(url, bundle_of()).conversation(embeds)
        expected = reference.conversation(embeds)
        for question, most in zip(QUESTIONS, (12, 1, 12), strict=True):
            pieces = list(conversation.stream(question, max_new_tokens=most))
            assert "".join(pieces) == expected.ask(question, max_new_tokens=most)
            assert all(pieces)
        conversation.stream("what?", max_new_tokens=9)
    assert conversation.ids[: len(expected.ids)] == expected.ids
    assert len(bodies) == 3, "an answer that nobody reads is not asked for"
    lengths = [len(body["input_embeds"]) for body in bodies]
    assert lengths == sorted(set(lengths)), "every question carries all turns"


def test_embeddings_are_those_of_the_llm(sglang, reference, monkeypatch):
    parts = [embeds_of(43, seed=1), embeds_of(43, seed=2).astype(np.float16)]
    with sglang() as (url, _):
        llm = open_for(url, bundle_of())
    shown = llm.checkpoint.shown(parts, largest=1e9)
    ids = llm.checkpoint.first(shown, QUESTIONS[0])
    made = llm.embeddings([*ids, 4, 7], shown)  # behind the images a placeholder is a word
    assert made.dtype == np.float32
    expected = embedded(reference, ids, np.concatenate(parts)).numpy()
    np.testing.assert_array_equal(made[: len(ids)], expected)
    table = reference.model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(made[-2:], table[[4, 7]])
    with refused(InvalidInputError, got="431", expected="430"):
        llm.embeddings([*ids, VOCABULARY], shown)
    # LLaVA-NeXT's placeholder is one past a vocabulary that nobody extended.
    monkeypatch.setitem(llm.checkpoint.prompts._tokens, "image", ("<image>", VOCABULARY))
    rows = embeds_of(2)
    made = llm.embeddings([1, VOCABULARY, VOCABULARY, 7], Shown("image", (rows,)))
    np.testing.assert_array_equal(made[1:3], rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_table_is_read_from_any_checkpoint(tmp_path, dtype, sharded):
    folder = checkpoint_of(tmp_path / "llava")
    tensors = load_file(demo.checkpoint() / "model.safetensors")
    (name,) = (each for each in tensors if each.endswith("embed_tokens.weight"))
    tensors[name] = tensors[name].to(dtype)
    if sharded:
        save_file({name: tensors[name]}, folder / "model-00002-of-00002.safetensors")
        index = {"weight_map": {"other": "absent", name: "model-00002-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, folder / "model.safetensors")
    table = EmbeddingTable.of(TextCheckpoint.open("sglang", folder))
    ids = [430, 0, 17, 17]
    np.testing.assert_array_equal(table.rows(ids), tensors[name][ids].float().numpy())


def test_a_checkpoint_that_is_not_whole(tmp_path):
    gone = str(tmp_path / "gone")
    with refused(CheckpointError, got=("sglang: ", gone), expected="tokenizer"):
        open_for("http://127.0.0.1:1", bundle_of(gone))
    folder = checkpoint_of(tmp_path / "llava")
    checkpoint = TextCheckpoint.open("sglang", folder)
    with refused(CheckpointError, got="model.safetensors' is not there"):
        EmbeddingTable.of(checkpoint)
    (folder / "model.safetensors").write_bytes(b"\x10" + bytes(30))
    with refused(CheckpointError, got=str(folder / "model.safetensors")):
        EmbeddingTable.of(checkpoint)
    save_file({"embed_tokens.weight": torch.ones(9, 7)}, folder / "model.safetensors")
    with refused(CheckpointError, got="7", expected=str(WIDTH)):
        EmbeddingTable.of(checkpoint)
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "b"}}')
    with refused(CheckpointError, got=(str(index), "0 files"), expected="1"):
        EmbeddingTable.of(checkpoint)
    save_file({"embed_tokens.weight": torch.ones(9, WIDTH)}, tmp_path / "model.safetensors")
    index.write_text('{"weight_map": {"embed_tokens.weight": "../model.safetensors"}}')
    with refused(CheckpointError, got="is not there"):
        EmbeddingTable.of(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2**40, WIDTH]},
        {"shape": [9, WIDTH, 1]},
        {"shape": [2] * 100_000},
        {"shape": [-9, -WIDTH]},
        {"shape": [10**1000, WIDTH]},
        {"shape": [9.0, WIDTH]},
        {"data_offsets": [0, 36 * WIDTH + 4]},
        {"data_offsets": [-4, 36 * WIDTH - 4]},
        {"data_offsets": [4, 36 * WIDTH + 4]},
        {"data_offsets": [2**63, 2**63 + 36 * WIDTH]},
        {"dtype": "F8_E4M3"},
        {"dtype": ["F32"]},
    ],
)
def test_a_table_whose_header_lies(tmp_path, change):
    folder = checkpoint_of(tmp_path / "llava")
    entry = {"dtype": "F32", "shape": [9, WIDTH], "data_offsets": [0, 36 * WIDTH], **change}
    header = json.dumps({"embed_tokens.weight": entry}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(36 * WIDTH)
    (folder / "model.safetensors").write_bytes(data)
    with refused(CheckpointError, got="no readable table", cure="whole checkpoint"):
        EmbeddingTable.of(TextCheckpoint.open("sglang", folder))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8, 0, 1])
@pytest.mark.parametrize("content", [b"{}", b"[" * 100_000, b'{"embed_tokens.weight": 7}'])
def test_a_table_without_a_header(tmp_path, length, content):
    folder = checkpoint_of(tmp_path / "llava")
    said = len(content) if length == 1 else length
    (folder / "model.safetensors").write_bytes(said.to_bytes(8, "little") + content)
    with refused(CheckpointError, got="no readable table"):
        EmbeddingTable.of(TextCheckpoint.open("sglang", folder))


LLAVA = {"architectures": ["LlavaForConditionalGeneration"]}


def test_a_server_that_would_fail_is_refused(sglang):
    for changes, got, cure in (
        ({"disable_radix_cache": False}, "prefix cache", "--disable-radix-cache"),
        ({"dtype": "float16"}, "--dtype float16", "--dtype bfloat16"),
        ({"dtype": "auto"}, "--dtype auto", "--dtype bfloat16"),
        ({"model_info": LLAVA}, "LlavaForConditionalGeneration", "docs/llm/sglang.md"),
    ):
        with sglang(**changes) as (url, _), refused(InvalidInputError, got=got, cure=cure):
            open_for(url, bundle_of())
    with sglang(LLAVA, model_impl="transformers") as (url, _):  # transformers' own takes embeddings
        assert isinstance(open_for(url, bundle_of()), SglangLLM)


def test_a_failed_answer_is_taken_back():
    pages = {"/model_info": MODEL_INFO, "/server_info": SERVER_INFO}
    ids = {"output_ids": [7]}
    for event, words in (
        ({"error": {"message": "too long"}}, "too long"),
        ({"error": "out of memory"}, "out of memory"),
        ({**ids, "meta_info": {"finish_reason": {"type": "abort"}}}, "'abort'"),
        ({**ids, "meta_info": {"finish_reason": None}}, "broke off"),
        ({"choices": []}, "choices"),
        ({"output_ids": [7] * 1000, "meta_info": {"finish_reason": None}}, "1000 tokens"),
        ({"output_ids": [1e999], "meta_info": {"finish_reason": None}}, "no piece"),
    ):
        whole = words != "broke off"
        with serving(pages, "/generate", lambda _, e=event: iter([e]), whole=whole) as (url, _):
            conversation = open_for(url, bundle_of()).conversation(embeds_of(43))
            with refused(BackendError, got=("sglang: ", words)):
                conversation.ask(QUESTIONS[0])
            assert conversation.ids == ()


def test_the_page_writes_the_llm_alone(tmp_path, reference):
    """The page's recipe on the demo: what SGLang serves has the LLaVA's own LLM."""
    import transformers

    replaced = {"llava-1.5-7b-llm": str(tmp_path / "llm")}
    run_snippets("llm/sglang.md", {**replaced, "llava-hf/llava-1.5-7b-hf": str(demo.checkpoint())})
    config = json.loads((tmp_path / "llm/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
    alone = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "llm", dtype="float32", trust_remote_code=False
    )
    for ours, theirs in (
        (alone.get_input_embeddings(), reference.model.get_input_embeddings()),
        (alone.lm_head, reference.model.lm_head),
    ):
        expected = theirs.weight.bfloat16().float()
        torch.testing.assert_close(ours.weight, expected, rtol=0, atol=0)
    prompt = torch.tensor(embeds_of(7))[None]
    with torch.no_grad():
        close = alone(inputs_embeds=prompt).logits - reference.model(inputs_embeds=prompt).logits
    assert float(close.abs().max()) < 0.5, "bfloat16 weights, nothing else"
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        tmp_path / "llm", trust_remote_code=False
    )
    assert tokenizer.eos_token_id == reference.text.prompts.eos_id
