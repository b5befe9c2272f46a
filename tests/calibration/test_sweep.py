"""`vzip sweep`: every number against one that was made another way."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.export.layouts import write_layout
from tests.refusals import refused
from vzip.calibration import sweep
from vzip.calibration.held_out import Accuracy, DemoQuestions
from vzip.calibration.sweeping import shared_tower as sweep_graph
from vzip.calibration.sweeping.advice import SweepLimits, advise
from vzip.calibration.sweeping.measure import Row, Sweep, agreement, measure
from vzip.calibration.sweeping.output import plot, size, table
from vzip.calibration.sweeping.shared_tower import ALL, Seen, SweepSession, open_sweep
from vzip.export.algorithm import oracle
from vzip.export.algorithm.budget import Budget
from vzip.export.checkpoint.reader import Checkpoint, read_vision
from vzip.export.parity.reference import projector, tower_features
from vzip.export.pictures import reference_images
from vzip.export.plan.llm_cost import LlmShape, llm_shape
from vzip.runtime.cli.main import main
from vzip.runtime.errors import CheckpointError, InvalidInputError
from vzip.runtime.machine import timing
from vzip.runtime.machine.timing import Timing
from vzip.runtime.pictures.images import load_image
from vzip.runtime.pictures.preprocess import tower_image

BUDGETS = [Budget(5, 1), Budget(5, 1, merge="sum"),
            Budget(27, 5)]  # fmt: skip
BLANK = Timing(1.0, 1.0, 1.0, 1.0, 0.0, 7)

# The LLM's cost


def test_the_cost_model_is_the_papers() -> None:
    shape = LlmShape("llama", 32, 4096, 11008, 32, 128, "float16", dtype_assumed=False)
    n, d, m = 640, 4096, 11008
    assert shape.prefill_flops(n) == 32 * (4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m)
    assert shape.kv_bytes(1) == 512 * 1024  # half a MiB a token, as is well known of a 7B
    assert shape.kv_bytes(640) == 640 * shape.kv_bytes(1)


def test_sizes_are_read_from_every_form_of_configuration() -> None:
    seven = {"model_type": "llava", "vision_config": {}, "text_config": {"model_type": "llama"}}
    shape = llm_shape({**seven, "torch_dtype": "bfloat16"})  # transformers' defaults: a 7B
    assert (shape.layers, shape.hidden_size, shape.intermediate_size) == (32, 4096, 11008)
    assert (shape.kv_heads, shape.head_dim, shape.dtype, shape.dtype_assumed) == (
        32, 128, "bfloat16", False,
    )  # fmt: skip
    grouped = llm_shape({**seven, "text_config": {"model_type": "mistral", "dtype": "float32"}})
    assert (grouped.kv_heads, grouped.head_dim, grouped.dtype) == (8, 128, "float32")
    assert llm_shape(seven).dtype_assumed
    original = llm_shape(
        {
            "model_type": "llava", "hidden_size": 48, "intermediate_size": 64,
            "num_attention_heads": 4, "num_hidden_layers": 2,
        }
    )  # fmt: skip
    assert (original.layers, original.kv_heads, original.head_dim) == (2, 4, 12)


def test_sizes_that_are_missing_or_odd_are_refused() -> None:
    with refused(CheckpointError, got="layers is None"):
        llm_shape({"model_type": "llava", "hidden_size": 48, "num_attention_heads": 4})
    with refused(CheckpointError, got="'int4'", expected="float16"):
        llm_shape(
            {"model_type": "llava", "vision_config": {}, "text_config": {"model_type": "llama"},
             "dtype": "int4"}
        )  # fmt: skip


# The graph


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("model")
    write_layout("llava-hf-single", folder)
    return folder


@pytest.fixture(scope="module")
def session(model: Path) -> SweepSession:
    return open_sweep(read_vision(Checkpoint.open(model)), BUDGETS)


@pytest.fixture(scope="module")
def photograph(model: Path) -> tuple[np.ndarray, np.ndarray]:
    """A picture, and what the tower takes of it."""
    image = load_image(reference_images()[0])
    prep = Checkpoint.open(model).vision().preprocessing
    return np.asarray(image), tower_image(image, prep)


@pytest.mark.slow
def test_every_budget_is_what_the_untouched_model_and_the_oracle_say(
    model: Path, session: SweepSession, photograph: tuple[np.ndarray, np.ndarray]
) -> None:
    weights = read_vision(Checkpoint.open(model))
    (features,) = tower_features(weights, [photograph[0]])
    project = projector(weights)

    def projected(tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return project(torch.from_numpy(tokens).float()).numpy()

    seen = session.see(photograph[1])
    np.testing.assert_allclose(seen.everything, projected(features.hidden[0, 1:]), atol=2e-5)
    np.testing.assert_allclose(seen.scores, features.scores[0], rtol=1e-5)
    for each in BUDGETS:
        tokens, kept = oracle.compress(
            features.hidden, features.keys, features.scores, dominant=each.dominant,
            contextual=each.contextual, merge=each.merge, cls_token=True,
        )  # fmt: skip
        np.testing.assert_allclose(seen.embeds[each.name], projected(tokens[0]), atol=5e-5)
        rows = seen.weights[each.name]
        assert np.flatnonzero(rows[: each.dominant].any(axis=0)).tolist() == list(kept[0])
        assert (rows != 0).sum(axis=0).tolist() == [1] * 65  # each token is in one output token


@pytest.mark.slow
def test_an_encoder_runs_the_tower_and_its_own_tail_and_nothing_else(
    model: Path, photograph: tuple[np.ndarray, np.ndarray], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """ONNX Runtime's own profile tells which nodes ran."""

    def open_profiled(ort: Any, graph: Any, folder: Path, **_: Any) -> Any:
        options = ort.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / folder.name)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder)
        )
        return ort.InferenceSession(graph(), options, providers=["CPUExecutionProvider"])

    def nodes(session: Any) -> list[str]:
        events = json.loads(Path(session.end_profiling()).read_text())
        ran = [event for event in events if event.get("cat") == "Node"]
        return [e["args"]["op_name"] for e in ran if "op_name" in e.get("args", {})]

    monkeypatch.setattr(sweep_graph, "open_session", open_profiled)
    average, summed, _ = BUDGETS
    opened = open_sweep(read_vision(Checkpoint.open(model)), [average, summed])
    opened.encode(average.name, photograph[1][None])
    tower = nodes(opened._tower)
    ran = {name: nodes(tail) for name, tail in opened._tails.items()}
    # One before the layers and two in each of the three of four that are run; some get fused.
    assert sum("LayerNormalization" in kind for kind in tower) == 1 + 2 * 3
    assert "TopK" not in tower
    assert ran[average.name].count("TopK") == 2
    assert ran[summed.name] == ran[ALL] == []


