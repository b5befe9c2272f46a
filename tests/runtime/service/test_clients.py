"""What the protocols' own clients get: OpenAI's package, and Triton's."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
import tritonclient.http as triton
from PIL import Image

from tests.places import GOLDEN
from tests.runtime.llm.demo_llm import demo_with_llm
from tests.runtime.service.serving import SCENES, Served, chat, data_url, served
from vzip.runtime import VisionEncoder, open_llm

QUESTIONS = ("What digit is there?", "Where is the digit?", "What colour is the digit?")


@pytest.fixture(scope="module")
def demo() -> Iterator[Served]:
    """The demo bundle with its LLM, as `vzip serve` opens it."""
    with served(demo_with_llm(), llm=True) as each:
        yield each


@pytest.fixture
def client(demo: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0) as each:
        yield each


@pytest.fixture(scope="module")
def asked() -> Any:
    """What `vzip ask` answers: pictures and questions → answer."""
    bundle = demo_with_llm()
    llm = open_llm(bundle, threads=1)
    encoder = VisionEncoder.open(bundle, threads=1)

    def ask(question: str, *pictures: bytes, **options: Any) -> str:
        several = len(pictures) > 1
        tokens = [encoder.image_tokens(each, several=several) for each in pictures]
        return llm.ask(tokens, question, **options)

    yield ask
    encoder.close()


def messages(*pictures: bytes, question: str) -> Any:
    return chat(*pictures, question=question)["messages"]


def test_answers_are_those_of_vzip_ask(client: openai.OpenAI, asked: Any) -> None:
    for scene in SCENES:
        picture = scene.read_bytes()
        for question in QUESTIONS:
            given = client.chat.completions.create(
                model="demo", messages=messages(picture, question=question), temperature=0
            )
            assert given.choices[0].message.content == asked(question, picture)
            assert given.choices[0].finish_reason == "stop"
            assert given.usage.completion_tokens >= 1
            assert (
                given.usage.total_tokens
                == given.usage.prompt_tokens + given.usage.completion_tokens
            )


def test_a_stream_s_pieces_are_the_answer(client: openai.OpenAI, asked: Any) -> None:
    picture = SCENES[0].read_bytes()
    for question in QUESTIONS:
        events = list(
            client.chat.completions.create(
                model="demo",
                messages=messages(picture, question=question),
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        pieces = [each.choices[0].delta.content or "" for each in events if each.choices]
        assert "".join(pieces) == asked(question, picture)
        assert [each.choices[0].finish_reason for each in events if each.choices][-1] == "stop"
        assert events[-1].usage.total_tokens > events[-1].usage.completion_tokens > 0


def test_an_answer_that_the_limit_ends(client: openai.OpenAI, asked: Any) -> None:
    picture = SCENES[0].read_bytes()
    for name in ("max_tokens", "max_completion_tokens"):
        given = client.chat.completions.create(
            model="demo", messages=messages(picture, question=QUESTIONS[0]), **{name: 1}
        )
        assert given.choices[0].finish_reason == "length"
        assert given.choices[0].message.content == asked(QUESTIONS[0], picture, max_new_tokens=1)
        assert given.usage.completion_tokens == 1


def test_several_pictures(client: openai.OpenAI, asked: Any) -> None:
    pictures = [each.read_bytes() for each in SCENES[:2]]
    given = client.chat.completions.create(
        model="demo", messages=messages(*pictures, question=QUESTIONS[0])
    )
    assert given.choices[0].message.content == asked(QUESTIONS[0], *pictures)


def turns(client: openai.OpenAI, picture: bytes, stream: bool) -> tuple[list[str], list[Any]]:
    """Ask all questions in one conversation."""
    said = messages(picture, question=QUESTIONS[0])
    answers, extras = [], []
    for later in (*QUESTIONS[1:], None):
        given = client.chat.completions.create(model="demo", messages=said)
        answers.append(given.choices[0].message.content)
        extras.append(given.vzip)
        said = [*said, {"role": "assistant", "content": answers[-1]}]
        said = [*said, {"role": "user", "content": later}] if later else said
    return answers, extras


def test_later_turns_continue_the_kv_cache(demo: Served, client: openai.OpenAI) -> None:
    picture = SCENES[1].read_bytes()
    with VisionEncoder.open(demo.service.bundle, threads=1) as encoder:
        conversation = demo.web.answering.llm.conversation([encoder.image_tokens(picture)])
    wanted = [conversation.ask(each) for each in QUESTIONS]
    answers, extras = turns(client, picture, stream=False)
    assert answers == wanted
    assert [each["continued"] for each in extras] == [False, True, True]
    assert extras[1]["vision_tokens"] == 0, "the pictures of a kept conversation are not encoded"


def test_turns_whose_kv_cache_is_gone_are_read_anew(demo: Served, client: openai.OpenAI) -> None:
    picture = SCENES[2].read_bytes()
    wanted, _ = turns(client, picture, stream=False)
    said = messages(picture, question=QUESTIONS[0])
    for number, question in enumerate(QUESTIONS[1:]):
        demo.web.answering._forget()
        said += [
            {"role": "assistant", "content": wanted[number]},
            {"role": "user", "content": question},
        ]
        given = client.chat.completions.create(model="demo", messages=said)
        assert given.vzip["continued"] is False
        assert given.choices[0].message.content == wanted[number + 1]


def test_kept_conversations_have_a_bound(demo: Served, client: openai.OpenAI) -> None:
    for number in range(12):
        picture = io.BytesIO()
        Image.new("RGB", (40, 40), (number, 0, 0)).save(picture, "PNG")
        client.chat.completions.create(
            model="demo", messages=messages(picture.getvalue(), question=QUESTIONS[0]), max_tokens=1
        )
    assert demo.web.answering.kept == 8


def test_a_clip(demo: Served, client: openai.OpenAI, tmp_path: Any) -> None:
    import av

    from vzip.runtime.pictures.video import sample_frames

    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 112
        stream.pix_fmt = "yuv420p"
        for scene in SCENES:
            frame = av.VideoFrame.from_image(Image.open(scene).convert("RGB").resize((112, 112)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    url = data_url(path.read_bytes(), "video/mp4")
    parts = [
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "text", "text": QUESTIONS[0]},
    ]
    given = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": parts}]
    )
    with VisionEncoder.open(demo.service.bundle, threads=1) as encoder:
        frames = sample_frames(path, 8)
        tokens = encoder.video_embeds(frames)
    wanted = demo.web.answering.llm.ask(tokens, QUESTIONS[0], frames=len(frames))
    assert given.choices[0].message.content == wanted


def test_models_are_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("demo", "vzip")
    assert model.vzip["tokens"] == 43


REFUSED: dict[str, tuple[dict[str, Any], type[openai.APIStatusError], str]] = {
    "an unknown model": ({"model": "gpt"}, openai.NotFoundError, "model"),
    "sampling": ({"temperature": 0.7}, openai.BadRequestError, "temperature"),
    "a true temperature": ({"temperature": True}, openai.BadRequestError, "temperature"),
    "several choices": ({"n": 2}, openai.BadRequestError, "n"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "x"}}]},
              openai.BadRequestError, "tools"),
    "what is not known": ({"extra_body": {"guided_json": {}}}, openai.BadRequestError,
                          "guided_json"),
    "a limit below 1": ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
    "a limit beyond the context": ({"max_tokens": 60000}, openai.BadRequestError, ""),
    "no messages": ({"messages": []}, openai.BadRequestError, "messages"),
    "no picture": ({"messages": [{"role": "user", "content": "hello"}]},
                   openai.BadRequestError, "messages"),
    "a system message": ({"messages": [{"role": "system", "content": "x"}]},
                         openai.BadRequestError, "messages[0].role"),
    "an audio part": ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
                      openai.BadRequestError, "messages[0].content[0]"),
    "a placeholder in the question": (
        {"messages": messages(SCENES[0].read_bytes(), question="<image> ?")},
        openai.BadRequestError, "",
    ),
    "an empty question": (
        {"messages": messages(SCENES[0].read_bytes(), question=" ")}, openai.BadRequestError, "",
    ),
    "half a picture": (
        {"messages": messages(SCENES[0].read_bytes()[:900], question="What?")},
        openai.BadRequestError, "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_can_t_be_is_an_error_of_the_protocol(
    client: openai.OpenAI, name: str, stream: bool
) -> None:
    changed, kind, parameter = REFUSED[name]
    good = {
        "model": "demo",
        "messages": messages(SCENES[0].read_bytes(), question="What digit is there?"),
    }
    with pytest.raises(kind) as raised:
        client.chat.completions.create(**{**good, **changed}, stream=stream)
    assert set(raised.value.body) == {"message", "type", "param", "code"}
    assert (raised.value.param or "") == parameter
    assert client.chat.completions.create(**good).choices[0].message.content


def test_a_reader_that_leaves_ends_its_answer(demo: Served, client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model="demo", messages=messages(SCENES[0].read_bytes(), question=QUESTIONS[0]), stream=True
    ) as stream:
        next(iter(stream))
    import time

    end = time.monotonic() + 10
    while demo.service.admission.inside:
        assert time.monotonic() < end
        time.sleep(0.002)


def arrays(count: int, seed: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def inferred(
    client: Any, array: np.ndarray, *, binary: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and kept indices, as Triton's client gets them."""
    given = triton.InferInput("image", list(array.shape), "UINT8")
    given.set_data_from_numpy(array, binary_data=binary)
    names = ("image_embeds", "kept_indices")
    outputs = [triton.InferRequestedOutput(each, binary_data=binary) for each in names]
    result = client.infer("demo", [given], outputs=outputs, request_id="7")
    assert result.get_response()["id"] == "7"
    return tuple(result.as_numpy(each) for each in names)


