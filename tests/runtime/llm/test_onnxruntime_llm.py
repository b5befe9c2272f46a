"""The language model in a bundle, run by ONNX Runtime, against transformers' own."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.bundles import OWN, copy_files
from tests.parity.test_handoff_families import CHAT_ML, FAMILIES, WITH_VIDEO, make_model
from tests.parity.tiny_llm import IMAGE, WIDTH, embeds_of, make_tokenizer
from tests.places import GOLDEN
from tests.refusals import refused
from tests.runtime.llm.demo_llm import demo_with_llm
from tests.snippets import run_snippets
from vzip.calibration.demo import accuracy, scenes
from vzip.export.llm import onnx_decoder as llm_export
from vzip.runtime import VisionEncoder, demo
from vzip.runtime.bundle.manifest import LLM_FILES, Manifest
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.bundle.writer import bundle_writer
from vzip.runtime.cli.main import main
from vzip.runtime.errors import (
    BackendError,
    BundleError,
    CheckpointError,
    InvalidInputError,
    MissingDependencyError,
)
from vzip.runtime.llm import TokenSpec, opening
from vzip.runtime.llm.chat_template import HubTokenizer
from vzip.runtime.llm.json_tokenizer import JsonTokenizer
from vzip.runtime.llm.local.onnx_decoder import OnnxRuntimeLLM, open_for
from vzip.runtime.llm.local.transformers import TransformersLLM
from vzip.runtime.llm.shown import say_consecutive
from vzip.runtime.tokens.positions import EncodedImage, along

TINY_BUNDLE = GOLDEN / "tiny_bundle"
QUESTIONS = ("what is it?", "is it red?", "and the 7?")
TURNS = ("What digit is there?", "What color is it?", "How many shapes are there?")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return read_bundle(demo_with_llm())


@pytest.fixture(scope="module")
def ours(bundle: Bundle) -> OnnxRuntimeLLM:
    return OnnxRuntimeLLM(bundle, tokens=TokenSpec.of(bundle.manifest))


@pytest.fixture(scope="module")
def theirs(bundle: Bundle) -> TransformersLLM:
    return TransformersLLM.open("demo", tokens=TokenSpec.of(bundle.manifest), device="cpu")


@pytest.fixture(scope="module")
def held_out() -> accuracy.HeldOut:
    return accuracy.held_out(77, 40)


@pytest.fixture(scope="module")
def shown(bundle: Bundle, held_out: accuracy.HeldOut) -> list[np.ndarray]:
    """The compressed tokens of each held-out picture, float32 [43, L]."""
    with VisionEncoder.open(bundle) as encoder:
        return [encoder.image_embeds(picture) for picture in held_out.pictures]


@pytest.fixture(scope="module")
def placed(bundle: Bundle, held_out: accuracy.HeldOut) -> list[EncodedImage]:
    """The same with their places, of a few pictures."""
    with VisionEncoder.open(bundle) as encoder:
        return [encoder.image_tokens(picture) for picture in held_out.pictures[:3]]


@pytest.mark.local_llm
def test_answers_at_original_positions_are_those_of_transformers(ours, theirs, placed):
    """Two turns; the logits of each call, where the first has gaps."""
    assert ours.unable is None
    image = ours.text.prompts.placeholders["image"]
    for tokens in placed:
        mine = ours.conversation(tokens)  # the demo's default
        other = theirs.conversation(tokens, positions="original")
        plain = ours.conversation(tokens, positions="consecutive")
        assert mine.positions == "original"
        assert plain.positions == "consecutive"
        for question in TURNS:
            assert mine.ask(question) == other.ask(question)
        first = ours.text.first(mine.shown, TURNS[0])
        rows, positions = mine.shown.parts[0], along(first, image, mine.shown.where)
        logits = ours.logits(first, ours.new_cache(), rows, positions)
        with torch.inference_mode():
            wanted = theirs.logits(first, theirs.new_cache(), rows, positions).numpy()
        np.testing.assert_allclose(logits, wanted, atol=1e-3)
        renumbered = ours.logits(first, ours.new_cache(), plain.shown.parts[0])
        assert np.abs(renumbered - logits).max() > 0.1


@pytest.mark.local_llm
def test_positions_beyond_what_the_llm_was_trained_with_are_consecutive(
    ours, placed, monkeypatch, caplog
):
    say_consecutive.cache_clear()
    tokens = placed[0]
    length = len(ours.text.first(ours.conversation(tokens).shown, TURNS[0]))
    span = tokens.where.span - len(tokens.embeds)
    monkeypatch.setattr(ours, "trained", length + span + 8)
    fits = ours.conversation(tokens)
    fits.ask(TURNS[0], max_new_tokens=8)
    assert fits.positions == "original"
    assert not caplog.records
    later = refused(
        InvalidInputError, got="original positions", expected=str(ours.trained), cure="begin a new"
    )
    with later:
        fits.ask(TURNS[1], max_new_tokens=8)
    beyond = ours.conversation(tokens)
    answer = beyond.ask(TURNS[0], max_new_tokens=9)
    assert beyond.positions == "consecutive"
    assert str(ours.trained) in caplog.text
    assert len(caplog.records) == 1
    assert answer == ours.ask(tokens, TURNS[0], positions="consecutive", max_new_tokens=9)
    beyond.ask(TURNS[1], max_new_tokens=9)  # and stays so


def as_version_1(bundle: Bundle, folder: Path) -> Bundle:
    """The bundle as older versions of vzip exported it: its LLM numbers tokens by itself."""
    import onnx
    from onnx import TensorProto, helper

    with bundle_writer(folder, replace=False) as writer:
        for name in bundle.manifest.files:
            shutil.copyfile(bundle.path / name, writer.folder / name)
        path = writer.folder / "llm.onnx"
        model = onnx.load(path, load_external_data=False)
        del model.graph.input[1]
        constants = [
            helper.make_tensor("one", TensorProto.INT64, [], [1]),
            helper.make_tensor("first", TensorProto.INT64, [1], [0]),
            helper.make_tensor("index_1", TensorProto.INT64, [], [1]),
            helper.make_tensor("index_2", TensorProto.INT64, [], [2]),
        ]
        model.graph.initializer.extend(constants)
        nodes = [
            helper.make_node("Shape", ["inputs_embeds"], ["shape_n"]),
            helper.make_node("Gather", ["shape_n", "index_1"], ["n"]),
            helper.make_node("Shape", ["past_key_0"], ["shape_m"]),
            helper.make_node("Gather", ["shape_m", "index_2"], ["m"]),
            helper.make_node("Add", ["m", "n"], ["end"]),
            helper.make_node("Range", ["m", "end", "one"], ["counted"]),
            helper.make_node("Unsqueeze", ["counted", "first"], ["positions"]),
        ]
        for node in reversed(nodes):
            model.graph.node.insert(0, node)
        onnx.save(model, path)
        settings = json.loads((writer.folder / "llm.json").read_text())
        assert settings.pop("positions") is True
        settings["version"] = 1
        (writer.folder / "llm.json").write_text(json.dumps(settings))
        return writer.publish(dataclasses.replace(bundle.manifest, files={}))


@pytest.mark.local_llm
def test_an_older_bundle_s_llm_answers_consecutively_and_says_so(
    bundle, ours, placed, tmp_path, caplog
):
    say_consecutive.cache_clear()
    old = OnnxRuntimeLLM(as_version_1(bundle, tmp_path / "old"), tokens=ours.text.tokens)
    conversation = old.conversation(placed[0], positions="original")
    assert conversation.positions == "consecutive"
    assert "older version" in caplog.text
    for question in TURNS[:2]:
        answer = conversation.ask(question)
    same = ours.conversation(placed[0], positions="consecutive")
    assert [same.ask(question) for question in TURNS[:2]][-1] == answer


# ── the demo ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.local_llm
def test_held_out_questions_get_the_answers_that_transformers_gives(ours, theirs, shown, held_out):
    asked = right = 0
    for embeds, questions in zip(shown, held_out.questions, strict=True):
        for question in questions:
            answer = ours.ask(embeds, question.text)
            assert answer == theirs.ask(embeds, question.text)
            asked, right = asked + 1, right + (answer == question.answer)
    assert asked >= 200
    assert right >= 0.75 * asked, "answers that mean something"


@pytest.mark.local_llm
def test_three_turns_equal_and_later_ones_feed_only_what_is_new(ours, theirs, shown, monkeypatch):
    fed: list[tuple[int, bool]] = []
    logits = ours.logits

    def watched(ids: list[int], cache: Any, rows: Any, positions: Any = None) -> Any:
        fed.append((len(ids), rows is not None))
        return logits(ids, cache, rows, positions)

    monkeypatch.setattr(ours, "logits", watched)
    for limit in (256, 1):  # answers that end by themselves, and ones that are cut short
        one, other = ours.conversation(shown[0]), theirs.conversation(shown[0])
        for turn, question in enumerate(TURNS):
            fed.clear()
            before = len(one.ids)
            assert one.ask(question, max_new_tokens=limit) == other.ask(
                question, max_new_tokens=limit
            )
            assert one.ids == other.ids
            (prompt, with_image), *single = fed
            assert with_image == (turn == 0)
            assert set(single) <= {(1, False)}
            if turn:
                assert prompt == len(one.ids) - before - len(single) < 43
            else:
                assert prompt > 43


@pytest.mark.local_llm
def test_conversations_keep_caches_of_their_own(ours, shown):
    alone = [ours.conversation(embeds) for embeds in shown[:2]]
    expected = [[each.ask(question) for question in TURNS] for each in alone]
    assert expected[0] != expected[1]
    mixed = [ours.conversation(embeds) for embeds in shown[:2]]
    answers = [[each.ask(question) for each in mixed] for question in TURNS]
    assert [list(turns) for turns in zip(*answers, strict=True)] == expected


@pytest.mark.local_llm
def test_an_answer_comes_in_pieces(ours, theirs, shown):
    long = [list(llm.stream(shown[1], "Where is the digit?")) for llm in (ours, theirs)]
    assert long[0] == long[1]
    assert "".join(long[0]) == ours.ask(shown[1], "Where is the digit?")
    stream = ours.stream(shown[1], TURNS[0])
    assert next(stream) == ours.ask(shown[1], TURNS[0])[:1]


@pytest.mark.slow
@pytest.mark.local_llm
def test_several_images_and_the_frames_of_a_video(ours, theirs, bundle, shown):
    for question in TURNS:
        assert ours.ask(shown[:3], question) == theirs.ask(shown[:3], question)
    rng = np.random.default_rng(5)
    scene = scenes.draw_scene(rng, "test")
    frames = [Image.fromarray(scenes.paint(scene, 112)) for _ in range(4)]
    with VisionEncoder.open(bundle) as encoder:
        video = encoder.video_embeds(frames)
    one, other = ours.conversation(video, frames=4), theirs.conversation(video, frames=4)
    for question in scenes.ask(rng, scene):
        assert one.ask(question.text) == other.ask(question.text)
    assert one.ids == other.ids
    assert one.ids.count(IMAGE) == 4 * 43


@pytest.mark.local_llm
def test_the_context_is_a_limit(ours, shown):
    with refused(InvalidInputError, expected="1024"):
        ours.conversation(shown[0]).ask("What digit is there?", max_new_tokens=1000)
    with refused(InvalidInputError, got="[42, 128]"):
        ours.conversation(shown[0][:42])


@pytest.mark.local_llm
def test_the_bundles_own_llm_is_the_default(bundle, monkeypatch, capsys):
    assert opening.own(bundle) == opening.LlmChoice("onnxruntime", str(bundle.path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    picture, asked = next(
        iter(json.loads((demo.pictures() / "questions.json").read_text()).items())
    )
    question = next(each for each in asked if each["kind"] == "digit")
    capsys.readouterr()
    command = ["ask", str(bundle.path), str(demo.pictures() / picture), question["question"]]
    assert main(command) == 0
    assert capsys.readouterr() == (question["answer"] + "\n", "")


@pytest.mark.local_llm
def test_another_bundles_llm_can_be_named(bundle, shown, tiny_bundle, tmp_path):
    plain = tmp_path / "plain"
    with bundle_writer(plain) as writer:
        copy_files(bundle.path, writer.folder)
        without = writer.publish(bundle.manifest)
    assert opening.own(without).name == "transformers"
    choice = opening.parse(f"onnxruntime:{bundle.path}")
    assert choice.open(without).ask(shown[0], TURNS[0]) == open_for(str(bundle.path), bundle).ask(
        shown[0], TURNS[0]
    )
    with refused(BundleError, cure="--with-llm"):
        open_for(str(plain), without)
    with refused(BundleError, got="nothing", expected="the folder"):
        open_for(str(tmp_path / "nowhere"), without)
    other = dataclasses.replace(
        without.manifest, llm=dataclasses.replace(without.manifest.llm, image_token_id=7)
    )
    with refused(InvalidInputError, got="image token id", expected="7"):
        open_for(str(bundle.path), Bundle(without.path, other))


@pytest.mark.local_llm
def test_the_page_runs(capsys):
    picture = demo.pictures() / "scene-1.jpg"
    replaced = {"llava-64": str(demo_with_llm()), "photo.jpg": str(picture)}
    names = run_snippets("llm/onnxruntime.md", replaced)
    assert names["answer"]
    assert names["second"]
    assert names["answer"] in capsys.readouterr().out


# ── tiny models of every kind of LLM ────────────────────────────────────────────────────────────


def put(folder: Path, llm: TransformersLLM, precision: str = "fp32") -> Bundle:
    """Write a bundle with this LLM; its vision graph is the tiny one's and has nothing to do."""
    tiny = read_bundle(TINY_BUNDLE)
    with bundle_writer(folder) as writer:
        copy_files(TINY_BUNDLE, writer.folder)
        llm_export.write(llm, writer.folder, precision=precision)
        return writer.publish(tiny.manifest)


