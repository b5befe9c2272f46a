"""The traced module again, from the graph of a bundle: what `trace` does, backwards.

The graph's own weights go into it. Their shapes say most of the sizes, the manifest says the
selection and what lies before the tower, and a few nodes say the rest.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from vzip.export.algorithm.budget import Budget
from vzip.export.architecture import (
    ProjectorConfig,
    TowerActivation,
    TowerConfig,
    VisionConfig,
    tensor_shapes,
)
from vzip.export.graph.traced import Encoder
from vzip.runtime.bundle.manifest import Manifest
from vzip.runtime.wording import counted

# What the module makes of the manifest, so that a graph need not hold it under a name.
_MADE = frozenset({"embedding.scale", "embedding.shift", "embedding.brighter", "pooling"})
_PARAMETER = re.compile(
    r"embedding\.(kernel|bias|positions)|(pre_norm|projector\.\w+|layers\.\d+\.\w+)\.(weight|bias)"
)
_QUANTISED = ".weight.quantised"
_LARGEST = {torch.int8: (-128.0, 127.0), torch.float8_e4m3fn: (-448.0, 448.0)}


class ForeignGraphError(Exception):
    """A graph that the module can't be made from, with what differs."""


def rebuild(manifest: Manifest, graph: ir.Graph) -> Encoder:
    """Return the module that a graph was traced from, with the graph's weights.

    Args:
        manifest: Of the bundle.
        graph: Its own graph, whose layers share nothing (`vzip.export.graph.unshared`), or one that
            `vzip calibrate` quantised: the module then rounds the inputs of the same linear layers,
            and its weights are those that were rounded.

    Returns:
        The module on the CPU. It shares its weights' memory with the bundle's file, which must not
        be written to.

    Raises:
        ForeignGraphError: The graph isn't one that `vzip export` or `vzip calibrate` writes.
    """
    _check_interface(manifest, graph)
    state = {
        name: _tensor(value)
        for name, value in graph.initializers.items()
        if _PARAMETER.fullmatch(name)
    }
    steps = _dequantise(graph, state)
    layers = sum(re.fullmatch(r"layers\.\d+\.fc1\.weight", name) is not None for name in state)
    norms = _norms(manifest, graph, layers)
    config = _config(manifest, graph, state, norms, layers)
    wide = torch.float16 if manifest.precision == "fp16" else torch.float32
    encoder = Encoder(
        config,
        _Sizes(config),
        budget=Budget.of(manifest.selection),
        graph_input="image" if manifest.input.name == "image" else "pixel_values",
        dtype=wide,
    )
    wanted = encoder.state_dict()
    if others := sorted(set(state) - set(wanted)):
        raise ForeignGraphError(f"the module has no {others[0]}")
    for name, parameter in wanted.items():
        if (got := state.get(name)) is None:
            if name not in _MADE:
                raise ForeignGraphError(f"it has no {name}")
        elif (got.dtype, got.shape) != (parameter.dtype, parameter.shape):
            expected = f"{parameter.dtype} {list(parameter.shape)}"
            raise ForeignGraphError(f"{name} is {got.dtype} {list(got.shape)}, not {expected}")
    encoder.load_state_dict(state, strict=False, assign=True)
    for name, (step, dtype) in steps.items():
        _round_input(encoder.get_submodule(name), step, dtype)
    return encoder.eval()


class _Sizes(dict[str, Tensor]):
    """Weights without numbers. Those of the embedding are computed with, and are zeros."""

    def __init__(self, config: VisionConfig) -> None:
        for name, shape in tensor_shapes(config).items():
            embedding = name.startswith("tower.embeddings.")
            self[name] = torch.zeros(shape) if embedding else torch.empty(shape, device="meta")


def _check_interface(manifest: Manifest, graph: ir.Graph) -> None:
    """Refuse a graph whose inputs and outputs aren't the manifest's."""
    said = (*manifest.inputs, *manifest.outputs)
    for value, tensor in zip((*graph.inputs, *graph.outputs), said, strict=False):
        shape = tuple(x if isinstance(x, int) else "batch" for x in value.shape or ())
        dtype = None if value.dtype is None else value.dtype.numpy()
        if (value.name, dtype, shape) != (tensor.name, np.dtype(tensor.dtype), tensor.shape):
            raise ForeignGraphError(f"{value.name} is {dtype} {list(shape)}, not {tensor}")


def _tensor(value: ir.Value | None) -> Tensor:
    """Return the numbers of an initializer, in its own memory where that can be."""
    constant = None if value is None else value.const_value
    if value is None or constant is None:
        raise ForeignGraphError(f"{value and value.name} is no weight")
    array = np.require(constant.numpy(), requirements="A")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file is mapped read-only, and nothing writes to it
        if array.dtype.name == "float8_e4m3fn":  # onnx's type, which PyTorch doesn't know
            return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
        return torch.from_numpy(array)