@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_static_bundle"])
def test_tokens_are_those_of_the_encoder(bundle: str) -> None:
    with (
        served(GOLDEN / bundle) as each,
        triton.InferenceServerClient(f"127.0.0.1:{each.port}") as client,
        VisionEncoder.open(GOLDEN / bundle, threads=1) as encoder,
    ):
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("demo")
        (described,) = client.get_model_metadata("demo")["inputs"]
        spec = encoder.manifest.input
        assert (described["name"], described["shape"][1:]) == (spec.name, list(spec.shape[1:]))
        if spec.name != "image":
            return
        for binary in (True, False):
            for count in (1, 2, 3):
                array = arrays(count, count)
                tokens, kept = inferred(client, array, binary=binary)
                wanted = encoder.run(array)  # the same batch, so the same bits
                assert tokens.dtype == np.float32
                assert np.array_equal(tokens, wanted.embeds)
                assert np.array_equal(kept, wanted.kept)


def test_all_outputs_come_where_none_is_named(demo: Served) -> None:
    with (
        triton.InferenceServerClient(f"127.0.0.1:{demo.port}") as client,
        VisionEncoder.open(demo.service.bundle, threads=1) as encoder,
    ):
        array = arrays(1, 3, encoder.manifest.tower.image_size)
        given = triton.InferInput("image", list(array.shape), "UINT8")
        given.set_data_from_numpy(array)
        result = client.infer("demo", [given])
        wanted = encoder.run(array)
        described = client.get_model_metadata("demo")["outputs"]
        names = [each.name for each in encoder.manifest.outputs]
        assert [each["name"] for each in described] == names
        for name, each in zip(names, (wanted.embeds, wanted.kept, wanted.positions), strict=False):
            assert np.array_equal(result.as_numpy(name), each)