@pytest.fixture(scope="module", params=["llava", "bakllava", "onevision"])
def tiny(request: Any, tmp_path_factory: pytest.TempPathFactory) -> types.SimpleNamespace:
    """A tiny LLaVA with a Llama, a Mistral or a Qwen2, untouched and in a bundle."""
    family = FAMILIES[request.param]
    tokenizer = make_tokenizer(special=WITH_VIDEO)

    def llm() -> TransformersLLM:
        model = make_model(family, len(tokenizer))
        return TransformersLLM(model, tokenizer, template=family.template)

    folder = tmp_path_factory.mktemp(request.param)
    written = put(folder / "bundle", llm())
    return types.SimpleNamespace(family=family, theirs=llm(), bundle=written, again=llm)


def full(llm: TransformersLLM, ids: list[int], rows: np.ndarray) -> np.ndarray:
    """Logits behind the last of `ids`, all recomputed; the first placeholders are the rows."""
    everything = torch.tensor([ids])
    places = torch.isin(everything, torch.tensor(list(llm.text.prompts.placeholders.values())))
    with torch.no_grad():
        made = llm.model.get_input_embeddings()(everything)
        made[0, places[0].nonzero()[: len(rows), 0]] = torch.from_numpy(rows)
        return llm.model(inputs_embeds=made).logits[0, -1].numpy()


