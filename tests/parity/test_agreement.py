"""One judgement of what agrees: it passes what is right and, above all, fails what is wrong."""

from __future__ import annotations

import dataclasses
import io
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.export.layouts import write_layout
from tests.refusals import refused
from vzip.export.algorithm.budget import Budget
from vzip.export.graph.trace import GraphOptions
from vzip.export.pictures import reference_images
from vzip.export.pipeline import WeightSource, export_bundle
from vzip.runtime.agreement import (
    CALIBRATED,
    COARSER_PEER,
    CPU_FORM,
    ENGINE,
    GRAPH,
    UNCOMPRESSED_PEER,
    Agreement,
    Choices,
    Gate,
    Limits,
    Proof,
    Reference,
    Values,
    compare,
    load_reference,
    prove,
    read_reference,
)
from vzip.runtime.agreement.floor import floor_of
from vzip.runtime.backends import open_backend
from vzip.runtime.bundle.manifest import Manifest
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.errors import BundleError, InvalidInputError

Array = NDArray[Any]
Output = dict[str, Array]

PICTURES, PATCHES, BATCHES = 5, 16, (1, 3)


@pytest.fixture
def manifest(tiny_bundle: Path) -> Manifest:
    return read_bundle(tiny_bundle).manifest


@pytest.fixture
def reference(golden: Mapping[str, Array]) -> Reference:
    """What the golden bundle computes; the scores fit what is kept."""
    scores = np.linspace(1.0, 2.0, PATCHES, dtype=np.float32) * np.ones((PICTURES, 1), np.float32)
    for row, kept in zip(scores, golden["kept"], strict=True):
        row[kept[1:] - 1] += 10.0
    return Reference(
        input=golden["images"],
        kept=golden["kept"],
        scores=scores,
        embeds=golden["embeds"].astype(np.float32),
    )


def proof(
    reference: Reference,
    manifest: Manifest,
    change: Callable[[Output], None] = lambda output: None,
) -> Proof:
    """Judge an engine that is right but for a change."""

    def run(array: Array) -> Output:
        places = [
            next(n for n, each in enumerate(reference.input) if np.array_equal(each, image))
            for image in array
        ]
        output = {
            "image_embeds": reference.embeds[places].copy(),
            "kept_indices": reference.kept[places].copy(),
        }
        change(output)
        return output

    return prove(run, reference, manifest, BATCHES, ENGINE[manifest.precision])


def test_what_is_right_passes(reference: Reference, manifest: Manifest) -> None:
    result = proof(reference, manifest)
    assert result.passed
    assert result.images == PICTURES
    assert result.runs == 5 + 6  # one by one; then by threes, the first picture once more
    assert (result.kept_swaps, result.kept_disagreements) == (0, 0)
    assert result.contextual_compared == 3 * result.runs
    assert result.min_cosine == pytest.approx(1.0)
    assert result.max_error == 0.0
    assert "passed on 5 pictures (11 runs)" in str(result)
    assert result.to_json()["passed"] is True


def one_is_nan(output: Output) -> None:
    output["image_embeds"][0, 1, 2] = np.nan


def one_is_infinite(output: Output) -> None:
    output["image_embeds"][0, 5, 0] = np.inf


def all_zero(output: Output) -> None:
    output["image_embeds"][:] = 0.0


def noise(output: Output) -> None:
    random = np.random.default_rng(0).normal(size=output["image_embeds"].shape)
    output["image_embeds"] += 0.2 * np.abs(output["image_embeds"]).max() * random


def twice_as_large(output: Output) -> None:
    output["image_embeds"] *= 2.0


def two_rows_exchanged(output: Output) -> None:
    output["image_embeds"][:, [1, 2]] = output["image_embeds"][:, [2, 1]]


def merged_tokens_in_another_order(output: Output) -> None:
    output["image_embeds"][:, 4:] = output["image_embeds"][:, :3:-1]


