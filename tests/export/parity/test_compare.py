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
from vzip.runtime.errors import ParityError, VzipError

Output = dict[str, NDArray[Any]]
Exporter = Callable[..., Bundle]

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
def export(room: Path, weights: VisionWeights) -> Exporter:
    """Return a function that exports without a check; the same options give the same bundle."""
    made: dict[str, Bundle] = {}

    def exported(source: VisionWeights = weights, **change: Any) -> Bundle:
        chosen = {**DEFAULTS, **change}
        name = f"{id(source)} {chosen}"
        if name not in made:
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


def altered(bundle: Bundle, folder: Path, **change: Any) -> Bundle:
    """Return a copy with another manifest."""
    with bundle_writer(folder / "altered") as writer:
        for name in bundle.manifest.files:
            (writer.folder / name).write_bytes((bundle.path / name).read_bytes())
        return writer.publish(dataclasses.replace(bundle.manifest, **change))


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Output], None]], None]:
    """Return a way to change what the backend gives to the check."""
    opened = parity.open_backend

    def spoiled(change: Callable[[Output], None]) -> None:
        class Stub:
            def __init__(self, *arguments: Any, **options: Any) -> None:
                self.name, self.backend = opened(*arguments, **options)

            def run(self, feeds: Any) -> Output:
                outputs = {name: np.array(array) for name, array in self.backend.run(feeds).items()}
                change(outputs)
                return outputs

            def close(self) -> None:
                self.backend.close()

        def open_stub(*arguments: Any, **options: Any) -> tuple[str, Stub]:
            stub = Stub(*arguments, **options)
            return stub.name, stub

        monkeypatch.setattr(parity, "open_backend", open_stub)

    return spoiled


def fails(reference: UntouchedModel, bundle: Bundle) -> bool:
    """Return whether a bundle is refused, by the verdict or by a clear error before it."""
    try:
        return not reference.compare(bundle).passed
    except VzipError:
        return True


# What is right passes


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


@pytest.mark.parametrize("merge", ["average", "sum"])
def test_a_good_half_graph_passes(reference: UntouchedModel, export: Exporter, merge: str) -> None:
    result = reference.compare(export(budget=Budget(12, 4, merge=merge), precision="fp16"))
    assert result.passed
    assert 1e-5 < result.max_error < 1e-2  # it is FP16


def test_all_numbers_go_into_json(reference: UntouchedModel, export: Exporter) -> None:
    result = reference.compare(export())
    numbers = result.to_json()
    assert json.loads(json.dumps(numbers)) == numbers
    assert numbers.pop("passed") is True
    assert Parity(**numbers) == result  # type: ignore[arg-type]
    assert all(type(value) in (int, float, bool) for value in numbers.values())


# What is wrong fails


def other_weights(weights: VisionWeights, **tensors: torch.Tensor) -> VisionWeights:
    return dataclasses.replace(weights, tensors={**weights.tensors, **tensors})


def with_preprocessing(weights: VisionWeights, **change: Any) -> VisionWeights:
    preprocessing = dataclasses.replace(weights.config.preprocessing, **change)
    return dataclasses.replace(
        weights, config=dataclasses.replace(weights.config, preprocessing=preprocessing)
    )


def with_tower(weights: VisionWeights, **change: Any) -> VisionWeights:
    tower = dataclasses.replace(weights.config.tower, **change)
    return dataclasses.replace(weights, config=dataclasses.replace(weights.config, tower=tower))


KERNEL = "tower.embeddings.patch_embedding.weight"
POSITIONS = "tower.embeddings.position_embedding.weight"


def of_another_seed(weights: VisionWeights, room: Path) -> VisionWeights:
    return read_vision(Checkpoint.open(room / "seed1"))


def swapped_channels(weights: VisionWeights, room: Path) -> VisionWeights:
    # The normalisation stays that of each channel.
    return other_weights(weights, **{KERNEL: weights.tensors[KERNEL][:, [2, 1, 0]].contiguous()})


def transposed_patches(weights: VisionWeights, room: Path) -> VisionWeights:
    transposed = weights.tensors[KERNEL].transpose(2, 3).contiguous()
    return other_weights(weights, **{KERNEL: transposed})