@pytest.mark.slow
@pytest.mark.local_llm
@pytest.mark.parametrize("kind", ["image", "video"])
def test_logits_equal_a_full_recompute(tiny, kind):
    if kind == "video" and not tiny.family.videos:
        pytest.skip("its LLM has no placeholder of a video")
    llm, rows = OnnxRuntimeLLM(tiny.bundle), embeds_of(9)
    assert llm.text.prompts.placeholders == tiny.theirs.text.prompts.placeholders
    first = llm.text.prompts.first(QUESTIONS[0], kind)
    assert first == tiny.theirs.text.prompts.first(QUESTIONS[0], kind)
    place = llm.text.prompts.placeholders[kind]
    ids = [token for each in first for token in [each] * (9 if each == place else 1)]
    later = [2, *llm.text.prompts.later(QUESTIONS[1])]
    assert later[1:] == tiny.theirs.text.prompts.later(QUESTIONS[1])
    cache, seen = llm.new_cache(), []
    for call, new in enumerate([ids, [300], [17], [IMAGE], later, [40], [41, 42]]):
        logits = llm.logits(new, cache, None if call else rows)
        seen += new
        expected = full(tiny.theirs, seen, rows)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
        assert logits.argmax() == expected.argmax()
    assert np.ptp(expected) > 1, "the test wants logits that differ"


