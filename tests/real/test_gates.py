"""The gates on real towers: right forms pass, whatever their rounding, and wrong ones fail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.real.towers import checkpoint
from tests import mutated
from tests.real.tier import Exported
from vzip.export.checkpoint.reader import Checkpoint, read_vision
from vzip.export.parity.compare import UntouchedModel
from vzip.export.parity.rounded import open_rounded
from vzip.runtime.agreement import ENGINE, load_reference, prove

TOWER = "clip-b16-224"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_wrong_graphs_of_a_real_tower_are_refused(
    exported: Exported, photographs: list[Path], tmp_path: Path, precision: str
) -> None:
    bundle = exported(TOWER, dtype=precision)
    weights = read_vision(Checkpoint.open(checkpoint(TOWER)))
    untouched = UntouchedModel(weights, photographs[:4], precision)
    assert untouched.compare(bundle).passed
    mistakes = {"fp32": mutated.FP32, "fp16": mutated.FP16}[precision]
    for name, mistake in mistakes.items():
        wrong = mutated.mutated(bundle, tmp_path / name, mistake)
        assert not untouched.compare(wrong).passed, name


@pytest.mark.parametrize("tower", [TOWER, "clip-b16-384"])
def test_an_fp16_engine_in_true_half_passes_its_proof_and_a_broken_one_fails(
    exported: Exported, tmp_path: Path, tower: str
) -> None:
    """A strongly typed engine as far as a CPU can say it: one rounding behind every operator."""
    bundle = exported(tower, dtype="fp16")
    reference, gate = load_reference(bundle), ENGINE["fp16"]
    assert set(reference.floors) == {"fp16", "bf16"}
    for name, one in (("right", bundle), *broken(bundle, tmp_path)):
        session = open_rounded(one)
        proof = prove(
            lambda a, s=session: s.run({"image": a}), reference, bundle.manifest, [1], gate
        )  # type: ignore[misc]
        session.close()
        assert proof.passed is (name == "right"), (name, str(proof))


def broken(bundle, folder: Path):
    for name in ("one_head", "one_bias"):
        yield name, mutated.mutated(bundle, folder / name, mutated.FP16[name])


@pytest.mark.parametrize("share", [0.01, 0.04])
def test_what_is_confined_to_few_tokens_of_a_real_tower_is_refused(
    exported: Exported, share: float
) -> None:
    """Of every picture the same rows, which is what an engine gets wrong at the end of a tile."""
    bundle = exported(TOWER, dtype="fp16")
    reference = load_reference(bundle)
    dominant = bundle.manifest.selection.dominant
    rows = np.arange(max(1, round(share * dominant))) + dominant // 2

    def run(array):
        picture = next(n for n, one in enumerate(reference.input) if np.array_equal(one, array[0]))
        embeds = reference.embeds[[picture]].copy()
        embeds[:, rows] = np.roll(embeds[:, rows], 1, axis=-1)
        return {"image_embeds": embeds, "kept_indices": reference.kept[[picture]]}

    proof = prove(run, reference, bundle.manifest, [1], ENGINE["fp16"])
    assert not proof.passed
    assert "picture 0 token" in str(proof)