def merged_first(output: Output) -> None:
    output["image_embeds"] = np.roll(output["image_embeds"], 3, axis=1)


def another_token_kept(output: Output) -> None:
    for kept in output["kept_indices"]:
        kept[-1] = next(token for token in range(1, 17) if token not in kept)


def without_cls(output: Output) -> None:
    output["kept_indices"][:, 0] = 99


def a_duplicate(output: Output) -> None:
    output["kept_indices"][:, -1] = output["kept_indices"][:, -2]


def everything_elsewhere(output: Output) -> None:
    output["kept_indices"] += 20


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    "mistake",
    [
        *(one_is_nan, one_is_infinite, all_zero, noise, twice_as_large, two_rows_exchanged),
        *(merged_tokens_in_another_order, merged_first, another_token_kept, without_cls),
        *(a_duplicate, everything_elsewhere),
    ],
)
def test_what_is_wrong_fails(
    reference: Reference,
    manifest: Manifest,
    mistake: Callable[[Output], None],
    precision: Any,
) -> None:
    changed = dataclasses.replace(manifest, precision=precision)
    result = proof(reference, changed, mistake)
    assert not result.passed
    numbers = result.to_json()
    assert numbers.pop("short") == "; ".join(result.short)
    assert all(np.isfinite(value) for value in numbers.values())  # the manifest's numbers
    assert "FAILED" in str(result)


def test_a_mistake_in_the_largest_batch_alone_fails(
    reference: Reference, manifest: Manifest
) -> None:
    def last_of_three(output: Output) -> None:
        if len(output["image_embeds"]) == 3:
            output["image_embeds"][2] = output["image_embeds"][0]

    assert not proof(reference, manifest, last_of_three).passed


def test_a_swap_within_the_margin_is_rounding(reference: Reference, manifest: Manifest) -> None:
    """In FP16, a token whose score is nearly that of the last one kept may take its place."""
    half = dataclasses.replace(manifest, precision="fp16")
    image, kept = 0, reference.kept[0]
    lost = int(kept[-1])
    other = next(token for token in range(1, 17) if token not in kept)
    scores = reference.scores.copy()
    scores[image, lost - 1] = 10.0
    close = dataclasses.replace(reference, scores=scores)

    def swapped(output: Output) -> None:
        for embeds, chosen in zip(output["image_embeds"], output["kept_indices"], strict=True):
            if np.array_equal(chosen, kept):
                chosen[chosen == lost] = other
                order = np.argsort(chosen)
                chosen[:] = chosen[order]
                embeds[:4] = embeds[:4][order]

    for score, swaps, wrong in ((9.9, 3, 0), (9.0, 0, 3)):  # the picture is in three runs
        scores[image, other - 1] = score
        result = proof(close, half, swapped)
        assert (result.kept_swaps, result.kept_disagreements) == (swaps, wrong)
        assert result.passed == (wrong == 0)
        assert result.kept_overlap == pytest.approx(1 - 3 / 44)
        assert result.contextual_compared < 33  # targets that moved aren't compared
    scores[image, other - 1] = 9.9
    assert not proof(close, manifest, swapped).passed  # FP32 has no such excuse


def test_rounding_of_fp16_passes_in_fp16(reference: Reference, manifest: Manifest) -> None:
    def rounded(output: Output) -> None:
        random = np.random.default_rng(0).normal(size=output["image_embeds"].shape)
        scale = np.abs(output["image_embeds"]).max()
        output["image_embeds"] = (output["image_embeds"] + 2e-3 * scale * random).astype(np.float16)

    assert proof(reference, dataclasses.replace(manifest, precision="fp16"), rounded).passed
    assert not proof(reference, manifest, rounded).passed


# The gates