@pytest.mark.slow
def test_encoding_one_budget_gives_what_all_together_gave(
    session: SweepSession, photograph: tuple[np.ndarray, np.ndarray]
) -> None:
    seen = session.see(photograph[1])
    for each in BUDGETS:
        alone = session.encode(each.name, photograph[1][None])
        np.testing.assert_allclose(alone[0], seen.embeds[each.name], atol=1e-6)
    assert session.encode(ALL, photograph[1][None]).shape == (1, 64, 48)


def test_agreement_weighs_each_patch_by_its_attention() -> None:
    east, north = [1.0, 0.0], [0.0, 1.0]
    seen = Seen(
        everything=np.array([east, north, [3.0, 4.0], east], np.float32),
        scores=np.array([1, 2, 3, 4], np.float32),
        # CLS and patch 3 are kept, 0 to 2 go into one token that points east, at any length.
        embeds={"3-average": np.array([north, east, [7.0, 0.0]], np.float32)},
        weights={
            "3-average": np.array(
                [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0.3, 0.3, 0.3, 0]], np.float32
            )
        },
    )
    found, attention = agreement(seen, Budget(2, 1), first_patch=1)
    assert found == pytest.approx(0.1 * 1 + 0.2 * 0 + 0.3 * 0.6 + 0.4 * 1)
    assert attention == pytest.approx(0.4)


