"""The text side of a checkpoint: one reader, whoever runs the LLM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers

from tests.refusals import refused
from tests.runtime.llm.llm_server_stubs import checkpoint_of
from vzip.runtime import demo
from vzip.runtime.errors import CheckpointError, InvalidInputError, VzipError
from vzip.runtime.llm import TokenSpec
from vzip.runtime.llm.local.transformers import TransformersLLM
from vzip.runtime.llm.prompts import TURN_TOKENS
from vzip.runtime.llm.text_side import TextCheckpoint

DEMO = TokenSpec(43, 128, 4)


def said(opened, folder: Path, name: str) -> tuple[str, ...]:
    """Return the fields of what is refused, without the LLM's name."""
    with pytest.raises(VzipError) as raised:
        opened(folder)
    error = raised.value
    fields = (error.got, error.expected, error.cause, error.cure)
    assert error.got.startswith(f"{name}: ")
    return (type(error).__name__, *(each.removeprefix(f"{name}: ") for each in fields))


def without_template(folder: Path, model_type: str, llm: str) -> Path:
    checkpoint_of(folder, model_type=model_type)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["model_type"] = llm
    names = {
        "llava": "LlavaForConditionalGeneration",
        "video_llava": "VideoLlavaForConditionalGeneration",
        "llava_next": "LlavaNextForConditionalGeneration",
    }
    config["architectures"] = [names[model_type]]
    if model_type == "video_llava":
        config["video_token_index"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.mark.parametrize(
    ("model_type", "llm"), [("video_llava", "mistral"), ("llava_next", "llama")]
)
def test_both_readers_refuse_an_llm_in_whose_words_nobody_trained_it(tmp_path, model_type, llm):
    """Video-LLaVA was published with Vicuna alone: with Mistral it needs a chat template."""
    folder = without_template(tmp_path / "llava", model_type, llm)
    fields = said(lambda each: TextCheckpoint.open("vllm", each), folder, "vllm")
    assert fields == said(TransformersLLM.open, folder, "transformers")
    kind, got, *_, cure = fields
    assert kind == "CheckpointError"
    assert f"a '{model_type}' model with a '{llm}' LLM" in got
    assert "chat_template.jinja" in cure


@pytest.mark.parametrize(("model_type", "llm"), [("llava", "mistral"), ("video_llava", "llama")])
def test_llava_15s_words_are_those_without_a_template(tmp_path, model_type, llm):
    folder = without_template(tmp_path / "llava", model_type, llm)
    words = TextCheckpoint.open("vllm", folder).prompts.words
    assert words.first["image"].before == "USER: "
    assert ("video" in words.first) == (model_type == "video_llava")


def test_both_readers_say_the_same_of_the_demo():
    ours, theirs = TextCheckpoint.open("vllm", "demo"), TransformersLLM.open("demo").text
    assert ours.prompts.words == theirs.prompts.words
    assert ours.prompts.first("what?", "image", 2) == theirs.prompts.first("what?", "image", 2)
    for name in ("eos_ids", "hidden_size", "context"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_what_is_no_text_side_of_a_llava(tmp_path):
    folder = checkpoint_of(tmp_path / "text")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config["text_config"], "dtype": "float16"}))
    with refused(CheckpointError, got=("'llama' model", "no image token")):
        TextCheckpoint.open("vllm", folder)
    path.write_text(json.dumps({**config, "image_token_index": 5}))
    with refused(InvalidInputError, got="image token id", expected="4"):
        TextCheckpoint.open("vllm", folder, tokens=DEMO)
    path.write_text(json.dumps({**config, "dtype": "float64"}))
    with refused(CheckpointError, got="'float64'", expected="bfloat16"):
        TextCheckpoint.open("vllm", folder)
    path.write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert TextCheckpoint.open("vllm", folder, tokens=DEMO).dtype == "bfloat16"
    for damage in ({"image_token_index": "four"}, {"text_config": 7}):
        path.write_text(json.dumps({**config, **damage}))
        fields = said(lambda each: TextCheckpoint.open("vllm", each), folder, "vllm")
        assert fields == said(TransformersLLM.open, folder, "transformers")
        assert fields[0] == "CheckpointError"
    path.unlink()
    with refused(CheckpointError, got=str(folder), cure="llava-hf"):
        TextCheckpoint.open("vllm", folder)


@pytest.mark.parametrize("value", [10**9, 10**30, -1, 2.5, "2", True])
def test_sizes_that_no_llm_has_are_refused_before_a_list_of_layers_is_made(tmp_path, value):
    folder = tmp_path / "llava"
    checkpoint_of(folder, model_type="llava")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"model_type": "qwen2", "num_hidden_layers": value}
    (folder / "config.json").write_text(json.dumps(config))
    for opened in (lambda each: TextCheckpoint.open("vllm", each), TransformersLLM.open):
        with refused(CheckpointError, got=("text_config.num_hidden_layers", str(folder))):
            opened(folder)


@pytest.mark.parametrize("template", [True, False])
def test_an_image_s_id_that_is_another_token_than_the_template_s_word(tmp_path, template):
    folder = tmp_path / "llava"
    checkpoint_of(folder, model_type="llava")
    config = json.loads((folder / "config.json").read_text())
    right = config["image_token_index"]
    (folder / "config.json").write_text(json.dumps(config | {"image_token_index": 3}))
    if not template:
        (folder / "chat_template.jinja").unlink()
    for opened in (lambda each: TextCheckpoint.open("vllm", each), TransformersLLM.open):
        with refused(
            CheckpointError,
            got=("image, 3, is '<pad>'", f"'<image>', which is {right}"),
            cure=f"image_token_index in config.json to {right}",
        ):
            opened(folder)