@pytest.mark.slow
@pytest.mark.local_llm
def test_conversations_equal_transformers(tiny):
    llm = OnnxRuntimeLLM(tiny.bundle)
    for embeds, frames in ((embeds_of(7), None), ([embeds_of(5), embeds_of(3)], None)) + (
        ((embeds_of(8), 2),) if tiny.family.videos else ()
    ):
        one = llm.conversation(embeds, frames=frames)
        other = tiny.theirs.conversation(embeds, frames=frames)
        for question in QUESTIONS:
            pieces = [list(each.stream(question, max_new_tokens=12)) for each in (one, other)]
            assert pieces[0] == pieces[1]
        assert one.ids == other.ids
        assert len(set(one.ids)) > 20, "the test wants answers that say something"


@pytest.mark.slow
@pytest.mark.local_llm
def test_in_fp16_weights_and_cache_are_half_as_wide(tiny, tmp_path):
    half = put(tmp_path / "half", tiny.again(), "fp16")
    sizes = [
        sum(each.manifest.files[name].bytes for name in ("llm.onnx.data", "llm_embeddings.npy"))
        for each in (half, tiny.bundle)
    ]
    assert sizes[0] < 0.6 * sizes[1]
    llm, rows = OnnxRuntimeLLM(half), embeds_of(9)
    assert llm.largest == 65504
    cache = llm.new_cache()
    ids = [1, *[IMAGE] * 9, 40, 41]
    logits = llm.logits(ids, cache, rows)
    assert {value.numpy().dtype for value in cache} == {np.dtype(np.float16)}
    assert [value.shape() for value in cache] == [[1, 1, 12, 32]] * 4
    expected = full(tiny.theirs, ids, rows)
    assert 0 < np.abs(logits - expected).max() < 0.02 * np.abs(expected).max()
    with refused(InvalidInputError, expected="65504"):
        llm.conversation(np.full((3, WIDTH), 1e6, np.float32))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with a tiny Llama."""
    tokenizer = make_tokenizer(special=WITH_VIDEO)
    model = make_model(FAMILIES["llava"], len(tokenizer))
    return put(
        tmp_path_factory.mktemp("plain") / "bundle",
        TransformersLLM(model, tokenizer, template=CHAT_ML),
    )


@pytest.mark.slow
@pytest.mark.local_llm
def test_of_equal_logits_the_lower_id_is_said(plain, monkeypatch):
    llm = OnnxRuntimeLLM(plain)
    logits = np.zeros(300, np.float32)
    logits[[41, 40, 200]] = 5
    monkeypatch.setattr(llm, "logits", lambda *_: logits)
    assert llm.step([5], llm.new_cache(), None) == 40
    for bad in (np.nan, np.inf):
        logits[70] = bad
        with refused(BackendError, got="onnxruntime: the LLM's output is not finite"):
            llm.step([5], llm.new_cache(), None)


@pytest.mark.slow
@pytest.mark.local_llm
def test_a_graph_that_fails_breaks_its_conversation_alone(plain, monkeypatch):
    llm = OnnxRuntimeLLM(plain)
    expected = llm.ask(embeds_of(3), QUESTIONS[0], max_new_tokens=4)
    conversation = llm.conversation(embeds_of(3))
    session = llm._session

    def fails(binding: Any) -> None:
        raise RuntimeError("bad allocation\nand more")

    broken = types.SimpleNamespace(io_binding=session.io_binding, run_with_iobinding=fails)
    monkeypatch.setattr(llm, "_session", broken)
    with refused(BackendError, got="(bad allocation)", cause="memory"):
        conversation.ask(QUESTIONS[0])
    monkeypatch.setattr(llm, "_session", session)
    with refused(BackendError, cure="a new conversation"):
        conversation.ask(QUESTIONS[0])
    assert llm.ask(embeds_of(3), QUESTIONS[0], max_new_tokens=4) == expected


@pytest.mark.local_llm
def test_a_token_without_an_embedding(plain):
    llm = OnnxRuntimeLLM(plain)
    rows = llm.settings.vocabulary
    with refused(InvalidInputError, got=f"id {rows}", expected=str(rows)):
        llm.logits([5, rows], llm.new_cache(), None)


@pytest.mark.slow
@pytest.mark.local_llm
def test_a_placeholder_needs_no_embedding(tmp_path):
    """LLaVA-NeXT's 32000 is one past a vocabulary of 32000 that nobody extended."""
    tokenizer = make_tokenizer()
    vocabulary = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})

    def llm() -> TransformersLLM:
        model = make_model(FAMILIES["video-llava"], vocabulary, video_token_index=vocabulary)
        return TransformersLLM(model, tokenizer, template=None)

    ours = OnnxRuntimeLLM(put(tmp_path / "bundle", llm()))
    assert ours.settings.placeholders["video"] == ours.settings.vocabulary
    conversations = [each.conversation(embeds_of(6), frames=2) for each in (ours, llm())]
    said = [each.ask(QUESTIONS[0], max_new_tokens=6) for each in conversations]
    assert said[0] == said[1]
    assert conversations[0].ids == conversations[1].ids


