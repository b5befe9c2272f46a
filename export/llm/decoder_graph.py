"""A language model of transformers as one ONNX graph that takes embeddings and a KV cache.

The modules are transformers' own; what is ours is their frame: the causal mask, and positions and
cache as plain inputs and outputs. The mask goes by order, the rotation by position. So one graph
serves a prompt on an empty cache, a later turn
on a filled one, and a single token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import Sequential, common

from vzip.export.graph import passes
from vzip.export.graph.trace import quiet_exporter
from vzip.runtime.errors import ExportError
from vzip.runtime.llm.llm_files import INPUT, LOGITS, POSITIONS, cache_names
from vzip.runtime.llm.local.transformers import cache_argument

OPSET = 18
"""TensorRT takes no part in this graph, so that it needs no older one."""


class Decoder(torch.nn.Module):
    """The language model of a LLaVA, with its cache as inputs and outputs.

    Args:
        model: A model of one of `vzip.runtime.llm.local.transformers.CLASSES`. Its attention
        becomes
            "eager", the one that takes any mask; weights are shared.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.set_attn_implementation("eager")
        self.decoder = model.get_decoder()
        self.cache_argument = cache_argument(self.decoder)
        self.head = model.get_output_embeddings()
        text = model.config.get_text_config()
        self.layers = int(text.num_hidden_layers)
        self.context = int(text.max_position_embeddings)
        attention = self.decoder.layers[0].self_attn
        self.head_size = int(attention.head_dim)
        self.kv_heads = attention.k_proj.out_features // self.head_size
        self.hidden_size = int(text.hidden_size)

    def forward(
        self, inputs_embeds: torch.Tensor, positions: torch.Tensor, past: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Return logits and the grown cache.

        Args:
            inputs_embeds: [1, n, L], n new tokens.
            positions: int64 [1, n], theirs.
            past: Keys and values of each layer, in turn, [1, heads, m, head size]: m earlier ones.

        Returns:
            Logits of the last token, float32 [1, V]; and keys and values [1, heads, m + n, head
            size].
        """
        new, old = inputs_embeds.shape[1], past[0].shape[2]
        order = torch.arange(new) + old  # [n]
        hidden = torch.arange(new + old)[None] > order[:, None]  # [n, m + n]
        lowest = torch.finfo(inputs_embeds.dtype).min
        mask = torch.where(hidden, lowest, 0.0).to(inputs_embeds.dtype)
        cache = _Cache(past)
        last = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=mask[None, None],  # [1, 1, n, m + n]
            position_ids=positions,
            **{self.cache_argument: cache},
            use_cache=True,
        ).last_hidden_state[:, -1]  # [1, L]
        return self.head(last).float(), *cache.parts


class _Cache:
    """What attention modules need of a cache of transformers, and nothing that can't be traced."""

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        self.parts = list(parts)  # keys and values of each layer, in turn

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return m, the tokens that are held."""
        return int(self.parts[2 * layer_idx].shape[2])

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a layer's new keys and values, [1, heads, n, head size], and return all."""
        both = self.parts[2 * layer : 2 * layer + 2]
        grown = [
            torch.cat([old, new], dim=2) for old, new in zip(both, (keys, values), strict=True)
        ]
        self.parts[2 * layer : 2 * layer + 2] = grown
        return grown[0], grown[1]


def trace(decoder: Decoder) -> ir.Model:
    """Trace a decoder into a finished ONNX graph.

    Args:
        decoder: On the CPU, in the precision of the graph. Its parameters are shared with the
            result until that is saved.

    Returns:
        The model with inputs `inputs_embeds`, `positions`, `past_key_0`, `past_value_0`, … and
        outputs `logits`, `present_key_0`, …; n and m are open, m may be 0.

    Raises:
        ExportError: torch can't trace it, or the graph breaks a promise of `docs/bundle.md`.
    """
    dtype = next(decoder.parameters()).dtype
    embeds = torch.zeros(1, 5, decoder.hidden_size, dtype=dtype)
    # A tensor each: one that stands twice is traced as one input.
    shape = (1, decoder.kv_heads, 3, decoder.head_size)
    past = [torch.zeros(shape, dtype=dtype) for _ in range(2 * decoder.layers)]
    new = torch.export.Dim("n", min=1, max=decoder.context)
    old = torch.export.Dim("m", min=0, max=decoder.context)
    names = cache_names(decoder.layers)
    try:
        with quiet_exporter(), torch.no_grad():
            program = torch.onnx.export(
                decoder.eval(),
                (embeds, torch.arange(5)[None], past),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT, POSITIONS, *(f"past_{name}" for name in names)],
                output_names=[LOGITS, *(f"present_{name}" for name in names)],
                dynamic_shapes=({1: new}, {1: new}, [{2: old}] * len(past)),
                optimize=True,
                verbose=False,
            )
        assert program is not None
        finish = Sequential(
            passes.Anonymise(),
            common.RemoveUnusedNodesPass(),
            LlmPromises(decoder.layers, half=dtype == torch.float16),
        )
        return finish(program.model).model
    except (torch.onnx.errors.OnnxExporterError, ir.passes.PassError) as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(
            f"the LLM can't be made into a graph: {cause}",
            cause=(
                f"most likely the installed torch {torch.__version__}, onnxscript or transformers "
                "differs from the versions in constraints.txt"
            ),
            cure="install those, leave out --with-llm, or report this",
        ) from error


class LlmPromises(ir.passes.InPlacePass):
    """No edit: check what `docs/bundle.md` promises of a language model's graph."""

    def __init__(self, layers: int, *, half: bool) -> None:
        self.names, self.layers, self.half = cache_names(layers), layers, half

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Leave the model as it is."""
        return ir.passes.PassResult(model, modified=False)

    def ensures(self, model: ir.Model) -> None:
        """Names, element types, opset, ONNX's own operators without control flow."""
        graph = model.graph
        inputs, outputs = ([value.name for value in each] for each in (graph.inputs, graph.outputs))
        if inputs != [INPUT, POSITIONS, *(f"past_{name}" for name in self.names)]:
            _fail(f"inputs are {inputs[:3]} …; expected {INPUT}, {POSITIONS}, past_key_0, …")
        if outputs != [LOGITS, *(f"present_{name}" for name in self.names)]:
            _fail(f"outputs are {outputs[:3]} …; expected {LOGITS}, present_key_0, …")
        element = ir.DataType.FLOAT16 if self.half else ir.DataType.FLOAT
        for value in (*graph.inputs, *list(graph.outputs)[1:]):
            if value.dtype != (ir.DataType.INT64 if value.name == POSITIONS else element):
                _fail(f"{value.name} is {value.dtype}; expected {element}")
        if dict(model.opset_imports) != {"": OPSET} or model.functions:
            _fail(f"opset imports are {dict(model.opset_imports)}; expected {OPSET} alone")
        for node in graph:
            if any(a.type in _GRAPHS for a in node.attributes.values()):
                _fail(f"{node.name}: {node.op_type} has a graph inside")
        softmaxes = sum(node.op_type == "Softmax" for node in graph)
        if softmaxes != self.layers:
            _fail(f"{softmaxes} Softmax; expected {self.layers}, one a layer")
        wide = [
            name
            for name, value in graph.initializers.items()
            if self.half and value.dtype == ir.DataType.FLOAT and name.endswith(".weight")
        ]
        if wide:
            _fail(f"weights {wide[:3]} are FP32 in an FP16 graph")


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _fail(message: str) -> None:
    raise ir.passes.PostconditionError(message)