def test_an_llm_that_transformers_does_not_know_is_named_without_the_list_of_all(tmp_path):
    folder = tmp_path / "llava"
    checkpoint_of(folder, model_type="llava")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["model_type"] = "nonsense"
    (folder / "config.json").write_text(json.dumps(config))
    with refused(CheckpointError, got="nonsense") as caught:
        TextCheckpoint.open("vllm", folder)
    assert "gpt" not in str(caught.value)


# ── where a chat template stands ─────────────────────────────────────────────────────────────────

TEMPLATE = "USER: <image>\n{{ messages[-1]['content'][-1]['text'] }} ASSISTANT:"
HOMES = {
    "chat_template.jinja": TEMPLATE,
    "chat_template.json": {"chat_template": TEMPLATE},
    "tokenizer_config.json": {"chat_template": TEMPLATE},
}


def homed(folder: Path, home: str, template: object) -> Path:
    """A copy of the demo's checkpoint whose template stands in one file."""
    shutil.copytree(demo.checkpoint(), folder)
    (folder / "chat_template.jinja").unlink()
    path = folder / home
    if isinstance(template, str):
        path.write_text(template)
    else:
        settings = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**settings, **template}))
    return folder


@pytest.mark.parametrize("home", HOMES)
def test_a_template_that_fails_is_named_by_its_file(home, tmp_path):
    folder = homed(tmp_path / "a", home, HOMES[home])
    assert TextCheckpoint.open("vllm", folder).prompts.words.first["image"].before == "USER: "
    broken = json.loads(json.dumps(HOMES[home]).replace("messages[-1]", "raise_exception('no')"))
    folder = homed(tmp_path / "b", home, broken)
    for opened in (lambda each: TextCheckpoint.open("vllm", each), TransformersLLM.open):
        with refused(CheckpointError, got=(home, str(folder), "TemplateError: no"), cure=home):
            opened(folder)


def named(**templates: str) -> dict:
    return {"chat_template": [{"name": n, "template": t} for n, t in templates.items()]}


def test_of_named_templates_the_default_is_taken(tmp_path):
    several = named(default=TEMPLATE, tool_use="{{ raise_exception('no') }}")
    folder = homed(tmp_path / "a", "tokenizer_config.json", several)
    assert TextCheckpoint.open("vllm", folder).files.template == TEMPLATE


def test_named_templates_without_a_default_are_named(tmp_path):
    folder = homed(tmp_path / "a", "tokenizer_config.json", named(rag=TEMPLATE, tool_use=TEMPLATE))
    with refused(CheckpointError, got="rag, tool_use", expected="'default'", cure="chat_template"):
        TextCheckpoint.open("vllm", folder)


@pytest.mark.parametrize("template", [7, ["a"], {"default": 7}])
def test_a_template_that_is_no_text_is_refused(template, tmp_path):
    folder = homed(tmp_path / "a", "chat_template.json", {"chat_template": template})
    with refused(CheckpointError):
        TextCheckpoint.open("vllm", folder)


def test_a_template_fails_before_weights_are_read(tmp_path):
    folder = homed(tmp_path / "a", "chat_template.jinja", "{{ 1 / 0 }}")
    (folder / "model.safetensors").write_bytes(b"not read")
    with refused(CheckpointError, got="ZeroDivisionError"):
        TransformersLLM.open(folder)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    folder = homed(tmp_path / "a", "chat_template.jinja", TEMPLATE)
    with (folder / "tokenizer.json").open("ab") as file:
        file.truncate(2**28 + 1)  # takes no room on the disk
    with refused(CheckpointError, got=("tokenizer.json", str(2**28 + 1))):
        TextCheckpoint.open("vllm", folder)


def test_without_generation_config_the_configuration_says_what_ends_answers(tmp_path):
    folder = Path(shutil.copytree(demo.checkpoint(), tmp_path / "a"))
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = [2, 7]
    (folder / "config.json").write_text(json.dumps(config))
    assert TextCheckpoint.open("vllm", folder).eos_ids == {2, 7}
    assert TransformersLLM.open(folder).text.eos_ids == {2, 7}
    del config["architectures"]  # as some configurations do
    (folder / "config.json").write_text(json.dumps(config))
    assert TransformersLLM.open(folder).text.eos_ids == {2, 7}


def test_an_attention_of_the_hub_is_refused(tmp_path):
    folder = Path(shutil.copytree(demo.checkpoint(), tmp_path / "a"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "a/kernel"}))
    with refused(CheckpointError, got="'a/kernel'", cause="never runs", cure="attn_implementation"):
        TextCheckpoint.open("vllm", folder)


@pytest.mark.parametrize("token", sorted(TURN_TOKENS))
def test_without_a_template_an_llm_with_tokens_of_turns_is_asked_in_no_words(token, tmp_path):
    folder = Path(shutil.copytree(demo.checkpoint(), tmp_path / "a"))
    (folder / "chat_template.jinja").unlink()
    assert TextCheckpoint.open("vllm", folder).prompts.words.first["image"].before == "USER: "
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    tokenizer.save_pretrained(folder)
    with refused(CheckpointError, got=("no chat template", token), cure="chat_template.jinja"):
        TextCheckpoint.open("vllm", folder)
