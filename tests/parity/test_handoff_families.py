"""Tokens of images and videos handed to every family's class, against the untouched models."""

from __future__ import annotations

import dataclasses
import re
import types
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity.tiny_llm import (
    IMAGE,
    PATCHES,
    SIDE,
    SPECIAL,
    WIDTH,
    embeds_of,
    make_tokenizer,
    tiny_llava,
)
from tests.places import GOLDEN
from tests.refusals import refused
from vzip.runtime.bundle.manifest import Tiling
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.errors import CheckpointError, InvalidInputError
from vzip.runtime.llm import TokenSpec
from vzip.runtime.llm.chat_template import make_prompts
from vzip.runtime.llm.local.transformers import TransformersLLM
from vzip.runtime.tokens.positions import EncodedImage, Places

pytestmark = pytest.mark.local_llm

TINY_BUNDLE = GOLDEN / "tiny_bundle"
WITH_VIDEO = (*SPECIAL, "<video>")
VIDEO = WITH_VIDEO.index("<video>")
QUESTIONS = ("what is it?", "is it red?")

# As Qwen's published templates: nothing before the first turn, and an end after each.
CHAT_ML = (
    "{% for m in messages %}{{ m['role'] + ' ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'video' %}{{ '<video>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ '\n' + c['text'] }}{% endfor %}"
    "{{ '</s>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Family:
    """A tiny model of one family.

    Attributes:
        model_type: The class, by its configuration.
        tower: A key of `TOWERS`.
        llm: A key of `LLMS`.
        extra: Settings of the configuration that only this family has.
        template: Its chat template; None where LLaVA-1.5's words serve.
        videos: Whether the LLM has a placeholder of its own for them.
    """

    model_type: str
    tower: str = "clip"
    llm: str = "llama"
    extra: dict = dataclasses.field(default_factory=dict)
    template: str | None = None
    videos: bool = False


TILES = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]}
FULL = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
FAMILIES = {
    "llava": Family("llava"),
    "bakllava": Family("llava", llm="mistral"),
    "interleave": Family("llava", "siglip", "qwen2", FULL, CHAT_ML),
    "vip-llava": Family("vipllava", extra={"vision_feature_layers": [-1, -2]}, template=CHAT_ML),
    "llava-next": Family("llava_next", llm="mistral", extra=TILES, template=CHAT_ML),
    "video-llava": Family("video_llava", videos=True),
    "onevision": Family("llava_onevision", "siglip", "qwen2", FULL | TILES, CHAT_ML, videos=True),
}


def make_model(family: Family, vocabulary: int, **settings: Any) -> Any:
    """The tiny model of a family, in which ordinary tokens win."""
    several = family.extra | ({"video_token_index": VIDEO} if family.videos else {}) | settings
    text = {"vocab_size": vocabulary}
    silent = len(WITH_VIDEO)
    return tiny_llava(family.model_type, family.llm, family.tower, text, silent, **several)


@pytest.fixture(params=FAMILIES)
def tiny(request):
    family = FAMILIES[request.param]
    tokenizer = make_tokenizer(special=WITH_VIDEO)
    model = make_model(family, len(tokenizer))
    llm = TransformersLLM(model, tokenizer, template=family.template)
    return types.SimpleNamespace(family=family, model=model, tokenizer=tokenizer, llm=llm)


def watched(model) -> list[torch.Tensor]:
    """The logits of each call of the LLM from now on."""
    rows: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(
        lambda module, arguments, output: rows.append(output[0, -1].clone())
    )
    return rows


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt(tiny, places: str, question: str = QUESTIONS[0]) -> list[int]:
    """The first turn, written out."""
    if tiny.family.template is None:
        return tiny.tokenizer(f"USER: {places}\n{question} ASSISTANT:").input_ids
    return tiny.tokenizer(f"user {places}\n\n{question}</s>\nassistant\n").input_ids


