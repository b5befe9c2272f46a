"""Batches, several images, and what `generate` of transformers takes."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from tests.parity.test_handoff_transformers import (
    IMAGE,
    WIDTH,
    embeds_of,
    first_ids,
    generate,
    make_model,
)
from tests.parity.tiny_llm import make_tokenizer
from tests.refusals import refused
from vzip.runtime.errors import InvalidInputError, MissingDependencyError
from vzip.runtime.llm import TokenSpec
from vzip.runtime.llm.local.transformers import TransformersLLM

pytestmark = pytest.mark.local_llm

QUESTIONS = ("what is it?", "is it a red circle below?", "7?")
COUNTS = (5, 1, 9)


@pytest.fixture
def llava():
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    llm = TransformersLLM(model, tokenizer, template=None)
    return types.SimpleNamespace(model=model, tokenizer=tokenizer, llm=llm)


@pytest.fixture
def images() -> list[np.ndarray]:
    return [embeds_of(count, seed) for seed, count in enumerate(COUNTS)]


def new_ids(result: torch.Tensor, form: str, prompt: int) -> list[list[int]]:
    """With input_ids generate repeats the prompt."""
    return result[:, prompt if form == "mm_encoder_outputs" else 0 :].tolist()


@pytest.mark.parametrize("form", ["inputs_embeds", "mm_encoder_outputs"])
def test_generate_of_a_batch_gives_what_each_question_alone_does(llava, images, form):
    expected, rows = [], []
    for embeds, question in zip(images, QUESTIONS, strict=True):
        conversation = llava.llm.conversation(embeds)
        conversation.ask(question, max_new_tokens=8)
        prompt = first_ids(llava.tokenizer, len(embeds), question)
        expected.append(conversation._history[len(prompt) :])
        _, logits = generate(llava.model, prompt, 8, mm_encoder_outputs=single(embeds))
        rows.append(logits)
    inputs = llava.llm.generation_inputs(images, QUESTIONS, form=form)
    longest = max(
        len(first_ids(llava.tokenizer, len(e), q)) for e, q in zip(images, QUESTIONS, strict=True)
    )
    assert inputs["attention_mask"].shape == (3, longest)
    result = llava.model.generate(
        **inputs,
        max_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert new_ids(result.sequences, form, longest) == expected
    assert len({tuple(ids) for ids in expected}) == 3, "the test wants three answers"
    for number in range(3):
        got = torch.stack([step[number] for step in result.logits])
        torch.testing.assert_close(got, rows[number], rtol=0, atol=2e-4)


def single(*embeds: np.ndarray):
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return {
        "image": BaseModelOutputWithPooling(pooler_output=[torch.tensor(each) for each in embeds])
    }


def test_ask_batch_gives_each_questions_answer(llava, images):
    alone = [llava.llm.ask(e, q, max_new_tokens=8) for e, q in zip(images, QUESTIONS, strict=True)]
    assert llava.llm.ask_batch(images, QUESTIONS, max_new_tokens=8) == alone
    assert llava.llm.ask_batch(images[:1], QUESTIONS[:1], max_new_tokens=8) == alone[:1]


def test_an_answer_of_a_batch_ends_where_it_ends(llava, images):
    """An answer that is over before the others is padded by generate; what pads is not said."""
    conversation = llava.llm.conversation(images[0])
    conversation.ask(QUESTIONS[0], max_new_tokens=8)
    stop = conversation.ids[len(first_ids(llava.tokenizer, COUNTS[0], QUESTIONS[0])) + 2]
    llava.model.generation_config.eos_token_id = [2, stop]
    llm = TransformersLLM(llava.model, llava.tokenizer, template=None)
    alone = [llm.ask(e, q, max_new_tokens=8) for e, q in zip(images, QUESTIONS, strict=True)]
    assert llm.ask_batch(images, QUESTIONS, max_new_tokens=8) == alone
    lengths = [len(llava.tokenizer(answer, add_special_tokens=False).input_ids) for answer in alone]
    assert min(lengths) < max(lengths), "the test wants one answer that is over early"


@pytest.mark.parametrize("counts", [(5, 5), (4, 7, 2)])
def test_several_images_stand_in_one_prompt_in_order(llava, counts):
    images = [embeds_of(count, seed) for seed, count in enumerate(counts)]
    text = "\n".join(count * "<image>" for count in counts)
    ids = llava.tokenizer(f"USER: {text}\n{QUESTIONS[0]} ASSISTANT:").input_ids
    expected, _ = generate(llava.model, ids, 8, mm_encoder_outputs=single(*images))
    swapped, _ = generate(llava.model, ids, 8, mm_encoder_outputs=single(*images[::-1]))
    conversation = llava.llm.conversation(images)
    conversation.ask(QUESTIONS[0], max_new_tokens=8)
    assert list(conversation.ids) == [*ids, *expected[:-1]]
    assert len(counts) > 2 or expected != swapped, "the test wants order to matter"
    assert llava.llm.ask_batch([images], [QUESTIONS[0]], max_new_tokens=8) == [
        llava.llm.ask(images, QUESTIONS[0], max_new_tokens=8)
    ]


def test_a_batch_may_mix_one_image_and_several(llava, images):
    mixed = [images[0], [images[1], images[2]]]
    alone = [
        llava.llm.ask(e, q, max_new_tokens=6) for e, q in zip(mixed, QUESTIONS[:2], strict=True)
    ]
    assert llava.llm.ask_batch(mixed, QUESTIONS[:2], max_new_tokens=6) == alone


@pytest.mark.parametrize(
    ("embeds", "questions", "got"),
    [
        ([], [], "the tokens of 0 images and 0 questions"),
        ([embeds_of(5)], ["a?", "b?"], "the tokens of 1 image and 2 questions"),
        ([embeds_of(5)] * 2, ["a?", " "], "question 1: the question is empty"),
        ([embeds_of(5), embeds_of(4)], ["a?", "b?"], "question 1: got tokens of shape [4,"),
        ([[embeds_of(5), embeds_of(5)[:, 1:]]], ["a?"], "image 1: got tokens of shape [5,"),
        ([[]], ["a?"], "an empty list of images"),
        ([embeds_of(5)], ["is <image> red?"], "'<image>'"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_batch_is_named(llava, embeds, questions, got):
    promise = TokenSpec(count=5, hidden_size=WIDTH, image_token_id=IMAGE)
    llm = TransformersLLM(llava.model, llava.tokenizer, template=None, tokens=promise)
    with refused(InvalidInputError, got=("transformers: ", got)):
        llm.ask_batch(embeds, questions)


def test_what_a_call_can_not_take(llava, images, monkeypatch):
    with refused(InvalidInputError, got="list of 3 arrays with frames=3"):
        llava.llm.conversation(images, frames=3)
    with refused(InvalidInputError, expected="512"):
        llava.llm.ask_batch(images, QUESTIONS, max_new_tokens=500)

    def forward(self, input_ids=None, inputs_embeds=None):
        raise AssertionError

    monkeypatch.setattr(type(llava.model), "forward", forward)
    with refused(MissingDependencyError, got="mm_encoder_outputs", expected="5.18"):
        llava.llm.generation_inputs(images, QUESTIONS, form="mm_encoder_outputs")
