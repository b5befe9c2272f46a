from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vzip.calibration.demo import scenes
from vzip.runtime import demo

MEGABYTE = 1_000_000


def draw(seed: int, count: int) -> list[scenes.Scene]:
    rng = np.random.default_rng(seed)
    return [scenes.draw_scene(rng, "test") for _ in range(count)]


def test_the_same_seed_gives_the_same_scenes_and_questions():
    first, second = draw(3, 5), draw(3, 5)
    for left, right in zip(first, second, strict=True):
        assert left.things == right.things
        np.testing.assert_array_equal(scenes.paint(left, 112), scenes.paint(right, 112))
        asked = [scenes.ask(np.random.default_rng(8), scene) for scene in (left, right)]
        assert asked[0] == asked[1]
    assert draw(4, 1)[0].things != first[0].things


def test_no_handwritten_digit_is_in_both_splits():
    def seen(split: scenes.Split) -> set[bytes]:
        return {
            bitmap.tobytes()
            for bitmaps in scenes.digit_bitmaps(split).values()
            for bitmap in bitmaps
        }

    train, test = seen("train"), seen("test")
    assert len(train) + len(test) == 1797
    assert not train & test


def test_objects_differ_in_name_and_color_and_stay_apart():
    for scene in draw(5, 200):
        assert 2 <= len(scene.things) <= 4
        assert len({thing.name for thing in scene.things}) == len(scene.things)
        assert len({thing.color for thing in scene.things}) == len(scene.things)
        assert 1 <= sum(thing.is_digit for thing in scene.things) <= 2
        assert any(not thing.is_digit for thing in scene.things)


def test_most_patches_are_background_and_every_object_has_some():
    labels = [scenes.patch_labels(scene, 14) for scene in draw(6, 100)]
    assert np.mean([label >= 0 for label in labels]) < 0.25
    for scene, label in zip(draw(6, 100), labels, strict=True):
        assert set(range(len(scene.things))) <= set(label.tolist())


@pytest.mark.parametrize("size", [56, 112, 448, 100])
def test_a_scene_is_the_same_picture_at_every_size(size: int):
    for scene in draw(7, 5):
        small = Image.fromarray(scenes.paint(scene, size)).resize((28, 28), Image.Resampling.BOX)
        large = Image.fromarray(scenes.paint(scene, 896)).resize((28, 28), Image.Resampling.BOX)
        assert np.abs(np.asarray(small, float) - np.asarray(large, float)).mean() < 4


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_every_shape_lies_inside_its_box_and_is_different(shape: str):
    thing = scenes.Thing(shape, "red", (255.0, 0.0, 0.0), 0.5, 0.5, 0.5, 0.0)
    background = scenes.Background(
        np.zeros(3, np.float32),
        np.zeros((7, 7, 3), np.float32),
        (0.0, 0.0, 0.0, 0.0),
        np.zeros((112, 112), np.float32),
    )
    red = scenes.paint(scenes.Scene((thing,), background), 80)[..., 0].astype(float) / 255
    inside = red[19:61, 19:61].sum()
    assert inside == pytest.approx(red.sum())
    assert 0.15 < inside / 1600 < 0.75


def test_an_unknown_corner_is_not_asked_for():
    rng = np.random.default_rng(9)
    for scene in draw(8, 300):
        clear = {scenes.corner(thing) for thing in scene.things} - {None}
        kinds = [question.kind for question in scenes.ask(rng, scene)]
        assert ("where" in kinds) == bool(clear)
        assert len(set(kinds)) == len(kinds)


def test_answers_are_true():
    rng = np.random.default_rng(10)
    for scene in draw(9, 300):
        by_name = {thing.name: thing for thing in scene.things}
        by_color = {thing.color: thing for thing in scene.things}
        for question in scenes.ask(rng, scene):
            words = question.text.rstrip("?").split()
            names = [by_name[word] for word in words if word in by_name]
            colors = [by_color[word] for word in words if word in by_color]
            if question.kind in ("digit", "shape") and colors:
                assert question.answer == colors[0].name
            if question.kind in ("digit_color", "shape_color") and names:
                assert question.answer == names[0].color
            if question.kind == "where":
                assert question.answer == scenes.corner(names[0])
            if question.kind == "presence":
                asked_colors = [word for word in words if word in scenes.COLORS]
                there = bool(names) and all(color == names[0].color for color in asked_colors)
                assert question.answer == ("yes" if there else "no")
            if question.kind == "count":
                things = scene.things
                if "shapes" in words:
                    things = tuple(thing for thing in things if not thing.is_digit)
                assert question.answer == str(len(things))