# ── what is wrong with a bundle is said ─────────────────────────────────────────────────────────


def rewritten(bundle: Bundle, folder: Path, change: Callable[[Path], None]) -> Bundle:
    """Return a copy of a bundle, changed, whose manifest has the digests of what is there."""
    with bundle_writer(folder, replace=True) as writer:
        copy_files(bundle.path, writer.folder, bundle.manifest.files)
        change(writer.folder)
        return writer.publish(bundle.manifest)


@pytest.mark.parametrize("name", LLM_FILES)
@pytest.mark.parametrize("damage", ["flipped", "short", "absent", "link"])
def test_a_damaged_file_is_refused_before_it_runs(plain, name, damage, tmp_path):
    folder = Path(shutil.copytree(plain.path, tmp_path / "copy"))
    file = folder / name
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        # In a graph, within a name: a field's tag or length would make it no protobuf any more.
        place = data.find(b"past_key_0") if name == "llm.onnx" else len(data) // 2
        data[place] ^= 1
        file.write_bytes(data)
    elif damage == "short":
        file.write_bytes(data[:-1])
    else:
        file.rename(tmp_path / "elsewhere")
        if damage == "link":
            file.symlink_to(tmp_path / "elsewhere")
    shown = {
        "flipped": "has SHA-256",
        "short": f"has {len(data) - 1} bytes",
        "absent": "can't be read",
        "link": "is a symbolic link",
    }
    got = f"{name} {shown[damage]}"
    with refused(BundleError, got=f"{folder}: {got}") as raised:
        OnnxRuntimeLLM(Bundle(folder, plain.manifest))
    assert "\n" not in str(raised.value)
    with refused(BundleError, got=got):
        read_bundle(folder)
    if damage == "flipped":  # the vision encoder doesn't read it
        VisionEncoder.open(folder).close()