def test_what_falls_short_is_named_with_number_and_limit() -> None:
    """Each limit by itself: an agreement that only just misses it, and one that meets it."""
    none = np.zeros(0)
    right = Agreement(
        np.array([1.0, 0.8]),
        Choices(10, np.array([0.02])),
        Values(np.array([0.9, 1.0]), np.array([0.1, 0.0])),
        Values(np.array([0.7, 0.9]), np.array([0.0, 0.2])),
        Choices(20, np.array([0.01, 0.3])),
    )
    for meets, misses, said in (
        (Gate(overlap=0.9), Gate(overlap=0.91), "kept overlap 0.9"),
        (Gate(0.02, 0.1), Gate(0.02, 0.04), "group disagreements 0.05"),
        (Gate(0.3, 0.0), Gate(0.01, 0.05), "kept disagreements 0.1"),
        (Gate(kept=Limits(lowest=0.9)), Gate(kept=Limits(lowest=0.91)), "kept tokens 0.9"),
        (Gate(kept=Limits(error=0.1)), Gate(kept=Limits(error=0.09)), "kept tokens 0.1"),
        (Gate(merged=Limits(mean=0.8)), Gate(merged=Limits(mean=0.81)), "merged tokens 0.8"),
        (Gate(every=Limits(mean=0.87)), Gate(every=Limits(mean=0.88)), "tokens 0.875"),
        (Gate(every=Limits(error=0.2)), Gate(every=Limits(error=0.19)), "tokens 0.2"),
    ):
        assert meets.judge(right) == ()
        (short,) = misses.judge(right)
        assert said in short
    assert Gate().judge(dataclasses.replace(right, finite=False))
    nothing_to_compare = dataclasses.replace(right, merged=Values(none))
    assert Gate(merged=Limits(mean=0.5)).judge(nothing_to_compare)
    assert not Gate(kept=Limits(lowest=0.5)).judge(nothing_to_compare)


def test_without_scores_nothing_excuses_another_choice(
    reference: Reference, manifest: Manifest
) -> None:
    """Graph beside graph: kept tokens that differ are disagreements, whatever they are."""
    right = {name: a for name, a in reference.outputs(range(PICTURES)).items() if name != "scores"}
    assert compare([right], [right], manifest).mean_overlap == 1.0
    for foreign in (99, -3, next(x for x in range(17) if x not in reference.kept[0])):
        kept = reference.kept.copy()
        kept[0, -1] = foreign
        found = compare([right], [{**right, "kept_indices": kept}], manifest)
        assert found.mean_overlap == pytest.approx(1 - 1 / 4 / PICTURES)
        assert (found.chosen.within(1e9), found.chosen.beyond(1e9)) == (0, 1)


def test_engines_known_to_be_wrong_pass_no_gate() -> None:
    """Their cosines were .14 to .65; every gate of an encoder with merging asks for more."""
    wrong = Agreement(
        np.ones(1),
        Choices(4, np.zeros(0)),
        Values(np.full(4, 0.65), np.zeros(4)),
        Values(np.full(3, 0.65), np.zeros(3)),
    )
    for gate in (*GRAPH.values(), *ENGINE.values(), *UNCOMPRESSED_PEER.values(), CPU_FORM,
                 COARSER_PEER, CALIBRATED):  # fmt: skip
        assert gate.judge(wrong)


# The file


def archive(**arrays: Array) -> io.BytesIO:
    data = io.BytesIO()
    np.savez(data, **arrays)
    data.seek(0)
    return data


def test_reads_what_was_written(reference: Reference, manifest: Manifest) -> None:
    found = read_reference(archive(**reference.to_arrays()), manifest)
    assert found.floors.keys() == reference.floors.keys()
    for name, value in reference.to_arrays().items():
        assert np.array_equal(found.to_arrays()[name], value)