def answers(tiny, ids: list[int], count: int, **inputs):
    """Greedy ids and logits of the untouched model's own generate."""
    row = torch.tensor([ids])
    result = tiny.model.generate(
        input_ids=row,
        attention_mask=torch.ones_like(row),
        do_sample=False,
        max_new_tokens=count,
        output_logits=True,
        return_dict_in_generate=True,
        **inputs,
    )
    return result.sequences[0, len(ids) :].tolist(), torch.cat(result.logits)


def picture(family: Family) -> dict[str, torch.Tensor]:
    """What the untouched model takes for one image."""
    tiles = {"image_sizes": torch.tensor([[2 * SIDE, 2 * SIDE - 20]])}
    if family.model_type in ("llava_next", "llava_onevision"):
        return {"pixel_values": noise(1, 5, 3, SIDE, SIDE), **tiles}
    name = "pixel_values_images" if family.model_type == "video_llava" else "pixel_values"
    return {name: noise(1, 3, SIDE, SIDE)}


def rows_of(features) -> np.ndarray:
    """The rows that transformers puts in the place of one image or video."""
    rows = features.pooler_output
    if isinstance(rows, (list, tuple)):
        rows = torch.cat(list(rows))
    return rows.detach().reshape(-1, WIDTH).numpy()


def assert_said(llm, embeds, expected, logits, *, frames=None):
    """An LLM says these ids, by these logits, about images or a video.

    It does too where the rows are in another order and say where they stand.
    """
    several = embeds if isinstance(embeds, list) else [embeds]
    mixed = [shuffled(each, seed) for seed, each in enumerate(several)]
    placed = mixed if isinstance(embeds, list) else mixed[0]
    _assert_said(llm, embeds, expected, logits, frames=frames)
    _assert_said(llm, placed, expected, logits, frames=frames, positions="original")


def shuffled(embeds, seed):
    """All rows of an image or a video, out of order, with their places."""
    order = np.random.default_rng(seed).permutation(len(embeds))
    return placed(embeds[order], order, len(embeds))


def placed(embeds, places, span) -> EncodedImage:
    where = Places(np.asarray(places, np.int64), span)
    return EncodedImage(embeds, np.zeros((1, 1), np.int64), where=where)


def _assert_said(llm, embeds, expected, logits, **options):
    rows = watched(llm.model)
    answer = llm.ask(embeds, QUESTIONS[0], max_new_tokens=10, **options)
    assert [int(row.argmax()) for row in rows] == expected
    torch.testing.assert_close(torch.stack(rows), logits, rtol=0, atol=1e-4)
    assert answer == llm.tokenizer.decode(expected, skip_special_tokens=True).strip()


@pytest.mark.slow
def test_uncompressed_features_give_the_untouched_models_answer(tiny):
    inputs = picture(tiny.family)
    with torch.no_grad():
        embeds = rows_of(tiny.model.get_image_features(*inputs.values()))
    assert len(embeds) >= PATCHES
    expected, logits = answers(tiny, prompt(tiny, len(embeds) * "<image>"), 10, **inputs)
    blind, _ = answers(tiny, prompt(tiny, ""), 10)
    assert blind != expected, "the test wants an answer that depends on the image"
    assert_said(tiny.llm, embeds, expected, logits)


@pytest.mark.slow
def test_uncompressed_features_of_two_images_give_the_untouched_models_answer(tiny):
    one, names = picture(tiny.family), picture(tiny.family).keys()
    other = {name: one[name].flip(-1) for name in names}  # other sizes too, where there are sizes
    inputs = {name: torch.cat([one[name], other[name]]) for name in names}
    several = {}
    if tiny.family.model_type == "llava_onevision":  # its processor cuts no image of several
        inputs["pixel_values"] = inputs["pixel_values"][:, :1]
        several = {"batch_num_images": torch.tensor([2])}
    with torch.no_grad():
        features = tiny.model.get_image_features(**inputs, **several).pooler_output
    embeds = [each.reshape(-1, WIDTH).numpy() for each in features]
    if several:
        assert [len(each) for each in embeds] == [PATCHES + 1] * 2
    places = "\n".join(len(each) * "<image>" for each in embeds)
    expected, logits = answers(tiny, prompt(tiny, places), 10, **inputs, **several)
    assert_said(tiny.llm, embeds, expected, logits)


