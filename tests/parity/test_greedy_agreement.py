"""Greedy bundles are judged by what their picks reach: in the check, and in an engine's proof."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.export.layouts import write_layout
from tests.refusals import refused
from vzip.export.algorithm import selections
from vzip.export.algorithm.rules import GreedySelection
from vzip.export.graph.trace import GraphOptions
from vzip.export.parity import compare as parity
from vzip.export.parity.compare import UntouchedModel
from vzip.export.pictures import reference_images
from vzip.export.pipeline import WeightSource, export_bundle
from vzip.runtime.agreement import (
    ENGINE,
    Proof,
    compare,
    load_reference,
    missed_limits,
    prove,
    read_reference,
)
from vzip.runtime.backends import open_backend
from vzip.runtime.bundle.manifest import EMBEDS, KEPT, POSITIONS, RANK, TOKEN_WEIGHTS
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.errors import BundleError, VzipError

Outputs = dict[str, NDArray[Any]]
Spoil = Callable[[Outputs], None]

GREEDY = [n for n in selections.names() if issubclass(selections.kind_of(n), GreedySelection)]
COUNT = 9
IMAGES = reference_images()[:2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> WeightSource:
    folder = tmp_path_factory.mktemp("greedy") / "tiny"
    write_layout("llava-hf-single", folder)
    return WeightSource(str(folder))


@pytest.fixture(scope="module", params=GREEDY)
def bundle(
    request: pytest.FixtureRequest, source: WeightSource, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    config = source.config()
    budget = selections.budget_of(config, selection=request.param, tokens=COUNT, cls_token=False)
    return export_bundle(
        source,
        tmp_path_factory.mktemp("greedy") / "bundle",
        budget=budget,
        precision="fp32",
        options=GraphOptions(batch=2, dynamic_batch=True),
        check_images=IMAGES,
        step=lambda _: None,
    )


def first_patches(outputs: Outputs) -> None:
    """Keep the first patches, as if nothing had been looked at; the graph is consistent."""
    count = len(outputs[KEPT])
    outputs[KEPT] = np.tile(np.arange(1, 1 + COUNT), (count, 1))
    outputs[POSITIONS] = outputs[KEPT] - 1
    if TOKEN_WEIGHTS in outputs:
        rows = np.eye(outputs[TOKEN_WEIGHTS].shape[2], dtype=np.float32)[1 : 1 + COUNT]
        outputs[TOKEN_WEIGHTS] = np.tile(rows, (count, 1, 1))


def last_pick_first(outputs: Outputs) -> None:
    """The right tokens, in another order of picks."""
    outputs[RANK] = COUNT - 1 - outputs[RANK]


def other_tokens(outputs: Outputs) -> None:
    outputs[EMBEDS] = np.roll(outputs[EMBEDS], 1, axis=1)


def spoilt(monkeypatch: pytest.MonkeyPatch, change: Spoil) -> None:
    """Change what the backend gives to the check."""
    opened = parity._opened

    class Stub:
        def __init__(self, bundle: Bundle) -> None:
            self.backend = opened(bundle)

        def run(self, feeds: Any) -> Outputs:
            outputs = {name: np.array(array) for name, array in self.backend.run(feeds).items()}
            change(outputs)
            return outputs

        def close(self) -> None:
            self.backend.close()

    monkeypatch.setattr(parity, "_opened", Stub)


def proof(bundle: Bundle, change: Spoil = lambda _: None) -> Proof:
    """Judge the graph as an engine of it would be."""
    _, opened = open_backend("onnxruntime", bundle)

    def run(images: NDArray[Any]) -> Outputs:
        found = opened.run({bundle.manifest.input.name: images})
        outputs = {name: np.array(array) for name, array in found.items()}
        change(outputs)
        return outputs

    try:
        return prove(run, load_reference(bundle), bundle.manifest, [1, 2], ENGINE["fp32"])
    finally:
        opened.close()


@pytest.mark.slow
def test_a_right_graph_passes_both_and_says_what_its_picks_reach(bundle: Bundle) -> None:
    told = bundle.manifest.parity
    assert told is not None
    assert (told["passed"], told["kept_disagreements"]) == (True, 0)
    assert float(told["objective"]) == pytest.approx(1.0, abs=1e-6)
    assert not missed_limits(told, bundle.manifest)
    assert missed_limits({**told, "objective": 0.9}, bundle.manifest).keys() == {"objective"}
    found = proof(bundle)
    assert found.passed, found
    assert found.objective == pytest.approx(1.0, abs=1e-3)
    assert found.to_json()["objective"] == found.objective
    assert "objective 1.0" in str(found)


@pytest.mark.slow
@pytest.mark.parametrize("change", [first_patches, last_pick_first, other_tokens])
def test_a_wrong_graph_fails_both(
    bundle: Bundle, source: WeightSource, monkeypatch: pytest.MonkeyPatch, change: Spoil
) -> None:
    what = "cosine" if change is other_tokens else "share of the objective"
    found = proof(bundle, change)
    assert not found.passed
    assert change is other_tokens or what in found.short[0]
    spoilt(monkeypatch, change)
    weights, _ = source.load()
    try:
        result = UntouchedModel(weights, IMAGES).compare(bundle)
    except VzipError:
        assert change is not last_pick_first
        return
    assert not result.passed
    assert change is other_tokens or any(what in each for each in result.short)


@pytest.mark.slow
def test_other_picks_that_reach_as_much_pass(bundle: Bundle) -> None:
    """Two patches that are alike in the reference: the graph's choice between them is no error."""
    reference = load_reference(bundle)
    arrays = reference.to_arrays()
    picks = reference.outputs([0])
    patches = picks[KEPT][0] - 1
    (out,) = [p for p in range(64) if p not in patches][:1]
    similar = arrays["similarity"].copy()
    taken = patches[-1]
    similar[0, out], similar[0, :, out] = similar[0, taken], similar[0, :, taken]
    similar[0, out, out] = similar[0, taken, taken]
    if "weights" in arrays:
        arrays["weights"][0, out] = arrays["weights"][0, taken]
    arrays["similarity"] = similar
    known = read_reference(archive(arrays), bundle.manifest).outputs([0])
    kept = np.array([out + 1 if p == taken else p + 1 for p in patches])
    rows = np.argsort(kept)
    got = {
        KEPT: kept[rows][None],
        RANK: picks[RANK][0][rows][None],
        EMBEDS: picks[EMBEDS][0][rows][None],
    }
    agreement = compare([known], [got], bundle.manifest)
    assert agreement.mean_overlap == pytest.approx(8 / 9)
    assert agreement.objectives.tolist() == pytest.approx([1.0])
    assert ENGINE["fp32"].judge(agreement) == ()
    without = {name: array for name, array in got.items() if name != RANK}
    (short,) = ENGINE["fp32"].judge(compare([known], [without], bundle.manifest))[1:]
    assert "kept overlap" in short


def archive(arrays: dict[str, NDArray[Any]]) -> io.BytesIO:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    file.seek(0)
    return file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rank", lambda _: None),
        ("similarity", lambda _: None),
        ("similarity", lambda array: array.astype(np.float32)),
        ("similarity", lambda array: array[:, :5]),
        ("rank", lambda array: array[:, :5]),
    ],
)
def test_a_reference_of_another_form_is_refused(bundle: Bundle, name: str, change: Any) -> None:
    arrays = load_reference(bundle).to_arrays()
    changed = change(arrays[name])
    arrays = {key: array for key, array in arrays.items() if key != name}
    if changed is not None:
        arrays[name] = changed
    with refused(BundleError, got=f"for '{name}'"):
        read_reference(archive(arrays), bundle.manifest)


@pytest.mark.slow
def test_the_rebuilt_module_ranks_as_the_graph(bundle: Bundle) -> None:
    images = load_reference(bundle).input
    found = []
    for name in ("onnxruntime", "pytorch"):
        _, opened = open_backend(name, bundle)
        found.append(opened.run({bundle.manifest.input.name: images}))
        opened.close()
    for name in (KEPT, POSITIONS, RANK):
        assert np.array_equal(found[0][name], found[1][name])