def test_another_form_is_refused(reference: Reference, manifest: Manifest) -> None:
    def changed(name: str, change: Callable[[Array], Array]) -> dict[str, Array]:
        arrays = reference.to_arrays()
        return {**arrays, name: change(arrays[name])}

    float_embeds = "float32 or float16 [5, 7, 6]"
    for name, change, got, expected in (
        ("kept", lambda a: a[:, :3], "int64 [5, 3]", "int64 [5, 4]"),
        ("kept", lambda a: a.astype(np.int32), "int32 [5, 4]", "int64 [5, 4]"),
        ("scores", lambda a: a[:, 1:], "float32 [5, 15]", "float32 [5, 16]"),
        ("embeds", lambda a: a[1:], "float32 [4, 7, 6]", float_embeds),
        ("embeds", lambda a: a.astype(np.float64), "float64 [5, 7, 6]", float_embeds),
        ("input", lambda a: a[..., :2], "uint8 [5, 16, 16, 2]", "uint8 [5, 16, 16, 3]"),
        ("input", lambda a: a[:0], "uint8 [0, 16, 16, 3]", "at least one"),
    ):
        with refused(BundleError, got=(f"'{name}'", got), expected=expected):
            read_reference(archive(**changed(name, change)), manifest)
    without = {name: array for name, array in reference.to_arrays().items() if name != "scores"}
    with refused(BundleError, got=("'scores'", "nothing"), expected="float32 [5, 16]"):
        read_reference(archive(**without), manifest)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and nothing", b"hello"])
def test_no_archive(content: bytes, manifest: Manifest) -> None:
    with refused(BundleError, got="reference.npz", expected="archive"):
        read_reference(io.BytesIO(content), manifest)


def test_pickles_are_not_read(reference: Reference, manifest: Manifest) -> None:
    arrays = {**reference.to_arrays(), "kept": np.array([object()], dtype=object)}
    with refused(BundleError, got=("'kept'", "object [1]"), cause="another tool"):
        read_reference(archive(**arrays), manifest)


def member(shape: str, data: bytes = b"", *, packed: bool = False, said: int | None = None):
    """A `reference.npz` whose array of kept tokens has a header of its own."""

    def make(reference: Reference) -> io.BytesIO:
        header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}}}\n".encode()
        npy = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as zipped:
            for name, array in reference.to_arrays().items():
                whole = io.BytesIO()
                np.save(whole, array, allow_pickle=False)
                kept = name == "kept"
                form = zipfile.ZIP_DEFLATED if packed and kept else zipfile.ZIP_STORED
                zipped.writestr(f"{name}.npy", npy if kept else whole.getvalue(), form)
        content = made.getvalue()
        if said is not None:  # both places that say how long it is
            content = content.replace(len(npy).to_bytes(4, "little"), said.to_bytes(4, "little"))
        return io.BytesIO(content)

    return make


@pytest.mark.parametrize(
    "make",
    [
        member("(5, 4)", bytes(160), packed=True),
        member("(2**31, 4)"),
        member(f"({10**15}, 4)"),
        member(f"({'9' * 1000}, 4)"),
        member("(-5, 4)", bytes(160)),
        member("(5, 4)", bytes(152)),
        member("(5, 4)", bytes(168)),
        member("(" + "2, " * 2000 + ")"),
        member("(" + "(" * 500 + ")" * 500 + ",)"),
        member("(5, 4)", bytes(160), said=2**31),
        member("(5, 4)", bytes(160), packed=True, said=2**31),
        member("(True, 4)", bytes(32)),
    ],
)
def test_sizes_are_checked_before_memory_is_taken(
    make: Any, reference: Reference, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda *a, **k: made.append(1) or empty(*a, **k))
    data = make(reference)
    tracemalloc.start()
    with refused(BundleError, got="reference.npz", cure="export the bundle again"):
        read_reference(data, manifest)
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()
    assert len(made) <= 1  # the pictures, whose sizes were right


# What export writes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("proof") / "tiny"
    write_layout("llava-hf-single", folder)
    return folder


