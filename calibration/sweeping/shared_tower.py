"""Encoders of several budgets that share one tower: its graph, and a small one behind for each.

The tower is traced, held in memory and, for what is compared, run once for all budgets. An
encoder's latency is that of both graphs, one after the other: what lies between them is copied
once, a few megabytes, which is nothing beside the tower's work.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx_ir.passes import common
from torch import Tensor, nn

from vzip.export.algorithm.budget import Budget
from vzip.export.checkpoint.weights import VisionWeights
from vzip.export.graph import passes
from vzip.export.graph.trace import quiet_exporter, save
from vzip.export.graph.traced import Encoder
from vzip.runtime.backends.onnxruntime import open_session
from vzip.runtime.backends.packages import import_onnxruntime
from vzip.runtime.bundle.manifest import MODEL_FILE
from vzip.runtime.console import progress
from vzip.runtime.errors import BackendError

Array = NDArray[Any]

_FEATURES = ("features", "keys", "scores")

ALL = "all"
"""Name of the encoder that compresses nothing."""


@dataclass(frozen=True)
class Seen:
    """What one image became.

    Attributes:
        everything: float32 [N, L], the embeddings of all patches, in raster order.
        scores: float32 [N], by which patches are kept.
        embeds: Budget's name → float32 [K, L].
        weights: Budget's name → float32 [K, S], weight of tower token s in output token k.
    """

    everything: Array
    scores: Array
    embeds: dict[str, Array]
    weights: dict[str, Array]


class _Tower(nn.Module):
    """uint8 [1, H, W, 3] → what a tail takes: features, keys and scores."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the tower."""
        features, signals = self.encoder.look(image)
        return features, signals.keys, signals.attention_scores()


class _Tail(nn.Module):
    """Select, merge and project as one budget asks."""

    def __init__(self, encoder: Encoder, budget: Budget) -> None:
        super().__init__()
        self.encoder = encoder
        self.budget = budget

    def forward(self, features: Tensor, keys: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """[1, tower tokens, F], [1, H, S, d] and [1, N] → [1, K, L] and [1, K, S]."""
        signals = self.encoder.signals(features, keys, lambda: scores)
        embeds, *_, weights = self.encoder.compress(features, signals, self.budget)
        return embeds, weights


class _Everything(nn.Module):
    """Project all patches, as the uncompressed model does."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, features: Tensor) -> Tensor:
        """[1, tower tokens, F] → [1, N, L]."""
        encoder = self.encoder
        if encoder.pooling is None:
            projected: Tensor = encoder.projector(features[:, int(encoder.cls_token) :])
            return projected
        return torch.matmul(encoder.pooling, encoder.projector(features))


class SweepSession:
    """The graphs, opened; see `open_sweep`.

    Attributes:
        budgets: What there is beside `ALL`.
    """

    def __init__(self, tower: Any, tails: Mapping[str, Any], budgets: Sequence[Budget]) -> None:
        self.budgets = tuple(budgets)
        self._tower, self._tails = tower, tails

    def see(self, image: Array) -> Seen:
        """Run the tower once, and every budget's tail behind it.

        Args:
            image: uint8 [H, W, 3], as the tower takes it.

        Raises:
            BackendError: A number isn't finite.
        """
        features = self._features(image[None])
        tails = {each.name: self._tail(each.name, features) for each in self.budgets}
        seen = Seen(
            self._tail(ALL, features)[0][0],
            features["scores"][0],
            {name: outputs[0][0] for name, outputs in tails.items()},
            {name: outputs[1][0] for name, outputs in tails.items()},
        )
        for value in (seen.everything, seen.scores, *seen.embeds.values()):
            if not np.isfinite(value).all():
                raise BackendError(
                    f"onnxruntime gave {int((~np.isfinite(value)).sum())} numbers that are NaN "
                    "or infinite",
                    expected="finite ones",
                    cause="the checkpoint's weights are damaged, or overflow in FP32",
                )
        return seen

    def encode(self, name: str, image: Array) -> Array:
        """Run the encoder of one budget, or of `ALL`.

        Args:
            name: `Budget.name`, or `ALL`.
            image: uint8 [1, H, W, 3].

        Returns:
            float32 [1, K, L].
        """
        return self._tail(name, self._features(image))[0]

    def _features(self, image: Array) -> dict[str, Array]:
        return dict(zip(_FEATURES, self._tower.run(_FEATURES, {"image": image}), strict=True))

    def _tail(self, name: str, features: Mapping[str, Array]) -> list[Array]:
        tail = self._tails[name]
        names = [each.name for each in tail.get_inputs()]
        outputs: list[Array] = tail.run(None, {each: features[each] for each in names})
        return outputs


def open_sweep(weights: VisionWeights, budgets: Sequence[Budget]) -> SweepSession:
    """Trace the graphs and open them on the CPU; no file of them stays.

    Args:
        weights: Of the model; each budget fits its tower.
        budgets: At least one.

    Raises:
        BackendError: ONNX Runtime can't open a graph.
    """
    onnxruntime = import_onnxruntime("vzip sweep", "cpu")
    config = weights.config
    encoder = Encoder(
        config,
        weights.tensors,
        budget=budgets[0],
        graph_input="image",
        dtype=torch.float32,
    )
    side = config.tower.image_size
    image = torch.zeros((1, side, side, 3), dtype=torch.uint8)
    with torch.no_grad():
        features = _Tower(encoder)(image)

    def opened(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> Any:
        # Gone as soon as the session has read it: a tower is a gigabyte.
        with tempfile.TemporaryDirectory(prefix="vzip-sweep-") as name:
            folder = Path(name)
            _trace(module, inputs, outputs, folder)
            return open_session(
                onnxruntime,
                (folder / MODEL_FILE).read_bytes,
                folder,
                name="vzip sweep",
                providers=("CPUExecutionProvider",),
                extra="cpu",
            )

    between = dict(zip(_FEATURES, features, strict=True))
    tower = opened(_Tower(encoder), {"image": image}, _FEATURES)
    tails = {ALL: opened(_Everything(encoder), {"features": features[0]}, ["embeds"])}
    for each in progress(budgets, desc="tracing"):
        tails[each.name] = opened(_Tail(encoder, each), between, ["embeds", "weights"])
    return SweepSession(tower, tails, budgets)


def _trace(
    module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], folder: Path
) -> None:
    """Write a module's graph, with the weights that it uses and no others."""
    with quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            dynamo=True,
            opset_version=18,
            input_names=list(inputs),
            output_names=list(outputs),
            optimize=True,
            verbose=False,
        )
    assert program is not None
    model = passes.PlainReshape()(program.model).model
    save(common.RemoveUnusedNodesPass()(model).model, folder)
