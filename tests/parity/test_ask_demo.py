"""The demo model end to end: its pictures and a drawn clip through ``vzip ask`` and ``chat``."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vzip.calibration.demo import scenes
from vzip.runtime import VisionEncoder, demo
from vzip.runtime.cli.main import main
from vzip.runtime.llm import TokenSpec
from vzip.runtime.llm.local.transformers import TransformersLLM
from vzip.runtime.pictures.video import sample_frames

pytestmark = pytest.mark.local_llm

SCENES = (3, 5)  # seeds
LENGTH = 30


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "bundle"
    assert main(["export", "--model", "demo", "-o", str(folder)]) == 0
    return folder


def draw(seed: int) -> tuple[list[np.ndarray], list[scenes.Question]]:
    """Frames of a scene whose things go round in small circles, and what can be asked of it."""
    rng = np.random.default_rng(seed)
    scene = scenes.draw_scene(rng, "test")
    frames = []
    for turn in np.linspace(0, 2 * np.pi, LENGTH, endpoint=False):
        things = tuple(
            dataclasses.replace(
                thing,
                x=thing.x + 0.03 * float(np.sin(turn + index)),
                y=thing.y + 0.03 * float(np.cos(turn + index)),
            )
            for index, thing in enumerate(scene.things)
        )
        frames.append(scenes.paint(dataclasses.replace(scene, things=things), 224))
    return frames, scenes.ask(rng, scene)


def film(path: Path, frames: list[np.ndarray]) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=15)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[Path, list[scenes.Question]]:
    """MP4 files, and the questions that each answers."""
    folder = tmp_path_factory.mktemp("clips")
    made = {}
    for seed in SCENES:
        frames, questions = draw(seed)
        assert np.abs(frames[0].astype(int) - frames[LENGTH // 2]).max() > 50, "they move"
        made[film(folder / f"scene-{seed}.mp4", frames)] = questions
    return made


def chat(bundle, shown, turns, monkeypatch, capsys) -> list[str]:
    """Ask one question after the other; the image or video is encoded once."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(turns)))
    assert main(["chat", str(bundle), str(shown)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


@pytest.mark.slow
def test_its_pictures_are_answered(bundle, capsys):
    right = 0
    capsys.readouterr()
    asked = json.loads((demo.pictures() / "questions.json").read_text())
    for name, questions in asked.items():
        digit = next(each for each in questions if each["kind"] == "digit")
        assert main(["ask", str(bundle), str(demo.pictures() / name), digit["question"]]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        right += out == digit["answer"] + "\n"
    assert len(asked) == 4
    assert right >= 3, "it knows most digits"


@pytest.mark.slow
def test_two_pictures_at_once(bundle, tmp_path, monkeypatch, capsys):
    """The LLM was trained on one, so what it says of two is no measure: it is what Python gets."""
    one, two = sorted(demo.pictures().glob("*.jpg"))[:2]
    question = "What digit is there?"
    with VisionEncoder.open(bundle) as encoder:
        encoded = [encoder.image_tokens(path) for path in (one, two)]
        llm = TransformersLLM.open("demo", tokens=TokenSpec.of(encoder.manifest))
    shown = []
    conversation = TransformersLLM.conversation

    def watched(self, encoded, **options):
        shown.append(encoded)
        return conversation(self, encoded, **options)

    monkeypatch.setattr(TransformersLLM, "conversation", watched)
    capsys.readouterr()
    cache = tmp_path / "cache"
    assert main(["ask", str(bundle), str(two), question, "--cache", str(cache)]) == 0
    alone = capsys.readouterr().out
    assert alone == llm.ask(encoded[1], question) + "\n"
    expected = llm.ask(encoded, question) + "\n"
    shown.clear()
    for options in ([], ["--cache", str(cache)], ["--cache", str(cache)]):
        assert main(["ask", str(bundle), str(one), str(two), question, *options]) == 0
        assert capsys.readouterr() == (expected, "")
        for got, wanted in zip(shown[-1], encoded, strict=True):
            np.testing.assert_array_equal(got.embeds, wanted.embeds)
            np.testing.assert_array_equal(got.where.places, wanted.where.places)
    monkeypatch.setattr(VisionEncoder, "open", lambda *_: pytest.fail("all are in the cache"))
    assert main(["ask", str(bundle), str(one), str(two), question, "--cache", str(cache)]) == 0
    assert capsys.readouterr() == (expected, "")


def test_a_clip_and_a_picture_are_refused(bundle, clips, capsys):
    picture, clip = str(demo.pictures() / "scene-1.jpg"), str(next(iter(clips)))
    capsys.readouterr()
    for shown in ([picture, clip], [clip, picture], [clip, clip]):
        assert main(["ask", str(bundle), *shown, "What digit is there?"]) == 2
        assert "expected one video or any number of images" in capsys.readouterr().err


@pytest.mark.slow
def test_a_clip_is_answered(bundle, clips, monkeypatch, capsys):
    right = total = 0
    capsys.readouterr()
    for path, asked in clips.items():
        turns = [question.text for question in asked]
        answers = chat(bundle, path, turns, monkeypatch, capsys)
        right += sum(a == question.answer for a, question in zip(answers, asked, strict=True))
        total += len(asked)
        assert main(["ask", str(bundle), str(path), turns[0]]) == 0
        assert capsys.readouterr() == (f"{answers[0]}\n", "")
    assert total >= 12
    assert right >= 0.75 * total


@pytest.mark.slow
def test_clip_folder_and_python_give_one_answer(bundle, clips, tmp_path, monkeypatch, capsys):
    path, asked = next(iter(clips.items()))
    frames = sample_frames(path)
    assert len(frames) == 8
    with VisionEncoder.open(bundle) as encoder:
        tokens = TokenSpec.of(encoder.manifest)
        embeds = encoder.video_embeds(frames)
    assert len(embeds) == 8 * tokens.frame_count
    llm = TransformersLLM.open("demo", tokens=tokens)
    turns = [question.text for question in asked]
    conversation = llm.conversation(embeds, frames=8)
    expected = [conversation.ask(turn) for turn in turns]
    for index, frame in enumerate(frames):
        frame.save(tmp_path / f"frame{index}.png")
    capsys.readouterr()
    assert chat(bundle, path, turns, monkeypatch, capsys) == expected
    assert chat(bundle, tmp_path, turns, monkeypatch, capsys) == expected


@pytest.mark.slow
def test_frames_says_how_many(bundle, clips, monkeypatch, capsys):
    seen = []
    encode = VisionEncoder.video_tokens

    def video_tokens(self, frames, **options):
        seen.append(frames)
        return encode(self, frames, **options)

    monkeypatch.setattr(VisionEncoder, "video_tokens", video_tokens)
    path = next(iter(clips))
    for option, count in (([], 8), (["--frames", "3"], 3), (["--frames", "1"], 1)):
        assert main(["ask", str(bundle), str(path), "What digit is there?", *option]) == 0
        assert len(seen[-1]) == count
        assert all(isinstance(frame, Image.Image) for frame in seen[-1])
    capsys.readouterr()
    # 30 frames of 64 tokens are more than the demo's 1024: the LLM says so before it runs.
    assert main(["ask", str(bundle), str(path), "What digit is there?", "--frames", "30"]) == 2
    assert "1024" in capsys.readouterr().err