def export(checkpoint: Path, folder: Path, **change: Any) -> Bundle:
    options: dict[str, Any] = {
        "budget": Budget(12, 4),
        "precision": "fp32",
        "options": GraphOptions(batch=4, dynamic_batch=True),
        "check_images": reference_images(),
        "step": lambda _: None,
    }
    return export_bundle(WeightSource(str(checkpoint)), folder / "bundle", **{**options, **change})


@pytest.mark.full
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"budget": Budget(12, 4, cls_token=False, merge="sum")},
        {"precision": "fp16"},
        {"options": GraphOptions(graph_input="pixel_values", batch=2, opset=17)},
    ],
    ids=["plain", "sum-nocls", "fp16", "pixel_values"],
)
@pytest.mark.parametrize("engine", ["onnxruntime", "pytorch"])
def test_a_right_graph_passes_its_own_reference(
    checkpoint: Path, tmp_path: Path, change: dict[str, Any], engine: str
) -> None:
    """FP16 with PyTorch rounds after every operator, as an engine does."""
    bundle = export(checkpoint, tmp_path, **change)
    reference, batch = load_reference(bundle), bundle.manifest.batch
    assert len(reference.input) == len(reference_images())
    _, session = open_backend(engine, bundle)
    name = bundle.manifest.input.name
    sizes = [1, batch.max] if batch.dynamic else [batch.max]
    gate = ENGINE[bundle.manifest.precision]
    result = prove(lambda a: session.run({name: a}), reference, bundle.manifest, sizes, gate)
    session.close()
    assert result.passed, result
    if bundle.manifest.precision == "fp32":
        assert result.kept_overlap == 1.0
        assert result.contextual_cosine > 0.99999


@pytest.mark.slow
def test_without_a_check_there_is_no_reference(checkpoint: Path, tmp_path: Path) -> None:
    bundle = export(checkpoint, tmp_path, check_images=())
    assert "reference.npz" not in bundle.manifest.files
    with refused(InvalidInputError, got="reference.npz", cure="--no-check"):
        load_reference(bundle)


@pytest.mark.slow
def test_a_damaged_reference_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    bundle = export(checkpoint, tmp_path)
    path = bundle.path / "reference.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with refused(BundleError, got="reference.npz"):
        load_reference(bundle)
    path.unlink()
    with refused(BundleError, got="reference.npz"):
        load_reference(bundle)
    path.symlink_to(tmp_path / "another")
    (tmp_path / "another").write_bytes(data)
    with refused(BundleError, got="reference.npz"):
        load_reference(bundle)


# Beside what rounding alone costs


