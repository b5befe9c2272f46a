"""The words around questions: taken from templates, kept as JSON, and put together again."""

from __future__ import annotations

import json

import pytest

from tests.parity.tiny_llm import IMAGE, SPECIAL, make_tokenizer
from tests.refusals import refused
from vzip.runtime.errors import CheckpointError, InvalidInputError
from vzip.runtime.files.codec import MisfitError, read, write
from vzip.runtime.llm.chat_template import HubTokenizer, make_prompts, words_of
from vzip.runtime.llm.prompts import FirstTurn, LaterTurn, Prompts, Words, llava_15_words

WITH_VIDEO = (*SPECIAL, "<video>")
VIDEO = WITH_VIDEO.index("<video>")
PLACEHOLDERS = {"image": IMAGE, "video": VIDEO}

# Images before the text and a newline after all of them; videos have a line each.
CHAT_ML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'video' %}{{ '<video>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ '\n' + c['text'] }}{% endfor %}"
    "{{ '</s>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ONE_IMAGE = "USER: <image>\n{{ messages[-1]['content'][-1]['text'] }} ASSISTANT:"


def rendered(tokenizer, template: str, kind: str, count: int, question: str) -> str:
    content = [{"type": kind}] * count + [{"type": "text", "text": question}]
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
    )


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_words_say_what_the_template_renders(kind, count):
    tokenizer = make_tokenizer(special=WITH_VIDEO)
    words = words_of("tests", tokenizer, PLACEHOLDERS, CHAT_ML)
    assert words == Words(
        {
            "image": FirstTurn("<|user|>", "", "\n", "</s>\n<|assistant|>"),
            "video": FirstTurn("<|user|>", "\n", "\n\n", "</s>\n<|assistant|>"),
        },
        LaterTurn("\n<|user|>\n", "</s>\n<|assistant|>"),
    )
    prompts = Prompts("tests", HubTokenizer("tests", tokenizer), words, PLACEHOLDERS)
    text = rendered(tokenizer, CHAT_ML, kind, count, "is it red?")
    assert prompts.first("is it red?", kind, count) == tokenizer(text).input_ids


def test_words_survive_json():
    for words in (
        llava_15_words(),
        llava_15_words(videos=True),
        Words({"image": FirstTurn("a", None, "b", "c")}, None),
    ):
        assert read(Words, json.loads(json.dumps(write(words)))) == words


TURN = {"before": "", "between": "", "after": "", "end": ""}


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (None, "is None"),
        ([], "is []"),
        ({}, "['first', 'later']"),
        ({"first": {}, "later": None}, "'first' is {}"),
        ({"first": {"film": {}}, "later": None}, "'film'"),
        ({"first": {"image": {"before": "a"}}, "later": None}, "'first.image' lacks"),
        ({"first": {"image": {**TURN, "before": 1}}, "later": None}, "'first.image.before' is 1"),
        ({**write(llava_15_words()), "later": "USER"}, "'later' is 'USER'"),
    ],
)  # fmt: skip
def test_what_are_no_words_is_refused(data, got):
    with refused(MisfitError, got=got):
        read(Words, data)


def test_a_template_for_one_image_takes_no_two():
    prompts = make_prompts("tests", make_tokenizer(), {"image": IMAGE}, ONE_IMAGE)
    assert prompts.first("what?").count(IMAGE) == 1
    with refused(CheckpointError, got="2 images", cure="one"):
        prompts.first("what?", "image", 2)


def test_llava_15_words_are_the_published_ones():
    tokenizer = make_tokenizer()
    prompts = make_prompts("tests", tokenizer, {"image": IMAGE}, None)
    expected = tokenizer("USER: <image>\n<image>\nwhat is it? ASSISTANT:").input_ids
    assert prompts.first("what is it?", "image", 2) == expected
    with refused(CheckpointError, got="videos"):
        prompts.first("what?", "video")


@pytest.mark.parametrize("place", ["first", "later"])
def test_a_question_with_a_placeholder_is_refused(place):
    prompts = make_prompts("tests", make_tokenizer(), {"image": IMAGE}, None)
    with refused(InvalidInputError, got="'<image>'"):
        getattr(prompts, place)("is <image> red?")