# The advice


def row(tokens: int, merge: str = "average", **values: Any) -> Row:
    given = {"agreement": tokens / 200, "accuracy": None, "accuracy_error": None} | values
    latency = dataclasses.replace(BLANK, median_ms=given.pop("ms", 10 + tokens / 10))
    return Row(
        name=f"{tokens}-{merge}", tokens=tokens, dominant=tokens - 2, contextual=2, merge=merge,
        attention_kept=0.5, latency=latency, llm_tokens=tokens + 64,
        prefill_flops=tokens * 10**9, kv_bytes=tokens * 1024, **given,
    )  # fmt: skip


ROWS = [row(64), row(64, "sum", agreement=0.33), row(128), row(192)]


def test_of_what_must_be_kept_the_smallest_budget_is_advised() -> None:
    advice = advise(ROWS, SweepLimits(min_agreement=0.5))
    assert (advice.met, advice.row.name) == (True, "128-average")
    assert advice.text == (
        "128 tokens (126 + 2, average), the smallest with an agreement of 0.6400 (at least 0.5)"
    )
    assert (
        advise(ROWS, SweepLimits(min_agreement=0.3)).row.name == "64-sum"
    )  # keeps more than average
    asked = [row(64, accuracy=0.7), row(128, accuracy=0.8), row(192, accuracy=0.79)]
    assert advise(asked, SweepLimits(min_accuracy=0.75)).row.tokens == 128


def test_within_a_limit_of_cost_alone_the_one_that_keeps_most_is_advised() -> None:
    assert advise(ROWS, SweepLimits(max_latency_ms=25)).row.tokens == 128
    assert advise(ROWS, SweepLimits(max_prefill_gflops=100)).row.name == "64-sum"
    both = SweepLimits(max_latency_ms=25, max_prefill_gflops=1000, min_agreement=0.1)
    assert advise(ROWS, both).row.name == "64-sum"


def test_what_differs_by_less_than_the_measurement_can_tell_counts_as_equal() -> None:
    close = [row(64, agreement=0.9991), row(64, "sum", agreement=0.9993),
             row(128, agreement=0.9994)]  # fmt: skip
    assert advise(close, SweepLimits(min_agreement=0.99)).row.name == "64-average"
    assert advise(close, SweepLimits(max_latency_ms=50)).row.name == "64-average"
    asked = [row(64, accuracy=0.811), row(64, "sum", accuracy=0.813), row(128, accuracy=0.83)]
    assert advise(asked, SweepLimits(min_accuracy=0.8)).row.name == "64-average"
    assert advise(asked, SweepLimits(max_latency_ms=50)).row.name == "128-average"


def test_where_none_meets_the_limits_the_nearest_is_named() -> None:
    advice = advise(ROWS, SweepLimits(max_latency_ms=17.0, min_agreement=0.6))
    # 64 misses the agreement by 82 %, 128 the latency by 34 %, 192 by 72 %.
    assert (advice.met, advice.row.name) == (False, "128-average")
    assert advice.text == (
        "none of the 4 has an agreement of at least 0.6, an encoder latency of at most 17 ms; "
        "nearest is 128 tokens (126 + 2, average): an agreement of 0.6400 (at least 0.6), an "
        "encoder latency of 22.80 ms (at most 17)"
    )


@pytest.mark.parametrize("limits", [{"min_agreement": 1.2}, {"max_latency_ms": 0.0},
                                    {"min_accuracy": float("nan")}])  # fmt: skip