@pytest.mark.parametrize("tiny", ["video-llava", "onevision"], indirect=True)
def test_an_uncompressed_video_gives_the_untouched_models_answer(tiny):
    frames = 3
    inputs = {"pixel_values_videos": noise(1, frames, 3, SIDE, SIDE)}
    with torch.no_grad():
        embeds = rows_of(tiny.model.model.get_video_features(**inputs))
    if tiny.family.model_type == "video_llava":
        promise = TokenSpec(PATCHES + 1, WIDTH, IMAGE, VIDEO, frame_count=PATCHES + 1)
    else:  # pooled to a quarter, and one newline behind them all
        promise = TokenSpec(4, WIDTH, IMAGE, VIDEO, frame_count=4, closing=1)
        newline = tiny.model.model.image_newline.detach().numpy()
        assert np.array_equal(embeds[-1], newline)
    assert promise.rows(frames) == len(embeds)
    expected, logits = answers(tiny, prompt(tiny, len(embeds) * "<video>"), 10, **inputs)
    llm = TransformersLLM(tiny.model, tiny.tokenizer, template=tiny.family.template, tokens=promise)
    assert_said(llm, embeds, expected, logits, frames=frames)
    with refused(InvalidInputError, expected=("a video's 2 frames", ", 64]")):
        llm.conversation(embeds, frames=2)


# Every fourth place of 12, which a video of three frames has four of each; all in order.
EVERY_FOURTH = placed(embeds_of(12), np.arange(12) * 4 + 1, 48)


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["consecutive", "original"])
@pytest.mark.parametrize("frames", [None, 3])
def test_turns_equal_a_forward_pass_of_embeddings_made_by_hand(tiny, frames, positions):
    """The prompts as ids, the rows put in by hand, everything recomputed at each step."""
    embeds = embeds_of(12)
    if frames is None:
        ids = prompt(tiny, 12 * "<image>")
    elif tiny.family.videos:
        ids = prompt(tiny, 12 * "<video>")
    else:
        ids = prompt(tiny, "\n".join(3 * [4 * "<image>"]))
    rows = watched(tiny.model)
    conversation = tiny.llm.conversation(EVERY_FOURTH, frames=frames, positions=positions)
    assert conversation.positions == positions
    for turn, question in enumerate(QUESTIONS):
        if turn:
            text = (
                f"USER: {question} ASSISTANT:"
                if tiny.family.template is None
                else f"\nuser \n{question}</s>\nassistant\n"
            )
            ids += [2, *tiny.tokenizer(text, add_special_tokens=False).input_ids]
        rows.clear()
        conversation.ask(question, max_new_tokens=5)
        said = [int(row.argmax()) for row in rows]
        seen = list(rows)
        for step, row in enumerate(seen):
            everything = torch.tensor([ids + said[:step]])
            with torch.no_grad():
                made = tiny.model.get_input_embeddings()(everything)
                made[(everything == IMAGE) | (everything == VIDEO)] = torch.tensor(embeds)
                full = tiny.model(inputs_embeds=made, **by_hand(everything, positions)).logits[
                    0, -1
                ]
            torch.testing.assert_close(row, full, rtol=0, atol=1e-4)
        assert 2 not in said, "the test wants answers that are cut short"
        ids += said
    assert list(conversation.ids) == ids[: len(conversation.ids)]


