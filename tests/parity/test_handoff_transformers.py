"""Tokens handed to transformers' LLaVA, against the untouched model and a full recompute."""

from __future__ import annotations

import io
import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.parity.tiny_llm import (
    IMAGE,
    PATCHES,
    SPECIAL,
    WIDTH,
    embeds_of,
    make_tokenizer,
    tiny_llava,
)
from tests.places import GOLDEN
from tests.refusals import refused
from vzip.runtime import VisionEncoder, console
from vzip.runtime.cli.main import main
from vzip.runtime.errors import BackendError, CheckpointError, InvalidInputError
from vzip.runtime.llm import TokenSpec
from vzip.runtime.llm.chat_template import make_prompts
from vzip.runtime.llm.local.transformers import TransformersLLM, cache_argument

pytestmark = pytest.mark.local_llm

TINY_BUNDLE = GOLDEN / "tiny_bundle"
QUESTIONS = ("what is it?", "is it red?", "and the 7?")

# Published with llava-hf/llava-1.5-7b-hf: a blank stands where training had </s>.
PUBLISHED = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CLOSED = PUBLISHED.replace(
    "{{ content['text'] + ' '}}{% endgeneration %}",
    "{{ content['text'] + '</s>'}}{% endgeneration %}",
)
WITH_BOS = "{{ '<s>' }}" + CLOSED
TEMPLATES = {"none": None, "published": PUBLISHED, "closed": CLOSED, "with BOS": WITH_BOS}


def make_model(vocabulary: int, width: int = WIDTH) -> transformers.LlavaForConditionalGeneration:
    """A LLaVA-1.5 in which ordinary tokens win."""
    text = {"vocab_size": vocabulary, "hidden_size": width, "head_dim": 32}
    return tiny_llava("llava", "llama", "clip", text, len(SPECIAL))


@pytest.fixture
def llava():
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    return types.SimpleNamespace(
        model=model, tokenizer=tokenizer, llm=TransformersLLM(model, tokenizer, template=None)
    )


@pytest.fixture
def watch(llava):
    """What goes through the model: tokens fed per call, logits per call, calls of the tower."""
    seen = types.SimpleNamespace(fed=[], logits=[], vision=0)

    def fed(module, args, kwargs):
        seen.fed.append(kwargs["inputs_embeds"].shape[1])

    def logits(module, args, output):
        seen.logits.append(output[0, -1].clone())

    def vision(module, args):
        seen.vision += 1

    llava.model.model.language_model.register_forward_pre_hook(fed, with_kwargs=True)
    llava.model.lm_head.register_forward_hook(logits)
    llava.model.model.vision_tower.register_forward_pre_hook(vision)
    return seen


def first_ids(tokenizer, count: int, question: str = QUESTIONS[0]) -> list[int]:
    """The first turn, written out; as many placeholders as tokens."""
    return tokenizer("USER: " + count * "<image>" + f"\n{question} ASSISTANT:").input_ids


def generate(model, ids, count, **kwargs):
    """Greedy ids and logits of transformers' own generate."""
    ids = torch.tensor([ids])
    result = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return result.sequences[0, ids.shape[1] :].tolist(), torch.cat(result.logits)