def test_pictures_as_files(demo: Served) -> None:
    with (
        triton.InferenceServerClient(f"127.0.0.1:{demo.port}") as client,
        VisionEncoder.open(demo.service.bundle, threads=1) as encoder,
    ):
        files = [each.read_bytes() for each in SCENES]
        given = triton.InferInput("picture", [len(files)], "BYTES")
        given.set_data_from_numpy(np.array(files, object))
        result = client.infer("demo-pictures", [given])
        wanted = encoder.encode(files)
        assert np.array_equal(result.as_numpy("kept_indices"), wanted.kept)
        assert np.array_equal(result.as_numpy("image_embeds"), wanted.embeds)


def test_triton_s_client_gets_errors_in_its_form(demo: Served) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{demo.port}") as client:
        given = triton.InferInput("image", [1, 16, 16, 3], "UINT8")
        given.set_data_from_numpy(arrays(1, 1))
        for name, status in (("demo", "400"), ("other", "404")):
            with pytest.raises(triton.InferenceServerException) as raised:
                client.infer(name, [given])
            assert raised.value.status() == status
            assert raised.value.message()


def test_64_clients_at_once_get_their_own() -> None:
    """Of mixed sizes: sets are equal and numbers within what batches of another size differ by."""
    with (
        served(GOLDEN / "tiny_bundle", delay=0.005, cache_bytes=0) as each,
        VisionEncoder.open(GOLDEN / "tiny_bundle", threads=1) as encoder,
    ):
        asked = [arrays(random.Random(seed).randint(1, 3), seed) for seed in range(256)]
        wanted = [encoder.run(array) for array in asked]

        def client(first: int) -> None:
            with triton.InferenceServerClient(f"127.0.0.1:{each.port}") as own:
                for number in range(first, len(asked), 64):
                    tokens, kept = inferred(own, asked[number])
                    assert np.array_equal(kept, wanted[number].kept)
                    np.testing.assert_allclose(tokens, wanted[number].embeds, atol=1e-5, rtol=0)

        with ThreadPoolExecutor(64) as pool:
            list(pool.map(client, range(64)))
        shared = each.counted("vzip_batch_pictures_count")
        rows = each.counted("vzip_batch_pictures_sum")
        assert rows == sum(map(len, asked))
        assert shared < len(asked), "no two requests shared a call"