def _dequantise(graph: ir.Graph, state: dict[str, Tensor]) -> dict[str, tuple[Tensor, torch.dtype]]:
    """Put the weights that quantised linear layers compute with into `state`.

    Returns:
        Name of a linear layer → the step of its input, and what that is rounded to.
    """
    steps = {}
    weights = graph.initializers
    for name in [name for name in weights if name.endswith(_QUANTISED)]:
        stem = name.removesuffix(_QUANTISED)  # such as layers.0.fc1, or layers.0.qkv
        small, scale = _tensor(weights[name]), _tensor(weights[f"{stem}.weight.scale"])
        wide = small.to(scale.dtype) * scale
        bias = _tensor(weights[f"{stem}.bias"]).flatten() if f"{stem}.bias" in weights else None
        state.pop(f"{stem}.bias", None)
        layers = [stem]
        if stem.endswith(".qkv"):
            layers = [f"{stem.removesuffix('qkv')}{part}" for part in "qkv"]
        width = wide.shape[1] // len(layers)
        for place, layer in enumerate(layers):
            columns = slice(place * width, (place + 1) * width)
            state[f"{layer}.weight"] = wide[:, columns].contiguous()
            if bias is not None:
                state[f"{layer}.bias"] = bias[columns].contiguous()
            steps[layer] = _tensor(weights[f"{stem}.input.scale"]), small.dtype
    return steps


def _round_input(linear: nn.Module, step: Tensor, dtype: torch.dtype) -> None:
    """Let a linear layer see what QuantizeLinear and DequantizeLinear make of its input."""
    low, high = _LARGEST[dtype]
    linear.register_buffer("step", step, persistent=False)

    def rounded(module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        x: Tensor = inputs[0]
        held: Tensor = module.step  # type: ignore[assignment] # a buffer
        scaled = x / held
        if dtype == torch.int8:
            return scaled.round().clamp(low, high) * held
        # PyTorch doesn't promise to saturate.
        return scaled.float().clamp(low, high).to(dtype).to(scaled.dtype) * held

    linear.register_forward_pre_hook(rounded)


def _norms(manifest: Manifest, graph: ir.Graph, layers: int) -> dict[str, ir.Node]:
    """Return the name of every LayerNorm → its node; they run in the module's order."""
    nodes = [node for node in graph if node.op_type == "LayerNormalization"]
    names = ["pre_norm"] if manifest.tower.cls_token else []
    names += [f"layers.{index}.{name}" for index in range(layers) for name in ("norm1", "norm2")]
    if not layers or len(nodes) not in {len(names), len(names) + 1}:
        raise ForeignGraphError(
            f"it has {len(nodes)} LayerNormalization and {counted(layers, 'layer')}"
        )
    return dict(zip([*names, "projector.norm"], nodes, strict=False))


def _config(
    manifest: Manifest,
    graph: ir.Graph,
    state: Mapping[str, Tensor],
    norms: Mapping[str, ir.Node],
    layers: int,
) -> VisionConfig:
    """Return the architecture."""
    for name in ("layers.0.fc1.weight", "projector.linear_1.weight", "projector.linear_2.weight"):
        if name not in state:
            raise ForeignGraphError(f"it has no {name}")
    width, inner = state["layers.0.fc1.weight"].shape
    features, hidden = state["projector.linear_1.weight"].shape
    attention = next((node for node in graph if node.op_type == "Softmax"), None)
    shape = None if attention is None else attention.outputs[0].shape
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int):
        raise ForeignGraphError("its attention isn't [batch, heads, tokens, tokens]")
    tower = manifest.tower
    epsilon = norms["layers.0.norm1"].attributes["epsilon"].as_float()
    last = norms.get("projector.norm")
    return VisionConfig(
        family=manifest.model.family,
        tower=TowerConfig(
            kind="clip" if tower.cls_token else "siglip",
            image_size=tower.image_size,
            patch_size=tower.patch_size,
            hidden_size=width,
            intermediate_size=inner,
            num_heads=shape[1],
            num_layers=layers,
            activation=_activation(graph, layers),
            layer_norm_eps=epsilon,
        ),
        projector=ProjectorConfig(
            in_features=features,
            hidden_features=hidden,
            out_features=manifest.llm.hidden_size,
            activation="gelu",
            bias="projector.linear_1.bias" in state,
            norm_eps=None if last is None else last.attributes["epsilon"].as_float(),
        ),
        feature_layers=_states(graph, layers, features, width, norms),
        image_token_id=manifest.llm.image_token_id,
        preprocessing=manifest.preprocessing,
        pool=2 if tower.pool == 2 else 1,
        tiling=manifest.tiling,
    )


def _activation(graph: ir.Graph, layers: int) -> TowerActivation:
    """Return the activation of the tower's layers; the projector has one GELU by Erf."""
    operators = Counter(node.op_type for node in graph)
    found = (operators["Sigmoid"], operators["Tanh"], operators["Erf"] - 1)
    names: dict[tuple[int, int, int], TowerActivation] = {
        (layers, 0, 0): "quick_gelu",
        (0, layers, 0): "gelu_pytorch_tanh",
        (0, 0, layers): "gelu",
    }
    if found not in names:
        raise ForeignGraphError("its layers don't share an activation that is known")
    return names[found]


def _states(
    graph: ir.Graph, layers: int, features: int, width: int, norms: Mapping[str, ir.Node]
) -> tuple[int, ...]:
    """Return which layers' outputs the projector takes, side by side."""
    if features == width:
        return (layers,)
    entering = {norms[f"layers.{index}.norm1"].inputs[0]: index for index in range(1, layers)}
    for node in graph:
        shape = node.outputs[0].shape
        if node.op_type == "Concat" and shape is not None and shape[-1] == features:
            return tuple(entering.get(value, layers) for value in node.inputs)
    raise ForeignGraphError(f"its projector takes {features} numbers of a tower of {width}")