def by_hand(ids: torch.Tensor, positions: str) -> dict[str, torch.Tensor]:
    """Mask and positions of a prompt with `EVERY_FOURTH` in it; of each row one by one."""
    if positions == "consecutive":
        return {}
    made, coming, rows = [], 0, 0
    for each in ids[0].tolist():
        if each in (IMAGE, VIDEO):
            # A row's own place, the one after it and two more, and then whatever follows.
            made.append(coming + 1)
            coming += 4
            rows += 1
        else:
            made.append(coming)
            coming += 1
    assert rows == 12
    return {"attention_mask": torch.ones_like(ids), "position_ids": torch.tensor([made])}


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["consecutive", "original"])
@pytest.mark.parametrize("form", ["inputs_embeds", "mm_encoder_outputs"])
@pytest.mark.parametrize("frames", [None, 2])
def test_generate_of_a_batch_gives_what_each_question_alone_does(tiny, frames, form, positions):
    places = [0, 1, 5, 6, 7, 11]
    embeds = [placed(embeds_of(6, seed), places, 12 + 2 * seed) for seed in range(2)]
    asked = {"frames": frames, "positions": positions}
    expected = []
    for each, question in zip(embeds, QUESTIONS, strict=True):
        conversation = tiny.llm.conversation(each, **asked)
        conversation.ask(question, max_new_tokens=6)
        expected.append(conversation._history[-6:])
    inputs = tiny.llm.generation_inputs(embeds, QUESTIONS, form=form, **asked)
    assert ("position_ids" in inputs) == (positions == "original")
    kinds = inputs.get("mm_encoder_outputs", {"image": None})
    assert set(kinds) == {
        "video" if frames and tiny.family.videos and "input_ids" in inputs else "image"
    }
    made = tiny.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert made[:, -6:].tolist() == expected
    assert expected[0] != expected[1], "the test wants two answers"
    beams = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    inputs = tiny.llm.generation_inputs(embeds, QUESTIONS, form=form, **asked)
    made = tiny.model.generate(**inputs, **beams)  # beams repeat the features of each question
    for each, question, row in zip(embeds, QUESTIONS, made, strict=True):
        alone = tiny.llm.generation_inputs([each], [question], **asked)
        assert row[-4:].tolist() == tiny.model.generate(**alone, **beams)[0, -4:].tolist()


@pytest.mark.parametrize("tiny", ["vip-llava", "video-llava"], indirect=True)
def test_encoder_outputs_of_different_length_are_refused_where_a_class_takes_one_tensor(tiny):
    embeds = [embeds_of(6), embeds_of(4)]
    with refused(InvalidInputError, got="[6, 4]", expected="as many of each"):
        tiny.llm.generation_inputs(embeds, QUESTIONS, form="mm_encoder_outputs")
    assert len(tiny.llm.ask_batch(embeds, QUESTIONS, max_new_tokens=2)) == 2