def test_answers_are_balanced():
    rng = np.random.default_rng(11)
    asked = [question for scene in draw(12, 1500) for question in scenes.ask(rng, scene)]
    limits = {"digit": 0.15, "digit_color": 0.18, "shape_color": 0.18, "shape": 0.18}
    limits |= {"count": 0.42, "presence": 0.55, "where": 0.31}
    for kind, limit in limits.items():
        answers = Counter(question.answer for question in asked if question.kind == kind)
        assert max(answers.values()) / answers.total() < limit, (kind, answers)


def test_sample_pictures_are_those_of_the_generator(tmp_path: Path):
    from vzip.calibration.demo import pictures

    pictures.paint_samples(tmp_path)
    kept = demo.pictures() / "questions.json"
    assert json.loads(kept.read_text()) == json.loads((tmp_path / "questions.json").read_text())
    for name in json.loads(kept.read_text()):
        with Image.open(demo.pictures() / name) as image, Image.open(tmp_path / name) as again:
            assert image.size == (448, 448)
            difference = np.abs(np.asarray(image, float) - np.asarray(again, float))
            assert difference.mean() < 1


class TestCheckpoint:
    def test_is_small_and_names_no_place(self):
        files = list(demo.checkpoint().iterdir())
        assert sum(file.stat().st_size for file in files) <= 10 * MEGABYTE
        for file in files:
            assert not file.is_symlink()
            assert b"/tmp" not in file.read_bytes()
            assert b"/work" not in file.read_bytes()

    def test_has_the_published_names_in_fp16(self):
        safetensors = pytest.importorskip("safetensors")
        with safetensors.safe_open(demo.checkpoint() / "model.safetensors", "np") as tensors:
            names = set(tensors.keys())
            dtypes = {tensors.get_slice(name).get_dtype() for name in names}
        assert dtypes == {"F16"}
        assert {
            "vision_tower.vision_model.pre_layrnorm.weight",
            "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
            "multi_modal_projector.linear_1.weight",
            "multi_modal_projector.linear_2.bias",
            "language_model.model.layers.0.mlp.gate_proj.weight",
            "language_model.model.embed_tokens.weight",
            "language_model.lm_head.weight",
        } <= names

    @pytest.mark.slow
    def test_loads_whole_and_answers(self):
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        model, report = transformers.AutoModelForImageTextToText.from_pretrained(
            demo.checkpoint(),
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
        )
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert not report["mismatched_keys"]
        processor = transformers.LlavaProcessor.from_pretrained(
            demo.checkpoint(), trust_remote_code=False
        )
        assert model.config.image_token_id == processor.image_token_id
        right = []
        asked = json.loads((demo.pictures() / "questions.json").read_text())
        for name, questions in asked.items():
            with Image.open(demo.pictures() / name) as image:
                for question in questions:
                    prompt = f"USER: <image>\n{question['question']} ASSISTANT:"
                    inputs = processor(images=image, text=prompt, return_tensors="pt")
                    output = model.generate(**inputs, max_new_tokens=8)
                    answer = output[0, inputs["input_ids"].shape[1] :]
                    text = processor.decode(answer, skip_special_tokens=True).strip()
                    right.append(text == question["answer"])
        assert np.mean(right) >= 0.75

    @pytest.mark.slow
    def test_answers_held_out_questions(self):
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        from vzip.calibration.demo import accuracy, dialogue

        folder = demo.checkpoint()
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        packer = dialogue.Packer(tokenizer, model.config.image_token_id, 196)
        result = accuracy.evaluate(model, packer, accuracy.held_out(77, 20))
        assert result["all"] >= 0.85

    @pytest.mark.slow
    def test_one_pass_over_answers_is_greedy_decoding(self):
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        from vzip.calibration.demo import accuracy, dialogue

        folder = demo.checkpoint()
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        ).eval()
        processor = transformers.LlavaProcessor.from_pretrained(folder, trust_remote_code=False)
        packer = dialogue.Packer(processor.tokenizer, model.config.image_token_id, 196)
        held_out = accuracy.held_out(78, 3)
        features = accuracy.encode(model, held_out.pictures).hidden[:, 1:]
        fast = accuracy.right_answers(model, packer, features, held_out.questions)
        for picture, questions, answers in zip(
            held_out.pictures, held_out.questions, fast, strict=True
        ):
            for question, answer in zip(questions, answers, strict=True):
                messages = [
                    {
                        "role": "user",
                        "content": [{"type": "image"}, {"type": "text", "text": question.text}],
                    }
                ]
                prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
                assert prompt == f"USER: <image>\n{question.text} ASSISTANT:"
                inputs = processor(
                    images=Image.fromarray(picture), text=prompt, return_tensors="pt"
                )
                output = model.generate(**inputs, max_new_tokens=8)
                text = processor.decode(output[0, inputs["input_ids"].shape[1] :])
                assert (text == f" {question.answer}</s>") == answer
