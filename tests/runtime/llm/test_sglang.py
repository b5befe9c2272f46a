"""SGLang's native server: a stand-in for it, with the demo model's LLM behind it."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.llms import needed
from tests.runtime.llm.llm_server_stubs import (
    CONTRACTS,
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
from vzip.runtime.llm.conversation import expand
from vzip.runtime.llm.experimental.sglang import _LLAVAS, SglangLLM, generate_request, open_llm
from vzip.runtime.llm.local.transformers import TransformersLLM
from vzip.runtime.llm.text_checkpoint import TextCheckpoint

CONTRACT = CONTRACTS["sglang"]
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
    """Start a stand-in: the server's own checks, and the demo LLM behind them."""

    def start(model_info=MODEL_INFO, **server_info):
        info = {**SERVER_INFO, **server_info}

        def answer(body):
            # What http_server.py and io_struct.py do with a request.
            assert set(body) <= set(CONTRACT["request"])
            assert set(body["sampling_params"]) <= set(CONTRACT["sampling"])
            assert body.get("text") is None
            assert body.get("input_ids") is None
            assert body["stream"] is True
            assert body["sampling_params"]["temperature"] == 0
            assert isinstance(body["input_embeds"][0][0], float)
            prompt = torch.tensor(body["input_embeds"])
            most = body["sampling_params"]["max_new_tokens"]
            ids: list[int] = []
            for token in greedy(reference, prompt, most):
                ids.append(token)
                ended = token in body["sampling_params"]["stop_token_ids"]
                reason = "stop" if ended else "length" if len(ids) == most else None
                yield {
                    "text": None,
                    "output_ids": [token] if info["incremental_streaming_output"] else ids,
                    "meta_info": {
                        "completion_tokens": len(ids),
                        "finish_reason": None if reason is None else {"type": reason},
                    },
                }

        return serving({"/model_info": model_info, "/server_info": info}, "/generate", answer)

    return start


@pytest.mark.parametrize("incremental", [False, True])
def test_the_answers_are_those_of_transformers(sglang, reference, incremental):
    embeds = embeds_of(43)
    with sglang(incremental_streaming_output=incremental) as (url, bodies):
        conversation = open_llm(url, bundle_of()).conversation(embeds)
        expected = reference.conversation(embeds)
        counts = []
        for question in QUESTIONS:
            pieces = list(conversation.stream(question, max_new_tokens=12))
            assert "".join(pieces) == expected.ask(question, max_new_tokens=12)
            assert all(pieces)
            counts.append(len(pieces))
        assert max(counts) > 1, "no answer was streamed"
    # The reference's cache lacks the last predicted id, which ended the answer and is in ours.
    assert conversation.ids[-1] in reference.eos_ids
    assert conversation.ids[: len(expected.ids)] == expected.ids
    lengths = [len(body["input_embeds"]) for body in bodies]
    assert lengths == sorted(set(lengths)), "every question carries all turns"


def test_an_answer_cut_short_is_closed(sglang, reference):
    embeds = embeds_of(43, seed=3)
    with sglang() as (url, bodies):
        conversation = open_llm(url, bundle_of()).conversation(embeds)
        expected = reference.conversation(embeds)
        assert conversation.ask(QUESTIONS[0], max_new_tokens=1) == expected.ask(
            QUESTIONS[0], max_new_tokens=1
        )
        cut = conversation.ids[-1]
        assert cut not in reference.eos_ids
        assert conversation.ask(QUESTIONS[1], max_new_tokens=9) == expected.ask(
            QUESTIONS[1], max_new_tokens=9
        )
    place = len(bodies[0]["input_embeds"])
    assert conversation.ids[place : place + 2] == (cut, reference.prompts.eos_id)


def test_embeddings_are_those_of_the_llm(sglang, reference):
    parts = [embeds_of(43, seed=1), embeds_of(43, seed=2).astype(np.float16)]
    with sglang() as (url, _):
        llm = open_llm(url, bundle_of())
    shown = llm.checkpoint.shown(parts, dtype="bfloat16", takes_videos=True)
    ids = expand(llm.checkpoint.prompts, shown, QUESTIONS[0])
    made = llm.embeddings([*ids, 4, 7], shown)  # behind the images a placeholder is a word
    assert made.dtype == np.float32
    assert made.shape == (len(ids) + 2, WIDTH)
    rows = np.concatenate(parts)
    expected = embedded(reference, ids, rows).numpy()
    np.testing.assert_array_equal(made[: len(ids)], expected)
    table = reference.model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(made[-2:], table[[4, 7]])
    with pytest.raises(InvalidInputError, match=r"sglang: got a prompt with the id 431.* 0 to 430"):
        llm.embeddings([*ids, VOCABULARY], shown)


