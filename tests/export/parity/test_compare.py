"""The gate passes what is right and, above all, fails what is wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from tests.export.layouts import write_layout
from tests.refusals import refused
from vzip.export.algorithm.budget import Budget
from vzip.export.checkpoint.reader import Checkpoint, read_vision
from vzip.export.checkpoint.weights import VisionWeights
from vzip.export.graph.trace import GraphOptions, save, trace
from vzip.export.graph.traced import DTYPES, Encoder
from vzip.export.parity import compare as parity
from vzip.export.parity.compare import Parity, UntouchedModel
from vzip.export.pictures import reference_images
from vzip.export.pipeline import WeightSource, describe, export_bundle
from vzip.runtime.bundle.manifest import EMBEDS, KEPT, TOKEN_WEIGHTS
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.bundle.writer import bundle_writer
from vzip.runtime.cli.main import main
from vzip.runtime.errors import CheckpointError, ParityError, VzipError

Output = dict[str, NDArray[Any]]
Exporter = Callable[..., Bundle]
Spoil = Callable[[Callable[[Output], None]], None]
References = Callable[[str], UntouchedModel]

IMAGES = reference_images()
BUDGET = Budget(12, 4)
DEFAULTS: Mapping[str, Any] = {
    "budget": BUDGET,
    "precision": "fp32",
    "options": GraphOptions(),
}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    for seed in (0, 1):
        write_layout("llava-hf-single", folder / f"seed{seed}", seed=seed)
    return folder


@pytest.fixture(scope="module")
def weights(room: Path) -> VisionWeights:
    return read_vision(Checkpoint.open(room / "seed0"))


@pytest.fixture(scope="module")
def reference(weights: VisionWeights) -> UntouchedModel:
    return UntouchedModel(weights, IMAGES)


@pytest.fixture(scope="module")
def half_reference(weights: VisionWeights) -> UntouchedModel:
    return UntouchedModel(weights, IMAGES, "fp16")


@pytest.fixture
def reference_of(request: pytest.FixtureRequest) -> References:
    """Return what graphs of some precision are compared with."""
    names = {"fp32": "reference", "fp16": "half_reference"}
    return lambda precision: request.getfixturevalue(names[precision])


@pytest.fixture(scope="module")
def export(room: Path, weights: VisionWeights) -> Exporter:
    """Return a function that exports without a check; the same options give the same bundle."""
    made: dict[str, Bundle] = {}
    sources: list[VisionWeights] = []  # as long as they are held, each has an id of its own

    def exported(source: VisionWeights = weights, **change: Any) -> Bundle:
        chosen = {**DEFAULTS, **change}
        name = f"{id(source)} {chosen}"
        if name not in made:
            sources.append(source)
            options = chosen["options"]
            encoder = Encoder(
                source.config,
                source.tensors,
                budget=chosen["budget"],
                graph_input=options.graph_input,
                dtype=DTYPES[chosen["precision"]],
            )
            graph = trace(encoder, options, image_size=source.config.tower.image_size)
            _, model = WeightSource(str(room / "seed0")).load()
            with bundle_writer(room / f"bundle{len(made)}") as writer:
                save(graph, writer.folder)
                made[name] = writer.publish(describe(source.config, model, **chosen))
        return made[name]

    return exported


@pytest.mark.parametrize(
    "name", ["tower.encoder.layers.1.mlp.fc2.weight", "projector.linear_2.weight"]
)
def test_a_model_that_gives_no_numbers_is_named(name: str, weights: VisionWeights) -> None:
    huge = {name: torch.full_like(weights.tensors[name], 3e38)}
    broken = dataclasses.replace(weights, tensors={**weights.tensors, **huge})
    with refused(CheckpointError, got="untouched model", cause=(f"'{name}'", "3.0e+38")):
        UntouchedModel(broken, IMAGES[:1])


def altered(bundle: Bundle, folder: Path, **change: Any) -> Bundle:
    """Return a copy with another manifest."""
    with bundle_writer(folder / "altered") as writer:
        for name in bundle.manifest.files:
            (writer.folder / name).write_bytes((bundle.path / name).read_bytes())
        return writer.publish(dataclasses.replace(bundle.manifest, **change))


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """Return a way to change what the backend gives to the check."""
    opened = parity._opened

    def spoiled(change: Callable[[Output], None]) -> None:
        class Stub:
            def __init__(self, bundle: Bundle) -> None:
                self.backend = opened(bundle)

            def run(self, feeds: Any) -> Output:
                outputs = {name: np.array(array) for name, array in self.backend.run(feeds).items()}
                change(outputs)
                return outputs

            def close(self) -> None:
                self.backend.close()

        monkeypatch.setattr(parity, "_opened", Stub)

    return spoiled


def fails(reference: UntouchedModel, bundle: Bundle) -> bool:
    """Return whether a bundle is refused, by the verdict or by a clear error before it."""
    try:
        return not reference.compare(bundle).passed
    except VzipError:
        return True


# What is right passes


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"budget": Budget(12, 4, merge="sum")},
        {"budget": Budget(12, 4, cls_token=False)},
        {"options": GraphOptions("pixel_values", 2)},
        {"options": GraphOptions("image", 3, dynamic_batch=True, opset=17)},
    ],
    ids=str,
)
def test_a_good_graph_passes(reference: UntouchedModel, export: Exporter, change: Any) -> None:
    result = reference.compare(export(**change))
    assert result.passed
    assert result.images == len(IMAGES) >= 4
    assert result.kept_overlap == result.group_agreement == 1.0
    assert (result.kept_disagreements, result.group_disagreements) == (0, 0)
    assert (result.kept_swaps, result.group_swaps) == (0, 0)
    assert result.max_error < 1e-5
    assert 0.999999 < result.min_cosine <= result.mean_cosine <= 1.000001


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["average", "sum"])
def test_a_good_half_graph_passes(
    half_reference: UntouchedModel, export: Exporter, merge: Any
) -> None:
    result = half_reference.compare(export(budget=Budget(12, 4, merge=merge), precision="fp16"))
    assert result.passed
    assert 1e-5 < result.max_error < 1e-2  # it is FP16


@pytest.mark.slow
def test_all_numbers_go_into_json(reference: UntouchedModel, export: Exporter) -> None:
    result = reference.compare(export())
    numbers = result.to_json()
    assert json.loads(json.dumps(numbers)) == numbers
    assert numbers.pop("passed") is True
    assert Parity(**numbers) == result  # type: ignore[arg-type]
    assert all(type(value) in (int, float, bool) for value in numbers.values())


# What is wrong fails


KERNEL = "tower.embeddings.patch_embedding.weight"
POSITIONS = "tower.embeddings.position_embedding.weight"


def tensor(
    weights: VisionWeights, name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> VisionWeights:
    tensors = {**weights.tensors, name: change(weights.tensors[name]).contiguous()}
    return dataclasses.replace(weights, tensors=tensors)


def config(weights: VisionWeights, part: str, **change: Any) -> VisionWeights:
    changed = dataclasses.replace(getattr(weights.config, part), **change)
    return dataclasses.replace(
        weights, config=dataclasses.replace(weights.config, **{part: changed})
    )


def one_layer_more(weights: VisionWeights) -> VisionWeights:
    changed = dataclasses.replace(weights.config, feature_layers=(-1,))
    return dataclasses.replace(weights, config=changed)


GRAPHS: Mapping[str, Callable[[VisionWeights], VisionWeights]] = {
    "another seed": lambda w: w,
    # The normalisation stays that of each channel.
    "swapped channels": lambda w: tensor(w, KERNEL, lambda t: t[:, [2, 1, 0]]),
    "one layer more": one_layer_more,
    "transposed patches": lambda w: tensor(w, KERNEL, lambda t: t.transpose(2, 3)),
    "rolled positions": lambda w: tensor(w, POSITIONS, lambda t: t.roll(1, dims=0)),
    "wrong normalisation": lambda w: config(w, "preprocessing", mean=(0.5,) * 3, std=(0.5,) * 3),
    "no rescale": lambda w: config(w, "preprocessing", rescale_factor=1 / 256),
    "wrong activation": lambda w: config(w, "tower", activation="gelu"),
    "wrong eps": lambda w: config(w, "tower", layer_norm_eps=1e-2),
    "another projector": lambda w: tensor(w, "projector.linear_2.bias", lambda t: t + 0.01),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "precision"),
    [*((each, "fp32") for each in GRAPHS), *((each, "fp16") for each in [*GRAPHS][:3])],
)
def test_another_graph_fails(
    reference_of: References, export: Exporter, room: Path, mistake: str, precision: str
) -> None:
    seed = "seed1" if mistake == "another seed" else "seed0"
    other = GRAPHS[mistake](read_vision(Checkpoint.open(room / seed)))
    result = reference_of(precision).compare(export(other, precision=precision))
    assert not result.passed
    assert result.max_error > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "precision"),
    [
        *(({"merge": "sum"}, "fp32"), ({"merge": "sum"}, "fp16")),
        *(({"merge": "average"}, "fp32"), ({"merge": "average"}, "fp16")),
        *(({"cls_token": True}, "fp32"), ({"cls_token": False}, "fp32")),
        # Another split of the same budget.
        *(({"dominant": n, "contextual": 16 - n}, "fp32") for n in (11, 13)),
    ],
)
def test_a_manifest_that_promises_another_selection_fails(
    reference_of: References, export: Exporter, tmp_path: Path, change: Any, precision: str
) -> None:
    budget = BUDGET
    if "merge" in change:
        budget = Budget(12, 4, merge="sum" if change["merge"] == "average" else "average")
    elif "cls_token" in change:
        budget = Budget(12, 4, not change["cls_token"])
    bundle = export(budget=budget, precision=precision)
    selection = dataclasses.replace(bundle.manifest.selection, **change)
    embeds, kept, positions = bundle.manifest.outputs
    outputs = (embeds, dataclasses.replace(kept, shape=(1, selection.dominant)), positions)
    wrong = altered(bundle, tmp_path, selection=selection, outputs=outputs)
    assert fails(reference_of(precision), wrong)


def put(outputs: Output, place: Any, value: Any) -> None:
    outputs[EMBEDS][place] = value


def order_of_score(outputs: Output) -> None:
    """Tokens and indices agree, in another order than the manifest promises."""
    order = np.array([0, *range(11, 0, -1)])
    outputs[EMBEDS][:, :12] = outputs[EMBEDS][:, order]
    outputs[KEPT] = outputs[KEPT][:, order]
    outputs[TOKEN_WEIGHTS][:, :12] = outputs[TOKEN_WEIGHTS][:, order]


def a_duplicate(outputs: Output) -> None:
    for name in (KEPT, EMBEDS, TOKEN_WEIGHTS):
        outputs[name][:, 5] = outputs[name][:, 4]


def a_thousandth(outputs: Output) -> None:
    outputs[EMBEDS][:, 6, 5] += 1e-3 * np.abs(outputs[EMBEDS]).max()


def one_token_in_another_group(outputs: Output) -> None:
    rows = outputs[TOKEN_WEIGHTS][:, 12:]
    rows[:] = np.roll(rows, 1, axis=1)


ONE = np.s_[:, 2, 2]
OUTPUTS: Mapping[str, Callable[[Output], None]] = {
    "two tokens swapped": lambda o: put(o, np.s_[:, [3, 7]], o[EMBEDS][:, [7, 3]]),
    "contextual first": lambda o: put(o, ..., np.roll(o[EMBEDS], 4, axis=1)),
    "order of score": order_of_score,
    "one value is NaN": lambda o: put(o, ONE, np.nan),
    "all zero": lambda o: put(o, ..., 0),
    "two contextual tokens swapped": lambda o: put(o, np.s_[:, [12, 15]], o[EMBEDS][:, [15, 12]]),
    "indices alone in another order": lambda o: o.update({KEPT: o[KEPT][:, ::-1]}),
    "a duplicate": a_duplicate,
    "an index off by one": lambda o: o.update({KEPT: o[KEPT] - (np.arange(12) > 0)}),
    "one value is infinite": lambda o: put(o, ONE, np.inf),
    "a thousandth": a_thousandth,
    "scaled, which no cosine sees": lambda o: put(o, ..., o[EMBEDS] * 1.001),
    "one token in another group": one_token_in_another_group,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "precision"),
    [*((each, "fp32") for each in OUTPUTS), *((each, "fp16") for each in [*OUTPUTS][:5])],
)
def test_spoilt_outputs_fail(
    reference_of: References, export: Exporter, spoil: Spoil, mistake: str, precision: str
) -> None:
    bundle, reference = export(precision=precision), reference_of(precision)
    assert reference.compare(bundle).passed
    spoil(OUTPUTS[mistake])
    assert fails(reference, bundle)


def test_one_bad_image_of_four_fails(
    reference: UntouchedModel, export: Exporter, spoil: Spoil
) -> None:
    calls = []

    def third(outputs: Output) -> None:
        calls.append(1)
        if len(calls) == 3:
            a_thousandth(outputs)

    spoil(third)
    assert fails(reference, export())


# Swaps within the margin


def with_first(reference: UntouchedModel, **change: NDArray[Any]) -> UntouchedModel:
    """Change what the untouched model says of the first image."""
    first, *others = reference._features
    changed = object.__new__(UntouchedModel)
    features = [dataclasses.replace(first, **change), *others]
    changed.__dict__ |= reference.__dict__ | {"_features": features}
    return changed


@pytest.mark.parametrize(("distance", "within"), [(1e-6, True), (1e-3, False)])
def test_a_swap_at_the_cut_is_counted_and_passes_within_the_margin(
    reference: UntouchedModel, export: Exporter, distance: float, within: bool
) -> None:
    """The untouched model's scores are put so that it chooses another patch than the graph."""
    scores = reference._features[0].scores.copy()
    order = np.argsort(-scores[0], kind="stable")
    kept, left = order[BUDGET.dominant - 2], order[BUDGET.dominant - 1]
    scores[0, left] = scores[0, kept] * (1 + distance)
    result = with_first(reference, scores=scores).compare(export())
    assert result.kept_swaps == int(within)
    assert result.kept_disagreements == int(not within)
    assert result.kept_overlap == pytest.approx(1 - 1 / BUDGET.dominant / len(IMAGES))
    assert result.max_error < 1e-5  # judged by the graph's own choice
    assert result.passed is within