@pytest.mark.parametrize("count", [1, 5, PATCHES, 40])
def test_equals_mm_encoder_outputs(llava, watch, count):
    embeds = embeds_of(count)
    outputs = BaseModelOutputWithPooling(pooler_output=[torch.tensor(embeds)])
    expected, logits = generate(
        llava.model, first_ids(llava.tokenizer, count), 10, mm_encoder_outputs={"image": outputs}
    )
    watch.logits.clear()
    conversation = llava.llm.conversation(embeds)
    conversation.ask(QUESTIONS[0], max_new_tokens=10)
    assert [int(row.argmax()) for row in watch.logits] == expected
    assert list(conversation.ids) == first_ids(llava.tokenizer, count) + expected[:-1]
    torch.testing.assert_close(torch.stack(watch.logits), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("end", ["cut short", "ended"])
def test_later_turns_feed_only_what_is_new_and_equal_a_full_recompute(llava, watch, end):
    count, new = 7, 6
    embeds = embeds_of(count)
    if end == "ended":  # the fourth token of the first answer now ends it, as a second EOS id
        probe = llava.llm.conversation(embeds)
        probe.ask(QUESTIONS[0], max_new_tokens=new)
        stop = probe.ids[len(first_ids(llava.tokenizer, count)) + 3]
        llava.model.generation_config.eos_token_id = [2, stop]
        llava.llm = TransformersLLM(llava.model, llava.tokenizer, template=None)
    else:
        stop = 2
    conversation = llava.llm.conversation(embeds)
    ended = False
    history: list[int] = []  # ids as they should be, answers and their ends included
    for turn, question in enumerate(QUESTIONS):
        watch.fed.clear()
        watch.logits.clear()
        text = f"USER: {question} ASSISTANT:"
        prompt = (
            first_ids(llava.tokenizer, count)
            if turn == 0
            else llava.tokenizer(text, add_special_tokens=False).input_ids
        )
        before = len(conversation.ids)
        answer = conversation.ask(question, max_new_tokens=new)
        rows, fed = list(watch.logits), list(watch.fed)
        ids = [int(row.argmax()) for row in rows]
        spoken = ids[: ids.index(stop)] if stop in ids else ids
        history += prompt
        # What is not in the cache yet (an end, or a last token and the end we add), the prompt,
        # and then token by token: nothing of earlier turns.
        pending = len(history) - len(prompt) - before
        assert fed == [pending + len(prompt)] + [1] * (len(ids) - 1)
        assert pending == (0 if turn == 0 else 1 if ended else 2)
        ended = stop in ids

        for step, row in enumerate(rows):
            everything = torch.tensor([history + ids[:step]])
            with torch.no_grad():
                inputs = llava.model.get_input_embeddings()(everything)
                inputs[everything == IMAGE] = torch.tensor(embeds)
                full = llava.model(inputs_embeds=inputs).logits[0, -1]
            torch.testing.assert_close(row, full, rtol=0, atol=1e-4)
            assert int(full.argmax()) == ids[step]
        assert answer == llava.tokenizer.decode(spoken, skip_special_tokens=True).strip()
        history += [*spoken, 2]  # whatever ended it: the words have one end
    assert watch.vision == 0
    assert list(conversation.ids) == history[: len(conversation.ids)]
    assert history.count(1) == 1, "one beginning of sequence in the whole conversation"
    assert history.count(IMAGE) == count


@pytest.mark.parametrize(
    ("forward", "name"),
    [
        (lambda inputs_embeds, past_key_values=None: None, "past_key_values"),
        (lambda inputs_embeds, cache=None: None, "cache"),
        (lambda inputs_embeds, cache=None, past_key_values=None: None, "cache"),
    ],
)
def test_the_cache_is_called_what_this_transformers_calls_it(forward, name):
    assert cache_argument(types.SimpleNamespace(forward=forward)) == name


def test_conversations_do_not_share_a_cache(llava):
    one, other = (llava.llm.conversation(embeds_of(5, seed)) for seed in (0, 1))
    first = one.ask(QUESTIONS[0], max_new_tokens=8)
    different = other.ask(QUESTIONS[0], max_new_tokens=8)
    assert first != different
    assert llava.llm.ask(embeds_of(5, 0), QUESTIONS[0], max_new_tokens=8) == first
    assert "".join(llava.llm.stream(embeds_of(5, 1), QUESTIONS[0], max_new_tokens=8)) == different


def test_tokens_are_copied_and_cast_to_the_llms_dtype(llava):
    half = embeds_of(5).astype(np.float16)
    conversation = llava.llm.conversation(half)
    expected = llava.llm.ask(half.astype(np.float32), QUESTIONS[0], max_new_tokens=8)
    half[:] = 0
    assert conversation.ask(QUESTIONS[0], max_new_tokens=8) == expected


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["bytes", "llama", "first"])
def test_prompts_are_the_whole_conversations_ids(kind, template):
    tokenizer = make_tokenizer(kind)
    prompts = make_prompts("tests", tokenizer, {"image": IMAGE}, TEMPLATES[template])
    text = "USER: <image>\nwhat is it? ASSISTANT: a circle</s>USER: is it red? ASSISTANT:"
    written = template == "with BOS"
    ids = tokenizer("<s>" * written + text, add_special_tokens=not written).input_ids
    answered = ids.index(2)
    assert prompts.first("what is it?") == ids[: len(prompts.first("what is it?"))]
    assert tokenizer.decode(prompts.first("what is it?")).endswith("what is it? ASSISTANT:")
    assert prompts.later("is it red?") == ids[answered + 1 :]