def rolled_positions(weights: VisionWeights, room: Path) -> VisionWeights:
    return other_weights(weights, **{POSITIONS: weights.tensors[POSITIONS].roll(1, dims=0)})


def wrong_normalisation(weights: VisionWeights, room: Path) -> VisionWeights:
    return with_preprocessing(weights, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def no_rescale(weights: VisionWeights, room: Path) -> VisionWeights:
    return with_preprocessing(weights, rescale_factor=1 / 256)


def wrong_activation(weights: VisionWeights, room: Path) -> VisionWeights:
    return with_tower(weights, activation="gelu")


def wrong_eps(weights: VisionWeights, room: Path) -> VisionWeights:
    return with_tower(weights, layer_norm_eps=1e-2)


def one_layer_more(weights: VisionWeights, room: Path) -> VisionWeights:
    return dataclasses.replace(
        weights, config=dataclasses.replace(weights.config, feature_layers=(-1,))
    )


def another_projector(weights: VisionWeights, room: Path) -> VisionWeights:
    name = "projector.linear_2.bias"
    return other_weights(weights, **{name: weights.tensors[name] + 0.01})


@pytest.mark.parametrize(
    "mistake",
    [
        of_another_seed,
        swapped_channels,
        transposed_patches,
        rolled_positions,
        wrong_normalisation,
        no_rescale,
        wrong_activation,
        wrong_eps,
        one_layer_more,
        another_projector,
    ],
)
def test_another_graph_fails(
    weights: VisionWeights,
    reference: UntouchedModel,
    export: Exporter,
    room: Path,
    mistake: Callable[[VisionWeights, Path], VisionWeights],
) -> None:
    result = reference.compare(export(mistake(weights, room)))
    assert not result.passed
    assert result.max_error > 1e-4


@pytest.mark.parametrize("mistake", [of_another_seed, swapped_channels, one_layer_more])
def test_another_half_graph_fails(
    weights: VisionWeights,
    reference: UntouchedModel,
    export: Exporter,
    room: Path,
    mistake: Callable[[VisionWeights, Path], VisionWeights],
) -> None:
    assert fails(reference, export(mistake(weights, room), precision="fp16"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("merge", ["average", "sum"])
def test_the_other_merge_fails(
    reference: UntouchedModel, export: Exporter, tmp_path: Path, merge: str, precision: str
) -> None:
    bundle = export(budget=Budget(12, 4, merge=merge), precision=precision)
    other: Any = {"average": "sum", "sum": "average"}[merge]
    selection = dataclasses.replace(bundle.manifest.selection, merge=other)
    result = reference.compare(altered(bundle, tmp_path, selection=selection))
    assert not result.passed
    assert result.kept_overlap == 1.0 or precision == "fp16"


@pytest.mark.parametrize("dominant", [11, 13])
def test_another_split_of_the_same_budget_fails(
    reference: UntouchedModel, export: Exporter, tmp_path: Path, dominant: int
) -> None:
    """The manifest promises another number of dominant tokens than the graph has."""
    manifest = export().manifest
    selection = dataclasses.replace(manifest.selection, dominant=dominant, contextual=16 - dominant)
    kept = dataclasses.replace(manifest.outputs[1], shape=(1, dominant))
    outputs = (manifest.outputs[0], kept)
    bundle = altered(export(), tmp_path, selection=selection, outputs=outputs)
    assert fails(reference, bundle)


@pytest.mark.parametrize("cls_token", [True, False])
def test_cls_kept_against_the_manifest_fails(
    reference: UntouchedModel, export: Exporter, tmp_path: Path, cls_token: bool
) -> None:
    bundle = export(budget=Budget(12, 4, cls_token))
    selection = dataclasses.replace(bundle.manifest.selection, cls_token=not cls_token)
    assert fails(reference, altered(bundle, tmp_path, selection=selection))


def swap_two_tokens(outputs: Output) -> None:
    outputs[EMBEDS][:, [3, 7]] = outputs[EMBEDS][:, [7, 3]]


def swap_two_contextual_tokens(outputs: Output) -> None:
    outputs[EMBEDS][:, [12, 15]] = outputs[EMBEDS][:, [15, 12]]


def contextual_first(outputs: Output) -> None:
    outputs[EMBEDS] = np.roll(outputs[EMBEDS], 4, axis=1)


def order_of_score(outputs: Output) -> None:
    """Tokens and indices agree, in another order than the manifest promises."""
    order = np.array([0, *range(11, 0, -1)])
    outputs[EMBEDS][:, :12] = outputs[EMBEDS][:, order]
    outputs[KEPT] = outputs[KEPT][:, order]
    outputs[TOKEN_WEIGHTS][:, :12] = outputs[TOKEN_WEIGHTS][:, order]


def indices_alone_in_another_order(outputs: Output) -> None:
    outputs[KEPT] = outputs[KEPT][:, ::-1]


def a_duplicate(outputs: Output) -> None:
    for name in (KEPT, EMBEDS, TOKEN_WEIGHTS):
        outputs[name][:, 5] = outputs[name][:, 4]


def an_index_off_by_one(outputs: Output) -> None:
    outputs[KEPT] = np.concatenate([outputs[KEPT][:, :1], outputs[KEPT][:, 1:] - 1], axis=1)


def one_value_is_nan(outputs: Output) -> None:
    outputs[EMBEDS][:, 2, 2] = np.nan


def one_value_is_infinite(outputs: Output) -> None:
    outputs[EMBEDS][:, 2, 2] = np.inf


def a_thousandth(outputs: Output) -> None:
    outputs[EMBEDS][:, 6, 5] += 1e-3 * np.abs(outputs[EMBEDS]).max()


def all_zero(outputs: Output) -> None:
    outputs[EMBEDS][:] = 0


def scaled(outputs: Output) -> None:
    outputs[EMBEDS] *= 1.001  # which no cosine sees


def one_token_in_another_group(outputs: Output) -> None:
    rows = outputs[TOKEN_WEIGHTS][:, 12:]
    rows[:] = np.roll(rows, 1, axis=1)


@pytest.mark.parametrize(
    "mistake",
    [
        swap_two_tokens,
        swap_two_contextual_tokens,
        contextual_first,
        order_of_score,
        indices_alone_in_another_order,
        a_duplicate,
        an_index_off_by_one,
        one_value_is_nan,
        one_value_is_infinite,
        a_thousandth,
        all_zero,
        scaled,
        one_token_in_another_group,
    ],
)
def test_spoilt_outputs_fail(
    reference: UntouchedModel,
    export: Exporter,
    spoil: Callable[[Callable[[Output], None]], None],
    mistake: Callable[[Output], None],
) -> None:
    assert reference.compare(export()).passed
    spoil(mistake)
    assert fails(reference, export())


@pytest.mark.parametrize(
    "mistake", [swap_two_tokens, contextual_first, order_of_score, one_value_is_nan, all_zero]
)
def test_spoilt_outputs_of_a_half_graph_fail(
    reference: UntouchedModel,
    export: Exporter,
    spoil: Callable[[Callable[[Output], None]], None],
    mistake: Callable[[Output], None],
) -> None:
    spoil(mistake)
    assert fails(reference, export(precision="fp16"))


def test_one_bad_image_of_four_fails(
    reference: UntouchedModel,
    export: Exporter,
    spoil: Callable[[Callable[[Output], None]], None],
) -> None:
    calls = []

    def third(outputs: Output) -> None:
        calls.append(1)
        if len(calls) == 3:
            a_thousandth(outputs)

    spoil(third)
    assert fails(reference, export())


# Swaps within the margin


def with_scores(
    reference: UntouchedModel, image: int, scores: NDArray[np.float64]
) -> UntouchedModel:
    features = list(reference._features)
    features[image] = dataclasses.replace(features[image], scores=scores)
    changed = object.__new__(UntouchedModel)
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
    result = with_scores(reference, 0, scores).compare(export())
    assert result.kept_swaps == int(within)
    assert result.kept_disagreements == int(not within)
    assert result.kept_overlap == pytest.approx(1 - 1 / BUDGET.dominant / len(IMAGES))
    assert result.max_error < 1e-5  # judged by the graph's own choice
    assert result.passed is within


@pytest.mark.parametrize(("distance", "within"), [(1e-6, True), (1e-2, False)])
def test_a_token_between_two_targets_is_counted_and_passes_within_the_margin(
    reference: UntouchedModel,
    export: Exporter,
    spoil: Callable[[Callable[[Output], None]], None],
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
    changed = list(reference._features)
    changed[0] = dataclasses.replace(features, keys=keys)
    moved = object.__new__(UntouchedModel)
    moved.__dict__ |= reference.__dict__ | {"_features": changed}
    calls = []

    def to_the_second(outputs: Output) -> None:
        calls.append(1)
        if len(calls) == 1:
            rows = outputs[TOKEN_WEIGHTS][-1, 12:]
            rows[:, token] = 0
            rows[2, token] = 0.1

    spoil(to_the_second)
    result = moved.compare(bundle)
    assert result.group_swaps == int(within)
    assert result.group_disagreements == int(not within)


# The commands


def exported(model: Path, output: Path, *options: str) -> Bundle:
    arguments = ["export", "--model", str(model), "--tokens", "16", "-o", str(output), *options]
    assert main(arguments) == 0
    return read_bundle(output)


def test_an_export_that_fails_its_check_writes_nothing(
    room: Path,
    tmp_path: Path,
    spoil: Callable[[Callable[[Output], None]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(a_thousandth)
    with refused(ParityError, got=("untouched model", "largest error")) as caught:
        export_bundle(
            WeightSource(str(room / "seed0")),
            tmp_path / "bundle",
            **DEFAULTS,
            check_images=IMAGES[:2],
            step=lambda _: None,
        )
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_check_says_yes_or_no_and_writes_the_numbers(
    room: Path, export: Exporter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = altered(export(), tmp_path)
    assert bundle.manifest.parity is None
    assert main(["check", str(bundle.path)]) == 0
    out = capsys.readouterr().out
    numbers = read_bundle(bundle.path).manifest.parity
    assert numbers is not None
    assert out.splitlines() == [f"{name}: {value}" for name, value in numbers.items()]
    assert numbers["passed"] is True
    assert numbers["images"] == len(IMAGES)

    # One image of one's own.
    assert main(["check", str(bundle.path), str(IMAGES[0])]) == 0
    numbers = read_bundle(bundle.path).manifest.parity
    assert numbers is not None
    assert numbers["images"] == 1

    # The manifest names other weights than the graph was made from.
    model = dataclasses.replace(bundle.manifest.model, id=str(room / "seed1"))
    (tmp_path / "other").mkdir()
    other = altered(bundle, tmp_path / "other", model=model)
    capsys.readouterr()
    assert main(["check", str(other.path)]) == 1
    assert "passed: False" in capsys.readouterr().out.splitlines()
    numbers = read_bundle(other.path).manifest.parity
    assert numbers is not None
    assert numbers["passed"] is False
    assert numbers["max_error"] > 1e-2


@pytest.mark.parametrize("mistake", [one_value_is_nan, one_value_is_infinite])
def test_check_of_a_graph_that_gives_nan_says_no(
    export: Exporter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Callable[[Output], None]], None],
    mistake: Callable[[Output], None],
) -> None:
    bundle = altered(export(), tmp_path)
    spoil(mistake)
    status = main(["check", str(bundle.path), str(IMAGES[0])])
    captured = capsys.readouterr()
    assert status in (1, 2)  # a verdict, or a line that says what is wrong
    assert "Traceback" not in captured.err
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

    assert f"was made with a tuned projector (SHA-256 {digest[:12]}…) and none was given" in (
        refused(check)
    )
    other = tuned(weights, tmp_path / "other.safetensors", offset=0.5)
    line = refused([*check, "--projector", str(other)])
    assert f"expected {digest[:12]}…" in line
    assert hashlib.sha256(other.read_bytes()).hexdigest()[:12] in line
    # The plain bundle has none, and is told so.
    line = refused(["check", str(plain.path), "--projector", str(file)])
    assert "--projector" in line or str(file) in line
    assert "None" not in line