@pytest.mark.parametrize(("distance", "within"), [(1e-6, True), (1e-2, False)])
def test_a_token_between_two_targets_is_counted_and_passes_within_the_margin(
    reference: UntouchedModel,
    export: Exporter,
    spoil: Spoil,
    distance: float,
    within: bool,
) -> None:
    """A token's key is put between two targets', and the graph's choice to the other one."""
    features = reference._features[0]
    bundle = export()
    kept: list[int] = []
    spoil(lambda outputs: kept.extend(outputs[KEPT][-1].tolist()))
    reference.compare(bundle)
    rest = [token for token in range(65) if token not in kept[:12]]
    targets, token = rest[:: len(rest) // 4][:4], rest[1]
    keys = features.keys.copy()
    units = [keys[0, :, t].sum(axis=0) for t in targets]
    units = [unit / np.linalg.norm(unit) for unit in units]
    # On the bisector of two targets, a little to the first's side; far from the others.
    keys[0, :, token] = (units[1] * (1 + distance) + units[2]) / keys.shape[1]
    calls = []

    def to_the_second(outputs: Output) -> None:
        calls.append(1)
        if len(calls) == 1:
            rows = outputs[TOKEN_WEIGHTS][-1, 12:]
            rows[:, token] = 0
            rows[2, token] = 0.1

    spoil(to_the_second)
    result = with_first(reference, keys=keys).compare(bundle)
    assert result.group_swaps == int(within)
    assert result.group_disagreements == int(not within)


# The commands


def exported(model: Path, output: Path, *options: str) -> Bundle:
    arguments = ["export", "--model", str(model), "--tokens", "16", "-o", str(output), *options]
    assert main(arguments) == 0
    return read_bundle(output)


@pytest.mark.slow
def test_an_export_that_fails_its_check_writes_nothing(
    room: Path, tmp_path: Path, spoil: Spoil
) -> None:
    spoil(a_thousandth)
    with refused(ParityError, got=("untouched model", "differ beyond the gate")) as caught:
        export_bundle(
            WeightSource(str(room / "seed0")),
            tmp_path / "bundle",
            **DEFAULTS,
            check_images=IMAGES[:2],
            step=lambda _: None,
        )
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_check_says_yes_or_no_and_writes_the_numbers(
    room: Path, export: Exporter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = altered(export(), tmp_path)
    assert bundle.manifest.parity is None

    def checked(path: Path, *images: str) -> tuple[int, Any, list[str]]:
        status = main(["check", str(path), *images])
        return status, read_bundle(path).manifest.parity, capsys.readouterr().out.splitlines()

    status, numbers, lines = checked(bundle.path)
    assert (status, numbers["passed"], numbers["images"]) == (0, True, len(IMAGES))
    assert lines == [f"{name}: {value}" for name, value in numbers.items()]

    # One image of one's own.
    status, numbers, _ = checked(bundle.path, str(IMAGES[0]))
    assert (status, numbers["images"]) == (0, 1)

    # The manifest names other weights than the graph was made from.
    model = dataclasses.replace(bundle.manifest.model, id=str(room / "seed1"))
    (tmp_path / "other").mkdir()
    status, numbers, lines = checked(altered(bundle, tmp_path / "other", model=model).path)
    assert (status, numbers["passed"]) == (1, False)
    assert "passed: False" in lines
    assert numbers["max_error"] > 1e-2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_check_of_a_graph_that_gives_nan_says_no(
    export: Exporter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Spoil,
    value: float,
) -> None:
    bundle = altered(export(), tmp_path)
    spoil(lambda outputs: put(outputs, ONE, value))
    status = main(["check", str(bundle.path), str(IMAGES[0])])
    assert status in (1, 2)  # a verdict, or a line that says what is wrong
    assert "Traceback" not in capsys.readouterr().err
    json.loads((bundle.path / "manifest.json").read_text(), parse_constant=pytest.fail)
    read_bundle(bundle.path)


# A tuned projector


def tuned(weights: VisionWeights, path: Path, offset: float = 0.25) -> Path:
    tensors = {
        name.replace("projector", "multi_modal_projector"): tensor + offset
        for name, tensor in weights.tensors.items()
        if name.startswith("projector.")
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.slow
def test_a_tuned_projector_is_recorded_and_asked_for(
    room: Path, weights: VisionWeights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tuned(weights, tmp_path / "tuned.safetensors")
    plain = exported(room / "seed0", tmp_path / "plain")
    bundle = exported(room / "seed0", tmp_path / "tuned", "--projector", str(file))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert bundle.manifest.model.projector == digest
    assert plain.manifest.model.projector is None
    for each in (bundle, plain):
        assert each.manifest.parity is not None
        assert each.manifest.parity["passed"] is True
    reference = UntouchedModel(weights, IMAGES[:1])
    assert reference.compare(plain).passed
    assert fails(reference, bundle)  # it is another projector indeed

    check = ["check", str(bundle.path), str(IMAGES[0])]
    assert main([*check, "--projector", str(file)]) == 0
    capsys.readouterr()

    def refused(arguments: list[str]) -> str:
        before = (bundle.path / "manifest.json").read_bytes()
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert (bundle.path / "manifest.json").read_bytes() == before
        return line

    assert f"expected the tuned one, SHA-256 {digest[:12]}…" in refused(check)
    other = tuned(weights, tmp_path / "other.safetensors", offset=0.5)
    line = refused([*check, "--projector", str(other)])
    assert f"expected {digest[:12]}…" in line
    assert hashlib.sha256(other.read_bytes()).hexdigest()[:12] in line
    # The plain bundle has none, and is told so.
    line = refused(["check", str(plain.path), "--projector", str(file)])
    assert "--projector" in line or str(file) in line
    assert "None" not in line