def test_the_tokenizers_of_these_tests_differ_where_they_should():
    """In whether a word has a mark at the beginning, and after a special token."""
    marks = {}
    for kind in ("bytes", "llama", "first"):
        tokens = make_tokenizer(kind)("USER</s>USER", add_special_tokens=False).tokens()
        marks[kind] = (tokens[0][0] == "▁", tokens[tokens.index("</s>") + 1][0] == "▁")
    assert marks == {"bytes": (False, False), "llama": (True, True), "first": (True, False)}


def test_a_templates_white_space_after_the_end_of_a_turn_is_kept():
    template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{{ '</s>\n' }}"
        "{% endfor %}"
    )
    tokenizer = make_tokenizer()
    expected = tokenizer("\nred?</s>\n", add_special_tokens=False).input_ids
    assert make_prompts("tests", tokenizer, {"image": IMAGE}, template).later("red?") == expected


LAST = "{{ messages[-1]['content'][-1]['text'] }}"


@pytest.mark.parametrize(
    ("template", "call", "got", "cure"),
    [
        (LAST, "first", "has no place for images", ""),
        ("<image><image>" + LAST, "first", "has no place for images", ""),
        ("<image>", "first", "writes a question 0 times", ""),
        (2 * LAST, "first", "writes a question 2 times", ""),
        (f"USER: <image>\n{LAST} ASSISTANT:", "later", "the assistant's turns", "vzip ask"),
    ],
)
def test_a_template_without_one_place_for_each_part_is_refused(template, call, got, cure):
    with refused(CheckpointError, got=got, cure=cure):
        prompts = make_prompts("tests", make_tokenizer(), {"image": IMAGE}, template)
        getattr(prompts, call)("what?")


def scripted(llava, monkeypatch, text: str) -> None:
    """Let the LLM say this text."""
    ids = iter([*llava.tokenizer(text, add_special_tokens=False).input_ids, 2])
    monkeypatch.setattr(llava.llm, "step", lambda new, cache, image: next(ids))


def test_pieces_of_a_stream_split_no_character(llava, monkeypatch):
    text = "Zürich 🎈  is \n two 字"
    scripted(llava, monkeypatch, f"  {text} \n")
    pieces = list(llava.llm.stream(embeds_of(3), "where?"))
    assert "".join(pieces) == text
    assert len(pieces) > 8
    assert "\ufffd" not in "".join(pieces)
    assert all(pieces)


def test_bytes_that_never_become_a_character_are_shown_at_the_end(llava, monkeypatch):
    balloon = llava.tokenizer("a🎈", add_special_tokens=False).input_ids
    ids = iter([*balloon[:-1], 2])
    monkeypatch.setattr(llava.llm, "step", lambda new, cache, image: next(ids))
    assert list(llava.llm.stream(embeds_of(3), "what?")) == ["a", "\ufffd"]


def test_max_new_tokens_is_the_limit(llava, watch):
    llava.llm.ask(embeds_of(3), QUESTIONS[0], max_new_tokens=3)
    assert len(watch.fed) == 3
    with refused(InvalidInputError, got="0 new tokens", expected="1 or more"):
        llava.llm.ask(embeds_of(3), QUESTIONS[0], max_new_tokens=0)