def test_open_loads_each_family_by_its_class(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    if tiny.family.template is not None:
        (tmp_path / "chat_template.jinja").write_text(tiny.family.template)
    promise = TokenSpec(None, WIDTH, IMAGE, VIDEO if tiny.family.videos else None)
    llm = TransformersLLM.open(tmp_path, tokens=promise, device="cpu")
    assert type(llm.model) is type(tiny.model)
    for count in (1, 9):
        assert llm.ask(embeds_of(count), "what?", max_new_tokens=6) == tiny.llm.ask(
            embeds_of(count), "what?", max_new_tokens=6
        )


VISION = ("vision_tower", "image_tower", "video_tower", "multi_modal_projector", "image_newline")


def test_open_needs_the_llm_alone(tiny, tmp_path):
    tiny.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(tiny.family.template or CHAT_ML)
    state = tiny.model.state_dict()
    own = {key: value for key, value in state.items() if not any(part in key for part in VISION)}
    assert len(own) < len(state)
    tiny.model.save_pretrained(tmp_path, state_dict=own)
    assert TransformersLLM.open(tmp_path).ask(embeds_of(3), "what?", max_new_tokens=2)
    holed = {key: value for key, value in own.items() if "layers.1.mlp" not in key}
    tiny.model.save_pretrained(tmp_path, state_dict=holed)
    with refused(CheckpointError, got="3 tensors"):
        TransformersLLM.open(tmp_path)


def test_a_family_that_speaks_other_words_needs_a_template(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    if tiny.family.template is None:
        assert TransformersLLM.open(tmp_path).ask(embeds_of(3), "what?", max_new_tokens=2)
        return
    for weights in tmp_path.glob("*.safetensors"):
        weights.write_bytes(b"not read")
    with refused(CheckpointError, got=("chat template", repr(tiny.family.llm))):
        TransformersLLM.open(tmp_path)


@pytest.mark.parametrize("tiny", ["video-llava", "onevision"], indirect=True)
def test_a_video_and_an_image_have_placeholders_of_their_own(tiny):
    prompts = tiny.llm.text.prompts
    assert prompts.placeholders == {"image": IMAGE, "video": VIDEO}
    image, video = prompts.first("why?"), prompts.first("why?", "video")
    assert (image.count(IMAGE), image.count(VIDEO)) == (1, 0)
    assert (video.count(IMAGE), video.count(VIDEO)) == (0, 1)
    for question in ("is <image> red?", "is <video> red?"):
        for kind in ("image", "video"):
            with refused(InvalidInputError, got="placeholders", cure="without"):
                prompts.first(question, kind)
        with refused(InvalidInputError, got="placeholders", cure="without"):
            prompts.later(question)


@pytest.mark.parametrize("tiny", ["llava", "llava-next"], indirect=True)
def test_frames_are_images_to_an_llm_that_knows_no_video(tiny):
    prompts = tiny.llm.text.prompts
    assert prompts.placeholders == {"image": IMAGE}
    assert prompts.first(QUESTIONS[0], "image", 3) == prompt(tiny, "<image>\n<image>\n<image>")
    conversation = tiny.llm.conversation(embeds_of(15), frames=3)
    conversation.ask(QUESTIONS[0], max_new_tokens=1)
    runs = [
        len(run)
        for run in re.findall("i+", "".join("i" if n == IMAGE else "." for n in conversation.ids))
    ]
    assert runs == [5, 5, 5]
    with refused(InvalidInputError, got="16 tokens of 3 frames", cause="an image"):
        tiny.llm.conversation(embeds_of(16), frames=3)


def test_an_end_that_a_template_mistypes_is_an_end():
    """As llava-hf's LLaVA-NeXT with Mistral: a backslash where the slash should be."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
        "{% for c in m['content'] %}"
        "{{ '<image>\n' if c['type'] == 'image' else c['text'] }}{% endfor %}{{ ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'][0]['text'] + '<\\\\s> ' }}{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer()
    prompts = make_prompts("tests", tokenizer, {"image": IMAGE}, template)
    rendered = tokenizer.apply_chat_template(
        [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}],
        chat_template=template,
        tokenize=False,
    )
    assert rendered == " a<\\s> "
    expected = tokenizer(" [INST] why? [/INST]", add_special_tokens=False).input_ids
    assert prompts.later("why?") == expected


@pytest.mark.parametrize("tiny", ["video-llava"], indirect=True)
def test_a_template_without_a_place_for_videos_is_refused(tiny):
    template = CHAT_ML.replace("'video'", "'film'")
    prompts = make_prompts("tests", tiny.tokenizer, {"image": IMAGE, "video": VIDEO}, template)
    assert prompts.first("why?").count(IMAGE) == 1
    with refused(CheckpointError, got="videos"):
        prompts.first("why?", "video")


def test_a_tokenizer_without_a_placeholder_is_refused():
    for places in ({"image": 9999}, {"image": IMAGE, "video": 9999}):
        with refused(CheckpointError, got="9999"):
            make_prompts("tests", make_tokenizer(), places, None)


@pytest.mark.parametrize("frames", [0, -1, 2.0, True])
@pytest.mark.parametrize("tiny", ["llava"], indirect=True)
def test_a_number_of_frames_that_makes_no_sense_is_refused(tiny, frames):
    with refused(InvalidInputError, got=f"{frames} frames", expected="1 or more"):
        tiny.llm.conversation(embeds_of(4), frames=frames)


@pytest.mark.parametrize("tiny", ["video-llava", "llava"], indirect=True)
def test_an_llm_with_another_video_token_or_none_is_refused(tiny):
    tokens = TokenSpec(4, WIDTH, IMAGE, video_token_id=6)
    got = ("video token id", f"is {VIDEO if tiny.family.videos else None}")
    with refused(InvalidInputError, got=got, expected="6"):
        TransformersLLM(tiny.model, tiny.tokenizer, template=None, tokens=tokens)


@pytest.mark.parametrize("tiny", ["llava"], indirect=True)
def test_a_placeholder_that_the_llm_says_is_a_word(tiny, monkeypatch):
    """Of the answer's tokens none is replaced, however often it is an image's placeholder."""
    step, calls = tiny.llm.step, []

    def says_placeholder(ids, cache, image):
        calls.append((ids, image is None))
        real = step(ids, cache, image)
        return IMAGE if len(calls) == 1 else real

    monkeypatch.setattr(tiny.llm, "step", says_placeholder)
    conversation = tiny.llm.conversation(embeds_of(5))
    conversation.ask(QUESTIONS[0], max_new_tokens=3)
    assert calls[1] == ([IMAGE], True)
    with torch.no_grad():
        everything = torch.tensor([list(conversation.ids)])
        made = tiny.model.get_input_embeddings()(everything)
        places = (everything == IMAGE)[0].nonzero()[:5, 0]
        made[0, places] = torch.tensor(embeds_of(5))
        full = tiny.model(inputs_embeds=made).logits[0, -1]
    assert int(full.argmax()) == conversation._history[-1]


def test_a_placeholder_needs_no_embedding_of_its_own():
    """LLaVA-NeXT's 32000 is one past a vocabulary of 32000 that nobody extended."""
    tokenizer = make_tokenizer(special=SPECIAL)
    vocabulary = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    assert tokenizer.convert_tokens_to_ids("<video>") == vocabulary
    model = make_model(FAMILIES["video-llava"], vocabulary, video_token_index=vocabulary)
    llm = TransformersLLM(model, tokenizer, template=None)
    assert llm.ask(embeds_of(6), QUESTIONS[0], frames=2, max_new_tokens=3)


def test_what_a_bundle_says_about_its_tokens():
    manifest = read_bundle(TINY_BUNDLE, verify=False).manifest
    model = dataclasses.replace(manifest.model, weights="checkpoint", seed=None)
    manifest = dataclasses.replace(manifest, model=model)
    count = manifest.selection.dominant + manifest.selection.contextual
    plain = TokenSpec.of(manifest)
    assert (plain.count, plain.frame_count, plain.closing) == (count, count, 0)
    assert (plain.video_token_id, plain.hidden_size) == (None, manifest.llm.hidden_size)
    assert [plain.rows(frames) for frames in (None, 1, 8)] == [count, count, 8 * count]

    side = manifest.tower.image_size
    tiled = dataclasses.replace(
        manifest,
        tiling=Tiling(((side, 2 * side),)),
        llm=dataclasses.replace(manifest.llm, video_token_id=77),
    )
    tokens = TokenSpec.of(tiled)
    assert (tokens.count, tokens.video_token_id) == (None, 77)
    assert [tokens.rows(frames) for frames in (None, 8)] == [None, 8 * count]

    pooled = types.SimpleNamespace(
        **{
            field.name: getattr(manifest, field.name)
            for field in dataclasses.fields(manifest)
            if field.name != "tower"
        },
        tower=types.SimpleNamespace(pool=2),
    )
    assert TokenSpec.of(pooled).rows(8) == 8 * count + 1
    anything = TokenSpec(None, WIDTH, IMAGE)
    assert [anything.rows(frames) for frames in (None, 8)] == [None, None]
