"""What tuning is made of: data, prompts, features, schedule, loss and gradient."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.parity.tiny_llm import IMAGE, make_tokenizer
from tests.refusals import refused
from vzip.calibration.demo import accuracy, dialogue, scenes
from vzip.calibration.tuning.data import DemoData, InstructionData, Turn, choose, digest_of
from vzip.calibration.tuning.features import FeatureStore, FrozenTower, check_tunable
from vzip.calibration.tuning.text import Wording
from vzip.calibration.tuning.trainer import Schedule, Tuner, TuningRecipe
from vzip.calibration.tuning.workers import Workers
from vzip.export.algorithm.budget import Budget
from vzip.export.parity import reference
from vzip.export.pipeline import WeightSource
from vzip.runtime import demo
from vzip.runtime.errors import BackendError, InvalidInputError
from vzip.runtime.llm.chat_template import make_prompts
from vzip.runtime.llm.local.transformers import TransformersLLM

TOKENS = 22
BUDGET = Budget(19, 3)
ALONE = Workers()


@pytest.fixture(scope="module")
def llm() -> TransformersLLM:
    return TransformersLLM.open("demo", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def weights() -> Any:
    return WeightSource("demo").load()[0]


@pytest.fixture(scope="module")
def tower(weights: Any) -> FrozenTower:
    return FrozenTower(weights, BUDGET, torch.device("cpu"))


# Data


GOOD = {
    "id": "a",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": " a ring "},
        {"from": "human", "value": "Which color?"},
        {"from": "gpt", "value": "red"},
    ],
}


def instructions(folder: Path, entries: object) -> InstructionData:
    path = folder / "data.json"
    path.write_text(json.dumps(entries))
    return InstructionData(path, folder)


def said(*texts: str) -> list[dict[str, str]]:
    return [{"from": s, "value": t} for s, t in zip(itertools.cycle(("human", "gpt")), texts)]


def test_a_record_gives_its_turns_without_the_mark(tmp_path: Path) -> None:
    data = instructions(tmp_path, [GOOD])
    (record,) = data.records
    assert record.image == "a.png"
    assert record.turns == (Turn("What is it?", "a ring"), Turn("Which color?", "red"))
    assert record.name == "record 0 (id a)"
    assert not data.left_out


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("text", "is a JSON str"),
        ({**GOOD, "image": None}, "has no image"),
        ({key: GOOD[key] for key in ("id", "conversations")}, "has no image"),
        ({**GOOD, "image": ["a.png", "b.png"]}, "expected the name of one file"),
        ({**GOOD, "image": "../a.png"}, "inside the image folder"),
        ({**GOOD, "image": "/etc/passwd"}, "inside the image folder"),
        ({**GOOD, "conversations": []}, "no conversations"),
        ({**GOOD, "conversations": GOOD["conversations"][:3]}, "no conversations"),
        ({**GOOD, "conversations": GOOD["conversations"][1:3]}, "no text from 'human'"),
        ({**GOOD, "conversations": [{"from": "human"}, {"from": "gpt"}]}, "no text from 'human'"),
        ({**GOOD, "conversations": said("What?", "a ring")}, "has 0 times <image>"),
        ({**GOOD, "conversations": said("<image><image>What?", "a")}, "has 2 times <image>"),
        ({**GOOD, "conversations": said("Hi", "<image>")}, "has 1 times <image>"),
        ({**GOOD, "conversations": said("<image>\n", "a ring")}, "empty question or answer"),
        ({**GOOD, "conversations": said("<image>\nWhat?", " ")}, "empty question or answer"),
    ],
)
def test_a_record_that_is_of_no_use_is_named(tmp_path: Path, entry: object, reason: str) -> None:
    data = instructions(tmp_path, [GOOD, entry, GOOD])
    assert len(data.records) == 2
    (left_out,) = data.left_out
    assert left_out.name.startswith("record 1")
    assert reason in left_out.reason


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("[1,", {"got": "JSON"}),
        ("{}", {"got": "dict", "expected": "list"}),
        ("\xff", {"got": "JSON"}),
    ],
)
def test_another_file_is_said_to_be_one(tmp_path: Path, text: str, fields: dict[str, str]) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(text.encode("latin-1"))
    with refused(InvalidInputError, **fields):
        InstructionData(path, tmp_path)


def test_missing_files_and_folders_are_said(tmp_path: Path) -> None:
    with refused(InvalidInputError, got="none.json", cure="--data"):
        InstructionData(tmp_path / "none.json", tmp_path)
    with refused(InvalidInputError, got=str(tmp_path / "none"), cure="--images"):
        InstructionData(tmp_path / "none.json", tmp_path / "none")
    data = instructions(tmp_path, [GOOD])
    with refused(InvalidInputError, got="a.png", cure="--images"):
        data.read("a.png")
    (tmp_path / "folder").mkdir()
    with refused(InvalidInputError, got="folder"):
        data.read("folder")


def test_a_share_of_the_records_follows_from_the_seed(tmp_path: Path) -> None:
    data = instructions(tmp_path, [{**GOOD, "id": str(n)} for n in range(50)])
    chosen = choose(data, 20, 3)
    assert [record.name for record in chosen] == [record.name for record in choose(data, 20, 3)]
    assert chosen != choose(data, 20, 4)
    assert len({record.name for record in chosen}) == 20
    assert choose(data, None, 3) == list(data.records)
    with refused(InvalidInputError, got="50 usable", expected="51 (--count)"):
        choose(data, 51, 0)
    empty = instructions(tmp_path, [3])
    with refused(InvalidInputError, got=("0 usable", "1 that"), cause="JSON int"):
        choose(empty, None, 0)


def test_the_demo_paints_the_scene_that_it_asks_about() -> None:
    data = DemoData(3, 5, 112)
    rng = np.random.default_rng([5, 2])
    scene = scenes.draw_scene(rng, "train")
    assert np.array_equal(data.read(data.records[2].image), scenes.paint(scene, 112))
    expected = tuple(Turn(each.text, each.answer) for each in scenes.ask(rng, scene))
    assert data.records[2].turns == expected
    assert DemoData(3, 6, 112).records != data.records
    assert DemoData(2, 5, 112).records == data.records[:2]


def test_an_image_goes_by_all_of_its_bytes() -> None:
    pixels = np.zeros((2, 6, 3), np.uint8)
    assert digest_of(pixels) != digest_of(pixels.reshape(6, 2, 3))
    assert digest_of(pixels) != digest_of(pixels + np.uint8(1))
    assert digest_of(b"a") != digest_of(b"b")


# Prompts


class FakeLLM(SimpleNamespace):
    pass


def fake_llm(kind: str, template: str | None = None, context: int | None = 512) -> Any:
    tokenizer = make_tokenizer(kind)
    prompts = make_prompts("tests", tokenizer, {"image": IMAGE}, template)
    text = SimpleNamespace(prompts=prompts, context=context)
    return FakeLLM(tokenizer=tokenizer, text=text)


TURNS = (Turn("what is the shape?", "it is a red circle"), Turn("is there a 7?", "a circle"))


@pytest.mark.parametrize("kind", ["bytes", "llama", "first"])
def test_ids_are_those_of_the_whole_conversation(kind: str) -> None:
    llm = fake_llm(kind)
    example = Wording(llm, 5).example(TURNS)
    text = (
        "USER: <image>\nwhat is the shape? ASSISTANT: it is a red circle</s>"
        "USER: is there a 7? ASSISTANT: a circle</s>"
    )
    ids = llm.tokenizer(text).input_ids
    place = ids.index(IMAGE)
    assert example.ids.tolist() == [*ids[:place], *[IMAGE] * 5, *ids[place + 1 :]]


@pytest.mark.parametrize("kind", ["bytes", "llama", "first"])
def test_answers_and_their_ends_are_learned_and_nothing_else(kind: str) -> None:
    llm = fake_llm(kind)
    example = Wording(llm, 5).example(TURNS)
    # Runs of learned tokens, each an answer with its end.
    runs = [
        [int(example.ids[place]) for place, _ in group]
        for learned, group in itertools.groupby(enumerate(example.learned), key=lambda x: x[1])
        if learned
    ]
    assert [llm.text.prompts.decode(run) for run in runs] == ["it is a red circle", "a circle"]
    assert all(run[-1] == llm.text.prompts.eos_id for run in runs)


def test_an_answer_follows_white_space_without_a_blank() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}\n{% for c in m.content %}"
        "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}"
        "{% if m.role == 'assistant' %}</s>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    llm = fake_llm("bytes", template)
    example = Wording(llm, 1).example(TURNS[:1])
    text = llm.tokenizer.decode(example.ids.tolist())
    assert "assistant\nit is a red circle</s>" in text


def test_what_does_not_fit_is_said() -> None:
    with refused(InvalidInputError, expected="20"):
        Wording(fake_llm("bytes", context=20), 5).example(TURNS)
    wording = Wording(fake_llm("bytes"), 5)
    with refused(InvalidInputError, got="'a <image> circle'"):
        wording.example([Turn("what?", "a <image> circle")])
    with refused(InvalidInputError, got="placeholders"):
        wording.example([Turn("what is <image>?", "a circle")])


def test_a_batch_is_padded_on_the_right() -> None:
    wording = Wording(fake_llm("bytes"), 5)
    short, long = wording.example(TURNS[:1]), wording.example(TURNS)
    batch = wording.batch([short, long])
    length = len(short.ids)
    assert batch.ids.shape == batch.mask.shape == batch.learned.shape == (2, len(long.ids))
    assert batch.ids[0, :length].tolist() == short.ids.tolist()
    assert batch.mask.sum(axis=1).tolist() == [length, len(long.ids)]
    assert batch.mask[0, :length].all()
    assert not batch.learned[0, length:].any()


# Features


def test_features_are_those_of_the_untouched_tower(tower: FrozenTower) -> None:
    pixels = scenes.paint(scenes.draw_scene(np.random.default_rng(3), "train"), 112)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        demo.checkpoint(), dtype=torch.float32, trust_remote_code=False
    )
    encoded = accuracy.encode(model, pixels[None])
    expected = accuracy.compressed(encoded, TOKENS, "average", cls_token=True)[0].numpy()
    features = tower.encode(pixels)
    assert features.dtype == np.float16
    assert features.shape == expected.shape == tower.shape
    assert np.abs(features - expected).max() < 2e-3 * np.abs(expected).max()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    assert np.array_equal(tower.encode(file.getvalue()), features)


def test_the_store_gives_back_what_it_took(tower: FrozenTower, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, tower)
    digest = digest_of(b"an image")
    features = np.arange(np.prod(tower.shape)).reshape(tower.shape).astype(np.float16)
    assert store.get(digest) is None
    store.put(digest, features)
    kept = FeatureStore(tmp_path, tower).get(digest)
    assert kept is not None
    assert np.array_equal(kept, features)
    assert store.get(digest_of(b"another")) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "zeros"])
def test_a_damaged_entry_counts_as_absent(tower: FrozenTower, tmp_path: Path, damage: str) -> None:
    store = FeatureStore(tmp_path, tower)
    digest = digest_of(b"an image")
    store.put(digest, np.ones(tower.shape, np.float16))
    (path,) = tmp_path.rglob("*.f16")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[100] ^= 1
    path.write_bytes(
        {"flip": bytes(data), "cut": data[:-2], "empty": b"", "zeros": bytes(len(data))}[damage]
    )
    assert store.get(digest) is None
    store.put(digest, np.ones(tower.shape, np.float16))
    assert store.get(digest) is not None


def test_a_full_disk_leaves_nothing_behind(
    tower: FrozenTower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FeatureStore(tmp_path, tower)

    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with refused(InvalidInputError, got="No space left", cure="--features"):
        store.put(digest_of(b"an image"), np.ones(tower.shape, np.float16))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_everything_that_decides_features_is_in_the_fingerprint(
    weights: Any, tower: FrozenTower
) -> None:
    def fingerprint(weights: Any = weights, **changes: Any) -> str:
        budget = dataclasses.replace(BUDGET, **changes)
        return FrozenTower(weights, budget, torch.device("cpu")).fingerprint

    assert fingerprint() == tower.fingerprint

    def changed(name: str) -> Any:
        tensors = {**weights.tensors, name: weights.tensors[name].clone()}
        tensors[name].view(-1)[0] += 1
        return dataclasses.replace(weights, tensors=tensors)

    prints = [
        tower.fingerprint,
        fingerprint(dominant=18, contextual=4),
        fingerprint(cls_token=False),
        fingerprint(merge="sum"),
        fingerprint(method="uniform"),
        fingerprint(changed("tower.encoder.layers.0.mlp.fc1.weight")),
    ]
    assert len(set(prints)) == len(prints)
    # The projector is what is tuned: features are the same whatever it is.
    assert fingerprint(changed("projector.linear_1.weight")) == tower.fingerprint


@pytest.mark.parametrize("model", ["llava-next-vicuna-7b", "video-llava-7b"])
def test_models_of_tiles_and_video_are_refused(model: str) -> None:
    config = WeightSource(model, seed=0).config()
    with refused(InvalidInputError, got=f"'{model}'"):
        check_tunable(config, model)
    check_tunable(WeightSource("vip-llava-7b", seed=0).config(), "vip-llava-7b")


# Recipe and schedule


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_train_epochs": 0},
        {"per_device_train_batch_size": 0},
        {"gradient_accumulation_steps": -1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"learning_rate": 1.5},
        {"max_grad_norm": 0.0},
        {"warmup_ratio": 1.0},
        {"weight_decay": -0.1},
        {"seed": -1},
    ],
)
def test_numbers_without_sense_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with refused(InvalidInputError, got=f"{name} is {wrong[name]}"):
        TuningRecipe(**wrong)


def test_the_rate_rises_and_falls_as_a_cosine() -> None:
    schedule = Schedule(
        TuningRecipe(per_device_train_batch_size=1, learning_rate=0.5, warmup_ratio=0.1), 100, 1
    )
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * n for n in range(1, 11)])
    assert rates[10] == 0.5
    assert rates[55] == pytest.approx(0.25)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.001


def test_an_epoch_sees_every_record_once() -> None:
    schedule = Schedule(
        TuningRecipe(num_train_epochs=3, per_device_train_batch_size=5, seed=4), 20, 1
    )
    assert schedule.steps == 12
    seen = [place for step in range(12) for batch in schedule.batches(step, 0) for place in batch]
    epochs = [seen[start : start + 20] for start in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(range(20))


def test_the_last_batch_is_dropped_unless_it_is_full() -> None:
    schedule = Schedule(TuningRecipe(num_train_epochs=2, per_device_train_batch_size=8), 21, 1)
    assert schedule.steps == 5  # 40 of 42
    with refused(InvalidInputError, got=("1 × 7", "step of 8"), cure="--num-train-epochs"):
        Schedule(TuningRecipe(per_device_train_batch_size=8), 7, 1)


def test_processes_share_the_batches_of_a_step() -> None:
    alone = Schedule(
        TuningRecipe(per_device_train_batch_size=2, gradient_accumulation_steps=6), 48, 1
    )
    shared = Schedule(
        TuningRecipe(per_device_train_batch_size=2, gradient_accumulation_steps=2), 48, 3
    )
    assert alone.steps == shared.steps == 4
    for step in range(4):
        parts = [list(shared.batches(step, rank)) for rank in range(3)]
        together = [batch for turn in zip(*parts, strict=True) for batch in turn]
        assert together == list(alone.batches(step, 0))


# Loss and gradient


def tuner(
    llm: TransformersLLM, weights: Any, recipe: TuningRecipe, records: int
) -> tuple[Tuner, Any]:
    projector = reference.projector(weights)
    schedule = Schedule(recipe, records, 1)
    wording = Wording(llm, TOKENS)
    made = Tuner(llm, projector, wording, recipe=recipe, schedule=schedule, workers=ALONE)
    return made, projector


@pytest.fixture(scope="module")
def small(llm: TransformersLLM, tower: FrozenTower) -> tuple[list[Any], list[Any]]:
    """Eight examples and their features."""
    data = DemoData(8, 1, 112)
    wording = Wording(llm, TOKENS)
    examples = [wording.example(record.turns) for record in data.records]
    return examples, [tower.encode(data.read(record.image)) for record in data.records]


@pytest.mark.slow
def test_loss_and_gradient_are_those_of_the_answers(
    llm: TransformersLLM, weights: Any, small: Any
) -> None:
    examples, features = small
    made, _ = tuner(
        llm,
        weights,
        TuningRecipe(per_device_train_batch_size=8, learning_rate=1e-9, max_grad_norm=1e9),
        8,
    )
    loss = made.step(0, examples, lambda place: features[place])
    # The demo's own trainer packs the same conversations in another way.
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        demo.checkpoint(), dtype=torch.float32, trust_remote_code=False
    )
    packer = dialogue.Packer(llm.tokenizer, model.config.image_token_id, TOKENS)
    asked = []
    for number in range(8):
        rng = np.random.default_rng([1, number])
        asked.append(scenes.ask(rng, scenes.draw_scene(rng, "train")))
    packed = packer.pack(asked, [False] * 8)
    untouched = model.model.multi_modal_projector
    embeds = untouched(torch.from_numpy(np.stack(features)).float())
    logits, targets = accuracy.answer_logits(model, embeds, packed)
    expected = torch.nn.functional.cross_entropy(logits, targets)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    # AdamW's first moment after one step is a tenth of the gradient.
    moments = made.state()["optimiser"]["state"]
    gradients = [untouched.linear_1.weight.grad, untouched.linear_2.weight.grad]
    for moment, gradient in zip(moments.values(), gradients, strict=False):
        assert torch.allclose(10 * moment["exp_avg"], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_only_the_projector_learns(llm: TransformersLLM, weights: Any, small: Any) -> None:
    examples, features = small
    made, projector = tuner(
        llm,
        weights,
        TuningRecipe(per_device_train_batch_size=8, num_train_epochs=4, learning_rate=1e-3),
        8,
    )
    frozen = {name: tensor.clone() for name, tensor in llm.model.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in projector.state_dict().items()}
    losses = [made.step(step, examples, lambda place: features[place]) for step in range(4)]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before[name], t) for name, t in projector.state_dict().items())
    assert all(torch.equal(frozen[name], t) for name, t in llm.model.state_dict().items())
    assert all(parameter.grad is None for parameter in llm.model.parameters())


@pytest.mark.slow
def test_accumulated_batches_are_one_batch(llm: TransformersLLM, weights: Any, small: Any) -> None:
    # Of conversations with unequal numbers of answers' tokens: each token weighs the same.
    examples, features = small
    results = []
    for recipe in (
        TuningRecipe(per_device_train_batch_size=8, learning_rate=1e-3, num_train_epochs=2),
        TuningRecipe(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            learning_rate=1e-3,
            num_train_epochs=2,
        ),
    ):
        made, projector = tuner(llm, weights, recipe, 8)
        losses = [made.step(step, examples, lambda place: features[place]) for step in range(2)]
        results.append((losses, projector.state_dict()))
    (losses, whole), (split_losses, split) = results
    assert split_losses == pytest.approx(losses, rel=1e-5)
    for name, tensor in whole.items():
        assert torch.allclose(split[name], tensor, atol=2e-5), name


def test_steps_are_as_long_as_the_schedule_says(
    llm: TransformersLLM, weights: Any, small: Any
) -> None:
    examples, features = small
    recipe = TuningRecipe(
        per_device_train_batch_size=2, learning_rate=1e-3, warmup_ratio=0.75, weight_decay=0.5
    )
    made, projector = tuner(llm, weights, recipe, 8)
    before = {name: tensor.clone() for name, tensor in projector.state_dict().items()}
    made.step(0, examples, lambda place: features[place])
    rate = Schedule(recipe, 8, 1).rate(0)
    assert rate == pytest.approx(1e-3 / 3)
    for name, tensor in projector.state_dict().items():
        # AdamW's first step is the rate in the direction of the gradient's sign, behind the decay.
        shrunk = before[name] * (1 - rate * 0.5) if tensor.ndim > 1 else before[name]
        moved = (tensor - shrunk).abs()
        assert float(moved.max()) == pytest.approx(rate, rel=1e-2), name
        assert float(moved.median()) > 0.5 * rate, name


def test_weights_that_are_not_finite_end_the_run(
    llm: TransformersLLM, weights: Any, small: Any
) -> None:
    examples, features = small
    made, projector = tuner(llm, weights, TuningRecipe(per_device_train_batch_size=8), 8)
    with torch.no_grad():
        projector.linear_1.weight[0, 0] = float("nan")
    with refused(BackendError, got=("step 0", "nan"), cure="--learning-rate"):
        made.step(0, examples, lambda place: features[place])


def test_part_of_an_environment_of_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Workers.of_environment() == Workers(0, 1, 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused(InvalidInputError, got="WORLD_SIZE", cure="torchrun"):
        Workers.of_environment()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Workers.of_environment() == Workers(1, 2, 1)