def test_an_answer_left_unread_is_closed_before_the_next_question(llava):
    embeds = embeds_of(5)
    conversation = llava.llm.conversation(embeds)
    pieces = conversation.stream(QUESTIONS[0], max_new_tokens=9)
    next(pieces)
    held = len(conversation.ids)
    conversation.ask(QUESTIONS[1], max_new_tokens=2)
    later = llava.tokenizer(f"</s>USER: {QUESTIONS[1]} ASSISTANT:", add_special_tokens=False)
    begun = conversation.ids[held]  # predicted, shown, and now in the cache
    assert list(conversation.ids[held:-1]) == [begun, *later.input_ids]
    with refused(InvalidInputError, got="a later question"):
        next(pieces)


def test_a_stream_that_was_never_begun_leaves_no_trace(llava):
    conversation = llava.llm.conversation(embeds_of(5))
    conversation.stream(QUESTIONS[1])
    expected = llava.llm.ask(embeds_of(5), QUESTIONS[0], max_new_tokens=6)
    assert conversation.ask(QUESTIONS[0], max_new_tokens=6) == expected


def test_a_conversation_that_failed_halfway_is_dead_and_another_is_not(llava):
    conversation = llava.llm.conversation(embeds_of(5))
    conversation.ask(QUESTIONS[0], max_new_tokens=2)

    def fail(*_):
        raise RuntimeError("no")

    hook = llava.model.model.language_model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        conversation.ask(QUESTIONS[1])
    hook.remove()
    with refused(BackendError, cure="a new conversation"):
        conversation.ask(QUESTIONS[1])
    assert llava.llm.ask(embeds_of(5), QUESTIONS[0], max_new_tokens=2)


def test_output_that_is_not_finite_is_an_error(llava):
    with torch.no_grad():
        llava.model.lm_head.weight[7, 7] = torch.nan
    with refused(BackendError, got="not finite in torch", cure="float32"):
        llava.llm.ask(embeds_of(5), QUESTIONS[0])


def test_out_of_memory_is_one_line(llava, monkeypatch):
    def fail(**_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(llava.model, "forward", fail)
    with refused(BackendError, got="out of memory on cpu at"):
        llava.llm.ask(embeds_of(5), QUESTIONS[0])


def with_nan(embeds: np.ndarray) -> np.ndarray:
    embeds[[2, 4], 3] = np.nan, np.inf
    return embeds


@pytest.mark.parametrize(
    ("embeds", "got", "cure"),
    [
        (embeds_of(5)[None], "[1, 5, 64]", "tokens.embeds[0]"),
        (embeds_of(4), "[4, 64]", ""),
        (embeds_of(5)[:, :-1], "[5, 63]", ""),
        (embeds_of(5)[0], "[64]", ""),
        (embeds_of(0), "[0, 64]", ""),
        (embeds_of(5).astype(np.float64), "float64", ""),
        (np.ones((5, WIDTH), np.int64), "int64", ""),
        (torch.ones(5, WIDTH), "Tensor", ""),
        (with_nan(embeds_of(5)), "2 of 5 tokens (first: row 2)", "vzip check"),
    ],
)
def test_wrong_tokens_are_refused_before_the_call(llava, watch, embeds, got, cure):
    promise = TokenSpec(count=5, hidden_size=WIDTH, image_token_id=IMAGE)
    llm = TransformersLLM(llava.model, llava.tokenizer, template=None, tokens=promise)
    with refused(
        InvalidInputError,
        got=("transformers: ", got),
        expected="float16 numpy array [5, 64]",
        cure=cure,
    ):
        llm.conversation(embeds)
    assert not watch.fed
    assert llm.ask(embeds_of(5), QUESTIONS[0], max_new_tokens=2), "the next call is clean"


def test_tokens_beyond_the_llms_dtype_are_refused(llava):
    llm = TransformersLLM(llava.model.half(), llava.tokenizer, template=None)
    embeds = embeds_of(5)
    embeds[3, 3] = -1e5
    with refused(InvalidInputError, got="1e+05", expected="65504"):
        llm.conversation(embeds)


@pytest.mark.parametrize(
    ("question", "got"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("is <image> red?", "'<image>'"),
        ("is it \udcff red?", "Unicode text (at character 6)"),
        ("word " * 600, "for the answer make"),
    ],
)
def test_wrong_questions_are_refused_before_the_call(llava, watch, question, got):
    conversation = llava.llm.conversation(embeds_of(5))
    for turn in range(2):
        watch.fed.clear()
        long = len(question) > 100
        cure = ("begin a new conversation" if turn else "ask a shorter question") if long else ""
        with refused(InvalidInputError, got=got, expected="512" if long else "", cure=cure):
            conversation.stream(question)  # no piece is taken
        assert not watch.fed
        conversation.ask(QUESTIONS[0], max_new_tokens=2)


def test_the_context_counts_image_prompt_and_answer(llava):
    prompt = len(first_ids(llava.tokenizer, 5))
    llava.llm.conversation(embeds_of(5)).stream(QUESTIONS[0], max_new_tokens=512 - prompt)
    with refused(InvalidInputError, got="513 tokens", expected="512"):
        llava.llm.conversation(embeds_of(5)).stream(QUESTIONS[0], max_new_tokens=512 - prompt + 1)


@pytest.fixture
def saved(tmp_path):
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer)).half()
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "llava")
    return types.SimpleNamespace(folder=tmp_path / "llava", model=model, tokenizer=tokenizer)