def test_a_placeholder_needs_no_embedding_of_its_own(sglang, monkeypatch):
    """LLaVA-NeXT's 32000 is one past a vocabulary of 32000 that nobody extended."""
    with sglang() as (url, _):
        llm = open_llm(url, bundle_of())
    monkeypatch.setitem(llm.checkpoint.prompts._tokens, "image", ("<image>", VOCABULARY))
    rows = embeds_of(2)
    shown = Shown("image", (rows,))
    made = llm.embeddings([1, VOCABULARY, VOCABULARY, 7], shown)
    np.testing.assert_array_equal(made[1:3], rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_table_is_read_from_any_checkpoint(tmp_path: Path, dtype, sharded):
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
    table = TextCheckpoint.open("sglang", folder).table()
    ids = [430, 0, 17, 17]
    np.testing.assert_array_equal(table.rows(ids), tensors[name][ids].float().numpy())
    assert table.rows(ids).dtype == np.float32


def test_a_checkpoint_without_its_table(tmp_path: Path):
    folder = checkpoint_of(tmp_path / "llava")
    checkpoint = TextCheckpoint.open("sglang", folder)
    with pytest.raises(CheckpointError, match=r"sglang: '.*model.safetensors' is not there, but"):
        checkpoint.table()
    (folder / "model.safetensors").write_bytes(b"\x10" + bytes(30))
    with pytest.raises(CheckpointError, match=r"sglang: .* holds no readable table"):
        checkpoint.table()
    save_file({"embed_tokens.weight": torch.ones(9, 7)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"of width 7, expected 128"):
        checkpoint.table()
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "b"}}')
    with pytest.raises(CheckpointError, match=r"names 0 files with …embed_tokens.weight, expected"):
        checkpoint.table()
    save_file({"embed_tokens.weight": torch.ones(9, WIDTH)}, tmp_path / "model.safetensors")
    index.write_text('{"weight_map": {"embed_tokens.weight": "../model.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"is not there"):
        checkpoint.table()


def test_the_bundles_checkpoint_must_be_here(tmp_path: Path):
    gone = str(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"^sglang: needs the tokenizer and token embeddings"):
        open_llm("http://127.0.0.1:1", bundle_of(gone))
    folder = checkpoint_of(tmp_path / "text")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config["text_config"], "dtype": "float16"}))
    with pytest.raises(CheckpointError, match=r"^sglang: .* is a 'llama' model .* no image token"):
        TextCheckpoint.open("sglang", folder)
    folder = checkpoint_of(tmp_path / "no template", model_type="llava_next")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"^sglang: '.*' is a 'llava_next' .* and no chat te"):
        TextCheckpoint.open("sglang", folder)
    folder = checkpoint_of(tmp_path / "other width")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInputError, match=r"^sglang: the bundle makes tokens of width 128"):
        open_llm("http://127.0.0.1:1", bundle_of(str(folder)))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"^sglang: the text side of .* can't be read"):
        open_llm("http://127.0.0.1:1", bundle_of(str(folder)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"disable_radix_cache": False}, "start it with --disable-radix-cache"),
        ({"dtype": "float16"}, "with --dtype float16, but SGLang casts embeddings to bfloat16"),
        ({"dtype": "auto"}, "start it with --dtype bfloat16"),
        (
            {"model_info": {"architectures": ["LlavaForConditionalGeneration"]}},
            "serves LlavaForConditionalGeneration, whose forward in SGLang takes no embeddings",
        ),
    ],
)
def test_a_server_that_would_fail_is_refused(sglang, changes, words):
    with sglang(**changes) as (url, _), pytest.raises(InvalidInputError, match=r"^sglang: ") as got:
        open_llm(url, bundle_of())
    assert words in str(got.value)


def test_transformers_own_llava_may_be_served(sglang):
    info = {"architectures": ["LlavaForConditionalGeneration"]}
    with sglang(info, model_impl="transformers") as (url, _):
        assert isinstance(open_llm(url, bundle_of()), SglangLLM)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"error": {"message": "too long"}}, "failed while answering: too long"),
        ({"error": "out of memory"}, "failed while answering: out of memory"),
        ({"output_ids": [7], "meta_info": {"finish_reason": {"type": "abort"}}}, "'abort'"),
        ({"output_ids": [7], "meta_info": {"finish_reason": None}}, "broke off"),
        ({"choices": []}, "it is no SGLang server"),
    ],
)
def test_a_failed_answer_is_taken_back(event, words):
    pages = {"/model_info": MODEL_INFO, "/server_info": SERVER_INFO}
    whole = words != "broke off"
    with serving(pages, "/generate", lambda _: iter([event]), whole=whole) as (url, _):
        conversation = open_llm(url, bundle_of()).conversation(embeds_of(43))
        with pytest.raises(BackendError, match=r"^sglang: the server at ") as got:
            conversation.ask(QUESTIONS[0])
        assert words in str(got.value)
        assert conversation.ids == ()