def test_limits_that_mean_nothing_are_refused(limits: dict[str, float]) -> None:
    ((name, value),) = limits.items()
    with refused(InvalidInputError, got=f"--{name.replace('_', '-')} {value:g}"):
        SweepLimits(**limits)


# The demo's questions


def test_the_demo_answers_with_an_encoders_tokens_as_with_its_own() -> None:
    asked = DemoQuestions(seed=5, scenes=4)
    found = asked.compressed(Budget(36, 7))
    assert found.questions == asked.to_json()["questions"] > 4
    with torch.no_grad():
        everything = asked._model.model.multi_modal_projector(asked._encoded.hidden[:, 1:])
    assert asked.answered(everything.numpy()) == asked.uncompressed()
    assert asked.uncompressed().share > 0.5 > asked.answered(everything.numpy()[::-1]).share
    assert Accuracy(0.8, 400).error == pytest.approx(0.02)


# All of it


@pytest.fixture(scope="module")
def result(model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("results") / "sweep"
    options = {
        "--model": model, "--tokens": "32,6", "--merges": "average,sum", "--images": pictures,
        "--count": 3, "--text-tokens": 10, "--min-agreement": 0.0001, "-o": folder,
    }  # fmt: skip
    assert main(["sweep", *(str(each) for pair in options.items() for each in pair)]) == 0
    return folder


@pytest.mark.slow
def test_a_sweep_writes_what_it_measured(result: Path) -> None:
    found = json.loads((result / "sweep.json").read_text())
    assert sorted(path.name for path in result.iterdir()) == [
        "sweep.json", "sweep.md", "sweep.png", "sweep.svg",
    ]  # fmt: skip
    assert [each["name"] for each in found["rows"]] == [
        "6-average", "6-sum", "32-average", "32-sum",
    ]  # fmt: skip
    assert (found["images"], found["unit"], found["units"], found["patches"]) == (3, "image", 1, 64)
    small, large, everything = found["rows"][0], found["rows"][2], found["everything"]
    assert (small["dominant"], small["contextual"], large["dominant"]) == (5, 1, 27)
    assert 0 < small["agreement"] < large["agreement"] < everything["agreement"] == 1
    assert 0 < small["attention_kept"] < large["attention_kept"] < 1
    n = 10 + 32
    assert large["llm_tokens"] == n
    assert large["prefill_flops"] == 2 * (4 * n * 48**2 + 2 * n**2 * 48 + 2 * n * 48 * 64)
    assert large["kv_bytes"] == 2 * 2 * 4 * 12 * 2 * n
    assert large["latency"]["calls"] == everything["latency"]["calls"] >= timing.LEAST
    assert 0 < large["latency"]["min_ms"] <= large["latency"]["median_ms"]
    assert found["advice"]["met"] is True
    assert found["questions"] is None


@pytest.mark.slow
def test_the_table_has_every_row_and_the_advice(result: Path) -> None:
    text, found = (result / "sweep.md").read_text(), json.loads((result / "sweep.json").read_text())
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + 1 + 4
    assert len({line.count("|") for line in lines}) == 1
    for line, each in zip(lines[2:], found["rows"], strict=True):
        assert f"| {each['agreement']:.4f} |" in line
        assert f"| {each['dominant']} + {each['contextual']} | {each['merge']} |" in line
    assert f"**Recommended**: {found['advice']['text']}" in text
    assert "accuracy" not in text


def test_the_plot_shows_the_rows_and_is_the_same_again(result: Path) -> None:
    svg = (result / "sweep.svg").read_text()
    for word in ("encoder latency, measured", "LLM prefill, predicted", "all 64 tokens"):
        assert f"<!-- {word}" in svg
    assert (result / "sweep.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    record = a_sweep()
    assert plot(record, None, "svg") == plot(record, None, "svg")


def a_sweep(**change: Any) -> Sweep:
    shape = LlmShape("llama", 2, 48, 64, 4, 12, "float16", dtype_assumed=True)
    everything = dataclasses.replace(
        row(576, agreement=1.0), dominant=None, contextual=None, merge=None
    )
    values: dict[str, Any] = {
        "model": "owner/na$me`|", "revision": None, "images": 2, "source": "somewhere",
        "unit": "tile", "units": 5, "patches": 576, "text_tokens": 64, "llm": shape,
        "questions": None, "everything": everything, "rows": tuple(ROWS),
        "machine": {
            "packages": {"onnxruntime": "1"}, "cores": 2, "system": "x", "state": {"load": 1},
        },
    }  # fmt: skip
    return Sweep(**{**values, **change})


def test_a_table_says_what_is_assumed_and_counted() -> None:
    text = table(a_sweep(), advise(ROWS, SweepLimits(min_agreement=1.0)))
    assert "# Budgets of `owner/na$me'|`\n" in text
    assert "KV cache in float16 (assumed), predicted" in text
    assert "| tokens per tile, 5 tiles |" in text
    assert "**No budget meets it**: none of the 4 has an agreement of at least 1;" in text
    assert size(3 * 2**30) == "3.0 GiB"


@pytest.mark.slow
def test_no_budget_that_meets_the_limits_is_exit_status_1_and_no_matplotlib_no_plot(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    arguments = ["--model", str(model), "--tokens", "6", "--images", str(pictures)]
    limit = ["--max-latency-ms", "1e-6"]
    assert main(["sweep", *arguments, *limit, "-o", str(tmp_path)]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.json", "sweep.md"]
    told = capsys.readouterr()
    assert told.out.splitlines()[-1].startswith("none of the 1 has an encoder latency of at most")
    assert "no plot will be drawn: the plot of a sweep needs the package 'matplotlib'" in told.err
    assert "pip install 'vzip[report]'" in told.err


@pytest.mark.parametrize(("family", "unit", "units"), [
    ("llava-next", "tile", 5), ("llava-siglip", "image", 1),
    pytest.param("video-llava", "frame", 8, marks=pytest.mark.slow),
    pytest.param("llava-onevision", "tile", None, marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.slow
def test_other_families_are_swept_by_the_unit_they_see(
    family: str, unit: str, units: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layout("llava-hf-single", tmp_path, family=family)
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    cls_token = family not in ("llava-siglip", "llava-onevision")
    found = measure(
        str(tmp_path), [Budget(5, 1, cls_token)],
        [("china", lambda: reference_images()[0])], revision=None, source="one",
        text_tokens=3, step=lambda _: None,
    )  # fmt: skip
    assert found.unit == unit
    assert found.units > 1 if units is None else found.units == units
    assert found.rows[0].llm_tokens == 3 + found.units * 6
    assert found.everything.llm_tokens == 3 + found.units * found.patches
    assert 0 < found.rows[0].agreement < 1


@pytest.mark.parametrize(("arguments", "message"), [
    (["--tokens", "6", "--min-accuracy", "0.5"], "--min-agreement"),
    (["--tokens", "65"], "at most 64"),
    (["--tokens", "6", "--text-tokens", "-1"], "text_tokens (--text-tokens) is -1"),
    (["--tokens", "6", "--images", "nowhere"], "'nowhere'"),
    (["--tokens", "6,x"], "'6,x'"),
    (["--tokens", "6", "--merges", "mean"], "'mean'"),
])  # fmt: skip
def test_what_can_not_be_swept_is_said_at_once(
    model: Path, arguments: list[str], message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(["sweep", "--model", str(model), *arguments, "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_to_sweep_is_an_error(model: Path) -> None:
    with refused(InvalidInputError, got="tokens", expected="--tokens"):
        sweep(str(model), [])
    with refused(InvalidInputError, got="merges", expected="--merges"):
        sweep(str(model), [6], merges=[])