def values(errors: Array, floor: Array, cosines: Array | None = None) -> Values:
    count = len(errors)
    return Values(
        np.ones(count) if cosines is None else cosines,
        errors,
        np.stack([floor, floor**2], axis=1),
        np.stack([np.arange(count) // 64, np.arange(count) % 64], axis=1),
    )


FLOOR = np.full(256, 1e-3)
FLOOR[[141, 200]] = 0.04  # unsteady


def agreement_of(found: Values) -> Agreement:
    right = Values(np.ones(8), np.zeros(8))
    return Agreement(np.ones(4), Choices(216, np.zeros(0)), found, right)


@pytest.mark.parametrize(
    ("tokens", "error", "cosine", "passes"),
    [
        ([], 0.0, 1.0, True),
        ([141], 0.16, 0.99, True),  # its floor allows it
        ([141], 0.9, 0.9, True),  # chaos, of a token that is known for it
        ([7], 0.16, 0.999, False),  # of one that isn't
        ([*range(5)], 0.3, 0.9, False),  # confined to 2 % of the tokens
        ([*range(12)], 0.3, 0.14, False),
        ([141, 200, 7], 0.16, 0.99, False),
    ],
)
def test_tokens_are_judged_beside_their_floor(
    tokens: list[int], error: float, cosine: float, passes: bool
) -> None:
    errors, cosines = FLOOR.copy(), np.full(256, 0.999999)
    errors[tokens], cosines[tokens] = error, cosine
    short = ENGINE["fp16"].judge(agreement_of(values(errors, FLOOR, cosines)))
    assert (not short) is passes
    if tokens and not passes:
        first = sorted(set(tokens) - {141, 200})[0]
        assert f"of 256 kept tokens differ beyond the gate: picture 0 token {first} by" in short[-1]


@pytest.mark.parametrize("factor", [1.0, 3.0, 20.0])
def test_all_tokens_a_little_off_is_seen_by_the_quantiles(factor: float) -> None:
    """Each token alone would be within its limit."""
    short = ENGINE["fp16"].judge(agreement_of(values(factor * FLOOR, FLOOR)))
    assert (not short) is (factor < 8)
    assert all("median" in each or "95 %" in each for each in short)


@pytest.mark.parametrize(
    ("wrong", "cosine", "passes"), [(3, 0.5, True), (8, 0.0, False), (16, 0.8, False)]
)
def test_few_tokens_of_a_coarse_form_may_be_far_off_and_no_more(
    wrong: int, cosine: float, passes: bool
) -> None:
    """Of 256: 3 are 1 %, 16 are 6 %, and 8 bring the mean to .969."""
    cosines = np.where(np.arange(256) < wrong, cosine, 0.9999)
    found = agreement_of(Values(cosines, np.zeros(256)))
    assert (not ENGINE["int8"].judge(found)) is passes


@pytest.mark.parametrize("mean", [0.14, 0.65, 0.99])
def test_a_miscompile_is_known_by_the_mean(mean: float) -> None:
    wrong = agreement_of(values(np.full(256, 0.04), FLOOR, np.full(256, mean)))
    few = agreement_of(values(np.where(np.arange(256) < 5, 0.3, 1e-3), FLOOR))
    gate = ENGINE["fp16"]
    assert gate.judge(wrong)
    assert gate.judge(few)
    assert (gate.on_average(wrong), gate.on_average(few)) == (False, True)


def test_what_a_coarser_precision_shows_counts_in_proportion() -> None:
    measured = {
        "fp16": np.array([[1e-3, 1e-6], [1e-3, 1e-6]]),
        "bf16": np.array([[8e-2, 64e-6], [4e-3, 1e-6]]),
    }
    found = floor_of(measured, "fp16")
    assert found is not None
    assert found == pytest.approx(np.array([[1e-2, 1e-6], [1e-3, 1e-6]]))
    bf16 = floor_of(measured, "bf16")
    assert bf16 is not None
    assert bf16 == pytest.approx(measured["bf16"])
    assert floor_of(measured, "fp32") is None


def test_a_reference_with_floors_is_read_and_used(reference: Reference, manifest: Manifest) -> None:
    floor = np.full((PICTURES, 7, 2), 1e-6, np.float32)
    measured = dataclasses.replace(reference, floors={"fp32": floor})
    found = read_reference(archive(**measured.to_arrays()), manifest)
    assert np.array_equal(found.floors["fp32"], floor)

    def a_little(output: Output) -> None:
        scale = np.abs(output["image_embeds"]).max()
        output["image_embeds"] += np.float32(3e-4) * scale

    assert proof(reference, manifest, a_little).passed  # as before it was measured
    result = proof(found, manifest, a_little)
    assert not result.passed
    assert result.to_json()["on_average"] is True
    assert result.tokens == 4 * result.runs
    assert proof(found, manifest).passed


@pytest.mark.parametrize("shape", [(5, 7), (5, 6, 2), (4, 7, 2)])
def test_a_floor_of_another_form_is_refused(
    reference: Reference, manifest: Manifest, shape: tuple[int, ...]
) -> None:
    wrong = archive(**reference.to_arrays(), floor_fp16=np.zeros(shape, np.float32))
    with refused(BundleError, got=("'floor_fp16'", str([*shape])), expected="[5, 7, 2]"):
        read_reference(wrong, manifest)