def test_open_reads_a_folder_and_runs_float16_in_float32_on_a_cpu(saved):
    promise = TokenSpec(count=5, hidden_size=WIDTH, image_token_id=IMAGE)
    llm = TransformersLLM.open(saved.folder, tokens=promise, device="cpu")
    assert llm.model.dtype == torch.float32
    assert llm.text.context == 512
    expected = TransformersLLM(saved.model.float(), saved.tokenizer, template=None)
    answers = [each.ask(embeds_of(5), QUESTIONS[0], max_new_tokens=8) for each in (llm, expected)]
    assert answers[0] == answers[1]
    for dtype in ("float16", "bfloat16"):
        llm = TransformersLLM.open(saved.folder, device="cpu", dtype=dtype)
        assert llm.model.dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    "home", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"]
)
def test_open_finds_the_chat_template_in_each_of_its_homes(saved, home):
    template = "USER: <image>\nQ {{ messages[0]['content'][-1]['text'] }} ASSISTANT:"
    path = saved.folder / home
    if home == "chat_template.jinja":
        path.write_text(template)
    else:
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, "chat_template": template}))
    llm = TransformersLLM.open(saved.folder, device="cpu")
    text = saved.tokenizer.decode(llm.text.prompts.first("why?"))
    assert text.replace(" ", "").endswith("<image>\nQwhy?ASSISTANT:")


@pytest.mark.parametrize(
    ("promise", "got", "expected"),
    [
        (TokenSpec(5, 65, IMAGE), ("width", "is 64"), "65"),
        (TokenSpec(5, WIDTH, 11), ("image token id", "is 4"), "11"),
    ],
)
def test_another_llm_is_refused_before_its_weights_are_read(saved, promise, got, expected):
    (saved.folder / "model.safetensors").write_bytes(b"not read")
    with refused(InvalidInputError, got=got, expected=expected):
        TransformersLLM.open(saved.folder, tokens=promise)


def test_a_checkpoint_without_whole_weights_is_refused(saved):
    weights = saved.folder / "model.safetensors"
    weights.write_bytes(b"x" * 50)
    with refused(CheckpointError, got=(str(saved.folder), "can't be loaded"), cure="--llm"):
        TransformersLLM.open(saved.folder)
    weights.unlink()
    with refused(CheckpointError, got=("can't be loaded", "model.safetensors")):
        TransformersLLM.open(saved.folder)


def test_another_architecture_is_refused(saved):
    saved.model.config.text_config.save_pretrained(saved.folder)
    with refused(CheckpointError, got="'llama' model", expected="LlavaForConditionalGeneration"):
        TransformersLLM.open(saved.folder)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with refused(CheckpointError, got="vzip-tests/no-such-model at abc", cure="--llm"):
        TransformersLLM.open("vzip-tests/no-such-model", revision="abc")


@pytest.mark.parametrize("weights", ["random", "random-outliers"])
def test_tokens_of_random_weights_are_refused(weights):
    model = types.SimpleNamespace(weights=weights, id="llava-1.5-7b")
    with refused(InvalidInputError, got="'llava-1.5-7b'", cure=f"--weights {weights}"):
        TokenSpec.of(types.SimpleNamespace(model=model))