def without(name: str) -> Callable[[Path], None]:
    return lambda staged: (staged / name).unlink()


def elsewhere(staged: Path) -> None:
    data = (staged / "llm.onnx").read_bytes()
    (staged / "llm.onnx").write_bytes(data.replace(b"llm.onnx.data", b"../../etc/pass"[:13]))


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (without("llm.onnx"), "lacks llm.onnx"),
        (without("llm.json"), "lacks llm.json"),
        (without("llm_embeddings.npy"), "lacks llm_embeddings.npy"),
        (without("llm_tokenizer.json"), "lacks llm_tokenizer.json"),
        (without("llm.onnx.data"), "lies in llm.onnx.data"),
        (elsewhere, "lies in '../../etc/pas'"),
        (lambda staged: (staged / "llm.onnx").write_bytes(b"\x0f" * 9), "llm.onnx is malformed"),
    ],
)
def test_what_is_no_whole_llm_is_not_published(plain, tmp_path, change, got):
    with refused(BundleError, got=got):
        rewritten(plain, tmp_path / "x", change)
    assert not (tmp_path / "x").exists()


def edited(**values: Any) -> Callable[[Path], None]:
    def change(staged: Path) -> None:
        settings = json.loads((staged / "llm.json").read_text())
        for name, value in values.items():
            if value is None:
                del settings[name]
            else:
                settings[name] = value
        (staged / "llm.json").write_text(json.dumps(settings))

    return change


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (edited(version=3), "'version' is 3"),
        (edited(version=1), "'positions' is True"),
        (edited(positions=None), "'positions' is False"),
        (edited(version=True), "'version' is True"),
        (edited(format="else"), '"else"'),
        (edited(eos=None), "lacks ['eos']"),
        (edited(more=1), "has the unknown ['more']"),
        (edited(layers=0), "'layers' is 0"),
        (edited(layers=10**7), "'layers' is 10000000"),
        (edited(layers=True), "'layers' is True"),
        (edited(context="long"), "'context' is 'long'"),
        (edited(eos_ids=[]), "'eos_ids' is []"),
        (edited(eos_ids=[7]), "'eos_ids' is [7]"),
        (edited(eos_id=-1), "'eos_id' is -1"),
        (edited(eos=""), "'eos' is ''"),
        (edited(bos=1), "'bos' is 1"),
        (edited(dtype="int8"), "'dtype' is 'int8'"),
        (edited(placeholders={"video": 4}), "'placeholders' is {'video': 4}"),
        (edited(placeholders={"image": -200}), "'placeholders.image' is -200"),
        (edited(words={"first": {}, "later": None}), "'words.first' is {}"),
        (lambda staged: (staged / "llm.json").write_text("{"), "no JSON"),
        (lambda staged: (staged / "llm.json").write_bytes(b" " * (2**20 + 1)), "1048577 bytes"),
        (edited(vocabulary=9), "llm_embeddings.npy holds float32 [306, 64] in"),
        (edited(dtype="float16"), "llm_embeddings.npy holds float32 [306, 64] in"),
        (
            lambda staged: (
                np.savez(staged / "llm_embeddings.npy.npz")
                or (staged / "llm_embeddings.npy.npz").rename(staged / "llm_embeddings.npy")
            ),
            "llm_embeddings.npy",
        ),
    ],
)
def test_settings_of_another_kind_are_refused(plain, change, got, tmp_path):
    bundle = rewritten(plain, tmp_path / "x", change)
    with refused(BundleError, got=(str(bundle.path), got)) as raised:
        OnnxRuntimeLLM(bundle)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("change", [{"layers": 1}, {"kv_heads": 2}, {"head_size": 16}])