def test_what_is_checked_before_a_call(sglang):
    with sglang() as (url, bodies):
        llm = open_llm(url, bundle_of())
        with pytest.raises(InvalidInputError, match=r"^sglang: got tokens of shape \[42, 128\]"):
            llm.conversation(embeds_of(42))
        conversation = llm.conversation(embeds_of(43))
        for question, most, words in (
            (" ", 9, "the question is empty"),
            ("what?", 0, "got a limit of 0"),
            ("an <image>?", 9, "has 2 image placeholders"),
            ("what?", 1000, "the LLM's context takes 1024"),
        ):
            with pytest.raises(InvalidInputError, match=r"^sglang: ") as got:
                conversation.stream(question, max_new_tokens=most)
            assert words in str(got.value)
        left = conversation.stream("what?", max_new_tokens=9)
        next(left)
        conversation.ask("and?", max_new_tokens=2)
        with pytest.raises(InvalidInputError, match="left behind by a later question"):
            next(left)
    assert len(bodies) == 2


def test_a_request_needs_finite_embeddings():
    good = embeds_of(2)
    assert generate_request(good, eos_ids=[2])["input_embeds"] == good.tolist()
    for bad in (good[0], good.astype(np.float64), good[:0], good * np.nan):
        with pytest.raises(InvalidInputError, match=r"^sglang: got a prompt of float"):
            generate_request(bad, eos_ids=[2])


def test_the_contract_names_the_classes_that_are_refused():
    assert set(CONTRACT["no_input_embeds"]) == set(_LLAVAS)


@pytest.mark.local_llm
def test_sglangs_own_contract_takes_it():
    """Its JSON schema, and the fields of its dataclass; neither needs a GPU."""
    needed("sglang")
    (root,) = importlib.util.find_spec("sglang").submodule_search_locations
    spec = importlib.util.spec_from_file_location("api_types", Path(root, "api/v1/api_types.py"))
    schema = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(schema)
    body = generate_request(embeds_of(3), eos_ids=[2], max_new_tokens=5, stream=True)
    read = schema.GenerateRequest.from_json_value(json.loads(json.dumps(body)))
    assert read.stream is True
    assert (read.text, read.input_ids) == (None, None)
    sampling = read.sampling_params
    assert (sampling.max_new_tokens, sampling.temperature) == (5, 0)
    assert sampling.stop_token_ids == [2]
    module = ast.parse(Path(root, "srt/managers/io_struct.py").read_text())
    fields = {
        line.target.id
        for each in module.body
        if isinstance(each, ast.ClassDef) and each.name in ("BaseReq", "GenerateReqInput")
        for line in each.body
        if isinstance(line, ast.AnnAssign)
    }
    assert set(body) <= set(CONTRACT["request"]) <= fields
    classes = ast.parse(Path(root, "srt/models/llava.py").read_text()).body
    forwards = {
        each.name: {argument.arg for argument in function.args.args}
        for each in classes
        if isinstance(each, ast.ClassDef)
        for function in each.body
        if isinstance(function, ast.FunctionDef) and function.name == "forward"
    }
    assert "LlavaForConditionalGeneration" in forwards
    assert not any("input_embeds" in arguments for arguments in forwards.values())


def test_the_page_writes_the_llm_alone(tmp_path: Path, reference):
    """The page's recipe on the demo: what SGLang serves has the LLaVA's own LLM."""
    import transformers

    names = run_snippets(
        "engines/sglang.md",
        {
            "llava-1.5-7b-llm": str(tmp_path / "llm"),
            "llava-hf/llava-1.5-7b-hf": str(demo.checkpoint()),
        },
    )
    config = json.loads((tmp_path / "llm/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llm", dtype="float32")
    rounded = reference.model.get_input_embeddings().weight.bfloat16().float()
    torch.testing.assert_close(alone.get_input_embeddings().weight, rounded, rtol=0, atol=0)
    head = reference.model.lm_head.weight.bfloat16().float()
    torch.testing.assert_close(alone.lm_head.weight, head, rtol=0, atol=0)
    prompt = torch.tensor(embeds_of(7))[None]
    with torch.no_grad():
        close = alone(inputs_embeds=prompt).logits - reference.model(inputs_embeds=prompt).logits
    assert float(close.abs().max()) < 0.5, "bfloat16 weights, nothing else"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "llm")
    assert tokenizer.eos_token_id == reference.prompts.eos_id
    assert names["llava"].config.model_type == "llava"
