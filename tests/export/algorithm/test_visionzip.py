from __future__ import annotations

import functools
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from tests.places import GOLDEN
from tests.refusals import refused
from vzip.export.algorithm.budget import Budget, Merge, split_tokens
from vzip.export.algorithm.visionzip import (
    Plan,
    apply_plan,
    cls_scores,
    compress,
    make_plan,
    received_scores,
)
from vzip.runtime.backends.packages import import_onnxruntime
from vzip.runtime.errors import BudgetError, InvalidInputError

VECTORS = GOLDEN / "conformance" / "visionzip.npz"
MERGES: tuple[Merge, ...] = ("average", "sum")
TOLERANCE = 1e-5  # of the largest magnitude, as shared with the vectors


def vectors() -> Iterator[tuple[str, dict[str, Any]]]:
    with np.load(VECTORS, allow_pickle=False) as file:
        for name, entry in json.loads(str(file["meta"])).items():
            arrays = {key.split("/")[1]: file[key] for key in file.files if f"{name}/" in key}
            yield name, entry | arrays


CONFORMANCE = dict(vectors())
NAMES = tuple(CONFORMANCE)


def tensors_of(vector: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    hidden, keys, attention = (vector[name] for name in ("hidden", "keys", "cls_attention"))
    return torch.from_numpy(hidden), torch.from_numpy(keys), torch.from_numpy(attention)


def assert_conforms(tokens: Any, kept: Any, vector: dict[str, Any], merge: str) -> None:
    np.testing.assert_array_equal(kept, vector["kept"])
    expected = vector[f"tokens_{merge}"]
    assert tokens.shape == expected.shape
    assert np.abs(tokens - expected).max() <= TOLERANCE * np.abs(expected).max()


class Compress(nn.Module):
    """Both merges of several budgets, so that one trace serves all vectors of one shape."""

    def __init__(self, budgets: Sequence[tuple[int, int]], *, cls_token: bool = True) -> None:
        super().__init__()
        self.budgets, self.cls_token = budgets, cls_token
        self.names = [
            f"{what}_{merge}_{dominant}_{contextual}"
            for dominant, contextual in budgets
            for merge in MERGES
            for what in ("tokens", "kept")
        ]

    def forward(self, hidden: Tensor, keys: Tensor, attention: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            output
            for dominant, contextual in self.budgets
            for merge in MERGES
            for output in compress(
                hidden,
                keys,
                attention,
                dominant=dominant,
                contextual=contextual,
                merge=merge,
                cls_token=self.cls_token,
            )
        )


def traced(module: Compress, inputs: tuple[Tensor, ...]) -> onnx.ModelProto:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(),
                inputs,
                dynamo=True,
                opset_version=18,
                input_names=["hidden", "keys", "attention"],
                output_names=module.names,
                optimize=True,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    return program.model_proto


def run(model: onnx.ModelProto, inputs: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
    onnxruntime = import_onnxruntime("this test", "cpu")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [each.name for each in session.get_inputs()]
    feeds = dict(zip(names, (each.numpy() for each in inputs), strict=True))
    outputs = [each.name for each in session.get_outputs()]
    return dict(zip(outputs, session.run(None, feeds), strict=True))


# The published code's own results


def test_there_are_vectors_of_every_kind() -> None:
    assert len(NAMES) == 21
    assert {vector["kind"] for vector in CONFORMANCE.values()} == {"normal", "cluster", "sink"}


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("name", NAMES)
def test_conforms_eagerly(name: str, merge: Merge) -> None:
    vector = CONFORMANCE[name]
    tokens, kept = compress(
        *tensors_of(vector),
        dominant=vector["dominant"],
        contextual=vector["contextual"],
        merge=merge,
    )
    assert kept.dtype == torch.int64
    assert_conforms(tokens.numpy(), kept.numpy(), vector, merge)


def shapes(vector: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
    return tuple(tensor.shape for tensor in tensors_of(vector))


def budget_of(vector: dict[str, Any]) -> tuple[int, int]:
    return vector["dominant"], vector["contextual"]


@functools.cache
def conformance_graph(wanted: tuple[tuple[int, ...], ...]) -> onnx.ModelProto:
    """Return the graph with every budget that the vectors of these shapes have."""
    alike = [vector for vector in CONFORMANCE.values() if shapes(vector) == wanted]
    budgets = sorted({budget_of(vector) for vector in alike})
    return traced(Compress(budgets), tuple(torch.zeros(shape) for shape in wanted))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_conforms_as_an_onnx_graph(name: str) -> None:
    vector = CONFORMANCE[name]
    model = conformance_graph(shapes(vector))
    assert not {node.op_type for node in model.graph.node} & {"NonZero", "Loop", "If", "Where"}
    got = run(model, tensors_of(vector))
    for merge in MERGES:
        tail = "{}_{}_{}".format(merge, *budget_of(vector))
        assert_conforms(got[f"tokens_{tail}"], got[f"kept_{tail}"], vector, merge)


@functools.cache
def tie_graph(cls_token: bool) -> onnx.ModelProto:
    """Return the graph for the next test's shapes."""
    inputs = torch.zeros(2, 50, 8), torch.zeros(2, 4, 50, 16), torch.zeros(2, 4, 50)
    return traced(Compress([(9, 6)], cls_token=cls_token), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("cls_token", [True, False], ids=["cls", "patches"])
@pytest.mark.parametrize("kind", ["constant", "quantised", "duplicated keys", "zero keys"])
def test_ties_are_the_same_in_the_graph(kind: str, cls_token: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 50, 8, generator=generator)
    keys = torch.randn(2, 4, 50, 16, generator=generator)
    attention = torch.rand(2, 4, 50, generator=generator)
    if kind == "constant":
        attention = torch.full_like(attention, 0.02)
    elif kind == "quantised":
        attention = (attention * 4).floor() / 128
    elif kind == "duplicated keys":
        keys = keys[:, :, :3].repeat(1, 1, 17, 1)[:, :, :50]
    else:
        keys = torch.zeros_like(keys)
    module = Compress([(9, 6)], cls_token=cls_token)
    got = run(tie_graph(cls_token), (hidden, keys, attention))
    for output, eager in zip(module.names, module(hidden, keys, attention), strict=True):
        np.testing.assert_allclose(got[output], eager.numpy(), rtol=0, atol=1e-5)
        if output.startswith("kept"):
            np.testing.assert_array_equal(got[output], eager.numpy())
    if kind == "constant":  # the lower index wins
        first = 0 if cls_token else 1
        assert got["kept_sum_9_6"].tolist() == [list(range(first, first + 9))] * 2


# Plans


def example(
    batch: int = 2, tokens: int = 26, *, cls: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Return features [B, S, 5], keys [B, 3, S, 4] and scores [B, N]."""
    generator = torch.Generator().manual_seed(tokens)
    features = torch.randn(batch, tokens, 5, generator=generator).to(dtype)
    keys = torch.randn(batch, 3, tokens, 4, generator=generator).to(dtype)
    scores = torch.rand(batch, tokens - 1 if cls else tokens, generator=generator)
    return features, keys, scores


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize(
    ("cls", "cls_token"), [(True, True), (True, False), (False, False)], ids=str
)
def test_rows_of_a_plan(cls: bool, cls_token: bool, merge: Merge) -> None:
    _, keys, scores = example(cls=cls)
    plan = make_plan(scores, keys, Budget(7, 4, cls_token, merge=merge))
    weights = plan.token_weights
    assert weights.shape == (2, 11, 26)
    assert weights.dtype == torch.float32
    assert plan.kept.shape == (2, 7)
    assert bool((plan.kept.diff(dim=1) > 0).all())
    assert bool((plan.kept[:, 0] == 0).all()) or not cls_token
    assert bool((plan.kept > 0).all()) or cls_token or not cls

    one_hot = torch.nn.functional.one_hot(plan.kept, 26).float()
    assert torch.equal(weights[:, :7], one_hot)
    contextual = weights[:, 7:]
    used = (weights != 0).sum(dim=1)  # [B, S]
    dropped = [0] if cls and not cls_token else []
    assert used.tolist() == [[0 if s in dropped else 1 for s in range(26)] for _ in range(2)]
    if merge == "average":
        assert torch.allclose(contextual.sum(dim=-1), torch.ones(2, 4))
    else:  # the target, and the mean of what was merged
        merged = (contextual != 0).sum(dim=-1) > 1
        assert torch.allclose(contextual.sum(dim=-1), 1.0 + merged.float())
    # Targets: every (R // contextual)-th of the rest.
    for image in range(2):
        rest = [s for s in range(26) if s not in plan.kept[image].tolist() and s not in dropped]
        targets = rest[:: len(rest) // 4][:4]
        for number, target in enumerate(targets):
            assert contextual[image, number, target] > 0
            assert contextual[image, number, target] == contextual[image, number].max()


def test_images_of_a_batch_do_not_meet() -> None:
    features, keys, scores = example(batch=5)
    budget = Budget(6, 5)
    plan = make_plan(scores, keys, budget)
    tokens = apply_plan(plan, features)
    for image in range(5):
        alone = make_plan(scores[image : image + 1], keys[image : image + 1], budget)
        assert torch.equal(alone.kept[0], plan.kept[image])
        assert torch.equal(alone.token_weights[0], plan.token_weights[image])
        assert torch.allclose(apply_plan(alone, features[image : image + 1])[0], tokens[image])


def test_a_plan_applies_to_other_features_of_the_same_tokens() -> None:
    features, keys, scores = example()
    plan = make_plan(scores, keys, Budget(6, 5))
    index = torch.arange(26.0).reshape(1, 26, 1).repeat(2, 1, 1)
    tokens = apply_plan(plan, torch.cat([features, index], dim=2))
    assert tokens.shape == (2, 11, 6)
    assert torch.allclose(tokens[..., :5], apply_plan(plan, features))
    assert torch.equal(tokens[:, :6, 5].long(), plan.kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_features_keep_their_dtype_and_are_summed_in_fp32(dtype: torch.dtype) -> None:
    features, keys, scores = example()
    plan = make_plan(scores, keys, Budget(6, 5))
    narrow = features.to(dtype)
    tokens = apply_plan(plan, narrow)
    assert tokens.dtype == dtype
    assert torch.equal(tokens, apply_plan(plan, narrow.float()).to(dtype))
    kept = narrow.gather(1, plan.kept[..., None].expand(-1, -1, 5))
    assert torch.equal(tokens[:, :6], kept.float().to(dtype))


def test_a_sum_that_overflows_fp16_does_not_in_the_middle() -> None:
    _, keys, scores = example()
    plan = make_plan(scores, keys, Budget(6, 1))
    features = torch.full((2, 26, 5), 60000.0, dtype=torch.float16)
    assert torch.allclose(apply_plan(plan, features), features[:, :7])


@pytest.mark.parametrize("merge", MERGES)
def test_fp16_keys_and_attention_are_read_as_fp32(merge: Merge) -> None:
    features, keys, _ = example(dtype=torch.float16)
    attention = torch.rand(2, 3, 26, generator=torch.Generator().manual_seed(1)).half()
    half = compress(features, keys, attention, dominant=6, contextual=5, merge=merge)
    wide = compress(
        features.float(), keys.float(), attention.float(), dominant=6, contextual=5, merge=merge
    )
    assert half[0].dtype == torch.float16
    assert torch.equal(half[1], wide[1])
    assert torch.equal(half[0], wide[0].half())


def test_inputs_stay_as_they_are_and_gradients_flow() -> None:
    inputs = (*example()[:2], torch.rand(2, 3, 26))
    before = [tensor.clone() for tensor in inputs]
    hidden = inputs[0].requires_grad_()
    for merge in MERGES:
        for cls_token in (True, False):
            tokens, kept = compress(
                *inputs, dominant=6, contextual=5, merge=merge, cls_token=cls_token
            )
            again, kept_again = compress(
                *inputs, dominant=6, contextual=5, merge=merge, cls_token=cls_token
            )
            assert torch.equal(tokens, again)
            assert torch.equal(kept, kept_again)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    tokens.sum().backward()
    assert hidden.grad is not None
    assert bool((hidden.grad[:, 0] == 0).all())  # CLS was dropped in the last round
    assert bool((hidden.grad[:, 1:] != 0).any(dim=2).all())


def test_scores() -> None:
    attention = torch.rand(2, 3, 9, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(cls_scores(attention), attention.sum(dim=1)[:, 1:])
    full = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(received_scores(full), full.mean(dim=(1, 2)))
    assert cls_scores(attention.half()).dtype == torch.float32
    assert received_scores(full.half()).dtype == torch.float32


def test_cls_alone_is_a_selection() -> None:
    features, keys, scores = example()
    plan = make_plan(scores, keys, Budget(1, 5))
    assert plan.kept.tolist() == [[0], [0]]
    assert plan.kept.dtype == torch.int64
    assert torch.equal(apply_plan(plan, features)[:, :1], features[:, :1])


# Budgets


@pytest.mark.parametrize(
    ("tokens", "dominant", "contextual"),
    [
        (64, 54, 10),
        (128, 108, 20),
        (192, 162, 30),
        (32, 27, 5),
        (2, 1, 1),
        (3, 2, 1),
        (4, 3, 1),
        (5, 4, 1),
        (16, 14, 2),  # 13.5, half up
        (43, 36, 7),
        (320, 270, 50),
        (576, 486, 90),
    ],
)
def test_splits(tokens: int, dominant: int, contextual: int) -> None:
    assert split_tokens(tokens) == (dominant, contextual)


def test_splits_add_up_and_are_near_the_ratio() -> None:
    for tokens in range(2, 2000):
        dominant, contextual = split_tokens(tokens)
        assert dominant + contextual == tokens
        assert contextual >= 1
        assert tokens < 5 or abs(dominant - tokens * 27 / 32) <= 0.5


@pytest.mark.parametrize("tokens", [1, 0, -3, True, 64.0, "64"])
def test_no_number_of_tokens_to_split(tokens: Any) -> None:
    with refused(BudgetError, got=f"tokens is {tokens!r}", expected="at least 2"):
        split_tokens(tokens)


@pytest.mark.parametrize(
    ("name", "least", "value"),
    [
        ("dominant", 1, 0),
        *(("dominant", 1, value) for value in (-1, True, 2.0, "5", None)),
        *(("contextual", 0, value) for value in (-1, True, 2.0, "5", None)),
    ],
)
def test_budgets_that_are_none(name: str, least: int, value: Any) -> None:
    numbers: dict[str, Any] = {"dominant": 3, "contextual": 3, name: value}
    with refused(BudgetError, got=f"{name} is {value!r}", expected=f"at least {least}"):
        Budget(**numbers)
    features, keys, _ = example()
    with refused(BudgetError, got=f"{name} is {value!r}", expected=f"at least {least}"):
        compress(features, keys, torch.rand(2, 3, 26), **numbers)


@pytest.mark.parametrize(
    ("cls", "cls_token", "largest"), [(True, True, 25), (True, False, 24), (False, False, 25)]
)
def test_the_largest_budget_is_the_last_that_fits(cls: bool, cls_token: bool, largest: int) -> None:
    features, keys, scores = example(cls=cls)
    for contextual in (1, 9, largest - 1):
        fits = Budget(largest - contextual, contextual, cls_token)
        plan = make_plan(scores, keys, fits)
        assert apply_plan(plan, features).shape == (2, largest, 5)
        dominant = largest - contextual + 1
        with refused(
            BudgetError,
            got=f"dominant {dominant} + contextual {contextual} = {largest + 1}",
            expected=f"{largest + 1} tokens",
            cure=f"at most {largest}",
        ):
            make_plan(scores, keys, Budget(dominant, contextual, cls_token))


def test_cls_is_not_kept_where_there_is_none() -> None:
    _, keys, scores = example(cls=False)
    with refused(BudgetError, got="cls_token", expected="no CLS", cure="cls_token=False"):
        make_plan(scores, keys, Budget(3, 3))


# Shapes and options


def test_an_unknown_merge() -> None:
    _, keys, _ = example()
    bad: Any = "mean"
    with refused(InvalidInputError, got="'mean'", expected=("average", "sum")):
        Budget(3, 3, merge=bad)
    with refused(InvalidInputError, got="'mean'", expected=("average", "sum")):
        compress(
            torch.zeros(2, 26, 5),
            keys,
            torch.rand(2, 3, 26),
            dominant=3,
            contextual=3,
            merge=bad,
        )


@pytest.mark.parametrize("patches", [24, 27])
def test_scores_of_other_tokens(patches: int) -> None:
    with refused(InvalidInputError, got=(f"{patches} patches", "26 tokens"), expected="CLS"):
        make_plan(torch.rand(2, patches), example()[1], Budget(3, 3))


@pytest.mark.parametrize(
    ("hidden", "keys", "attention", "agree"),
    [
        ((26, 5), (2, 3, 26, 4), (2, 3, 26), None),
        ((2, 26, 5), (2, 26, 4), (2, 3, 26), None),
        ((2, 26, 5), (2, 3, 26, 4), (2, 3, 26, 26), None),
        ((2, 25, 5), (2, 3, 26, 4), (2, 3, 26), False),
        ((1, 26, 5), (2, 3, 26, 4), (2, 3, 26), False),
        ((2, 26, 5), (2, 3, 26, 4), (2, 4, 26), False),
        ((2, 26, 5), (2, 3, 26, 4), (2, 3, 25), False),
        ((2, 26, 5), (2, 3, 26, 4), (1, 3, 26), False),
    ],
)
def test_shapes_that_do_not_fit(
    hidden: tuple[int, ...], keys: tuple[int, ...], attention: tuple[int, ...], agree: bool | None
) -> None:
    shapes = (f"{hidden}", f"{keys}", f"{attention}", "" if agree is None else "don't agree")
    with refused(InvalidInputError, got=shapes, expected="hidden [B, S, D]"):
        compress(
            torch.zeros(hidden),
            torch.zeros(keys),
            torch.zeros(attention),
            dominant=3,
            contextual=3,
        )


def test_a_plan_says_what_rows_are_made_of_and_where_they_belong() -> None:
    assert Plan._fields == ("kept", "token_weights", "positions", "rank")