def test_a_graph_of_another_model_is_refused(plain, change, tmp_path):
    bundle = rewritten(plain, tmp_path / "x", edited(**change))
    with refused(BundleError, got=("onnxruntime: ", str(bundle.path)), expected="llm.json"):
        OnnxRuntimeLLM(bundle)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (
            lambda staged: (staged / "llm_tokenizer.json").write_text('{"version": "9"}'),
            "tokenizer",
        ),
        (edited(eos="<end>"), "'<end>' or '<s>'"),
        (edited(placeholders={"image": 9999}), ("onnxruntime: ", "9999")),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(plain, tmp_path, change, got):
    with refused(CheckpointError, got=got):
        OnnxRuntimeLLM(rewritten(plain, tmp_path / "x", change))


@pytest.mark.parametrize("package", ["onnxruntime", "tokenizers"])
def test_a_package_that_is_absent(plain, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with refused(MissingDependencyError, got=("'onnxruntime'", repr(package)), cure="llm-cpu"):
        OnnxRuntimeLLM(plain)


def test_a_bundle_with_an_llm_is_replaced_by_one_without(plain, tmp_path):
    target = rewritten(plain, tmp_path / "x", lambda staged: None).path
    kept = refused(BundleError, got="the language model", cure="--replace")
    with kept, bundle_writer(target):
        pytest.fail("the language model was about to go")
    bundle = rewritten(
        plain, target, lambda staged: [(staged / name).unlink() for name in LLM_FILES] and None
    )
    assert not bundle.has_llm
    assert sorted(path.name for path in target.iterdir()) == OWN
    assert isinstance(bundle.manifest, Manifest)


# ── the tokenizer ───────────────────────────────────────────────────────────────────────────────

TEXTS = (
    "USER: <image>\nwhat is the shape? ASSISTANT:",
    "it is a red circle</s>USER: is there a 7 below it? ASSISTANT:",
    "  two  blanks, <s>, <pad> and <unk>",
    "Größe 大きさ 🙂 \x00\t\n",
    "",
)


def pair(kind: str) -> tuple[HubTokenizer, JsonTokenizer]:
    tokenizer = make_tokenizer(kind)
    text = tokenizer.backend_tokenizer.to_str()
    return HubTokenizer("tests", tokenizer), JsonTokenizer(
        text.encode(), bos="<s>", eos="</s>", needed_for="a test", extra="llm-cpu"
    )


@pytest.mark.parametrize("kind", ["bytes", "llama", "first"])
def test_the_tokenizers_file_gives_what_transformers_gives(kind):
    theirs, ours = pair(kind)
    assert (ours.bos, ours.eos, ours.eos_id) == (theirs.bos, theirs.eos, theirs.eos_id)
    for text in TEXTS:
        for special in (False, True):
            ids = ours.encode(text, special=special)
            assert ids == theirs.encode(text, special=special)
            for end in range(len(ids) + 1):  # characters of several bytes in the making, too
                assert ours.decode(ids[:end]) == theirs.decode(ids[:end])
    count = len(theirs._tokenizer)
    assert [ours.token(i) for i in range(count)] == [theirs.token(i) for i in range(count)]
    assert ours.token(count) is None
    assert ours.token(-200) is None
    if kind == "bytes":
        assert ours.decode(ours.encode("大", special=False)[:1]) == "\ufffd"


@pytest.mark.local_llm
def test_a_character_of_several_tokens_comes_in_one_piece(plain, monkeypatch):
    llm = OnnxRuntimeLLM(plain)
    ids = iter(
        [*llm.text.prompts.tokenizer.encode("a 大きさ 🙂!", special=False), llm.text.prompts.eos_id]
    )
    monkeypatch.setattr(llm, "step", lambda new, cache, rows, positions=None: next(ids))
    pieces = list(llm.stream(embeds_of(2), "what?"))
    assert "".join(pieces) == "a 大きさ 🙂!"
    assert {"大", "き", "さ"} <= {piece.strip() for piece in pieces}
    assert not any("\ufffd" in piece for piece in pieces)