@pytest.fixture
def bundle(tmp_path):
    """A bundle of a checkpoint that is here, its LLM, and an image."""
    folder = tmp_path / "bundle"
    shutil.copytree(TINY_BUNDLE, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), width=manifest["llm"]["hidden_size"])
    model.save_pretrained(tmp_path / "llava")
    tokenizer.save_pretrained(tmp_path / "llava")
    manifest["model"].update(id=str(tmp_path / "llava"), weights="checkpoint", seed=None)
    manifest["llm"]["image_token_id"] = IMAGE
    (folder / "manifest.json").write_text(json.dumps(manifest))
    image = tmp_path / "image.png"
    Image.effect_noise((40, 30), 90).convert("RGB").save(image)
    return types.SimpleNamespace(folder=folder, image=image, llava=tmp_path / "llava")


@pytest.mark.slow
def test_ask_and_chat_answer_from_a_bundle(bundle, monkeypatch, capsys):
    with VisionEncoder.open(bundle.folder) as encoder:
        embeds = encoder.encode([bundle.image]).embeds[0]
    conversation = TransformersLLM.open(bundle.llava).conversation(embeds)
    answers = [conversation.ask(question, max_new_tokens=9) for question in QUESTIONS]
    answers = [console.visible(each) for each in answers]  # a random LLM says anything
    arguments = [str(bundle.folder), str(bundle.image)]
    capsys.readouterr()  # transformers' own bar, which our commands silence

    assert main(["ask", *arguments, QUESTIONS[0], "--max-new-tokens", "9"]) == 0
    assert capsys.readouterr() == (answers[0] + "\n", "")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(QUESTIONS)))
    assert main(["chat", *arguments, "--max-new-tokens", "9"]) == 0
    assert capsys.readouterr().out == "".join(answer + "\n" for answer in answers)


@pytest.mark.slow
def test_ask_answers_about_a_folder_of_frames(bundle, tmp_path, monkeypatch, capsys):
    """Frames are images to this LLM: a placeholder each, in time order."""
    frames = [Image.effect_noise((40, 30), 90).convert("RGB") for _ in range(3)]
    (tmp_path / "frames").mkdir()
    for index, frame in enumerate(frames):
        frame.save(tmp_path / "frames" / f"{index + 9}.png")
    with VisionEncoder.open(bundle.folder) as encoder:
        expected = np.concatenate([encoder.encode([frame]).embeds[0] for frame in frames])
        encoded, tokens = encoder.video_tokens(frames), TokenSpec.of(encoder.manifest)
    answer = TransformersLLM.open(bundle.llava, tokens=tokens).ask(
        encoded, QUESTIONS[0], frames=3, max_new_tokens=9
    )
    begun = []
    begin = TransformersLLM.conversation

    def conversation(self, embeds, *, frames=None, **options):
        begun.append((embeds, frames))
        return begin(self, embeds, frames=frames, **options)

    monkeypatch.setattr(TransformersLLM, "conversation", conversation)
    capsys.readouterr()
    arguments = [str(bundle.folder), str(tmp_path / "frames"), QUESTIONS[0]]
    assert main(["ask", *arguments, "--max-new-tokens", "9"]) == 0
    assert capsys.readouterr() == (answer + "\n", "")
    ((embeds, count),) = begun
    assert count == 3
    assert len(np.unique(expected, axis=0)) == len(expected), "no two frames are alike"
    np.testing.assert_allclose(embeds.embeds, expected, rtol=0, atol=1e-5)


def test_llm_names_another_place(bundle, capsys):
    moved = bundle.llava.rename(bundle.llava.with_name("moved"))
    arguments = ["ask", str(bundle.folder), str(bundle.image), "what?", "--max-new-tokens", "3"]
    assert main(arguments) == 2
    assert "llava', which is not here any more" in capsys.readouterr().err
    assert main([*arguments, "--llm", str(moved)]) == 0
    assert len(capsys.readouterr().out) > 1
