"""Which quantisation a checkpoint says it has: ``quantization_config`` and what stands for it.

The tensors themselves decide what is done with them (`vzip.export.checkpoint.dequantize`): most
configurations cover the LLM alone, and their lists of exceptions name modules as they were called
where they were written, if they have any. So a tower whose weights are whole is read as it is,
whatever the list says, and one that was quantised in spite of it is not taken for whole. What is
read here names the scheme and gives the sizes of blocks, which no tensor shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vzip.runtime.errors import CheckpointError, printable

Config = Mapping[str, Any]
Block = tuple[int, int]

_KEYS: Final = ("quantization_config", "compression_config", "quantization")
_PARTS: Final = ("text_config", "vision_config", "llm_config", "language_config")
SCALED: Final = "numbers beside their scales"
"""What is undone, where its parts fit each other."""

_FINE_GRAINED: Final[Block] = (128, 128)

# What only one scheme calls a tensor, after the module's name. First come those that others share
# a name with.
_SIGNS: Final[tuple[tuple[str, str], ...]] = (
    (r"(qzeros|qweight|g_idx|weight_g_idx)", "packed integers (AWQ or GPTQ)"),
    (r"(weight_packed|weight_shape)", "packed integers (compressed-tensors)"),
    (r"(weight_scale_2|weight_global_scale|input_global_scale)", "NVFP4"),
    (r"weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)", "bitsandbytes"),
    (r"(SCB|CB|weight_format)", "bitsandbytes INT8"),
    (r"(W_q|W_q_.*)", "HQQ"),
    (r"weight\._(data|scale|shift)", "quanto"),
    (r"(codes|codebooks)", "AQLM"),
    (r"_?weight_(qdata|qzeros)", "torchao"),
    (r"(weight_blocks|weight_scales|blocks|.*_blocks)", "MXFP4 or EETQ"),
    (r"(.*_quantizer(\..*)?|.*_amax|pre_quant_scale)", "ModelOpt"),
    (r"(bitmask|compressed|row_offsets|.*bitmask)", "sparse tensors (compressed-tensors)"),
    (r"(scales|biases)", "MLX"),
    (r"(weight_scale|weight_scale_inv|scale_weight|weight_zero_point)", SCALED),
)


@dataclass(frozen=True)
class Scheme:
    """What a checkpoint's configuration says of quantised weights.

    Attributes:
        name: Method and format, for people; empty where it says nothing.
        blocks: Rows and columns that share a scale, where the configuration names any. Without
            one they are 128 × 128, as in DeepSeek's layout.
        rotated: Whether weights are of a transformed model, which scales alone don't undo.
    """

    name: str = ""
    blocks: tuple[Block, ...] = ()
    rotated: bool = False

    def block(self, weight: tuple[int, ...], scale: tuple[int, ...]) -> Block | None:
        """Return rows and columns of the blocks of a matrix; None where nothing says it."""
        if len(scale) != 2:
            return None
        rows, columns = weight[0], weight[1]
        fitting = {
            (high, wide)
            for high, wide in self.blocks or (_FINE_GRAINED,)
            if (-(-rows // high), -(-columns // wide)) == scale
        }
        return next(iter(fitting)) if len(fitting) == 1 else None


NONE: Final = Scheme()
"""What says nothing."""


def read_scheme(config: Config, *others: Config | None) -> Scheme:
    """Read what a model's files say of quantisation.

    Args:
        config: Its ``config.json``.
        others: ``hf_quant_config.json`` of ModelOpt and the like, where there are any.

    Raises:
        CheckpointError: A size of blocks is no size.
    """
    found = [each for part in _parts(config) for each in _settings(part)]
    found += [each for other in others if other is not None for each in _settings(other)]
    names = dict.fromkeys(name for each in found if (name := _name(each)))
    blocks = dict.fromkeys(block for each in found for block in _blocks(each))
    return Scheme(
        ", ".join(names),
        tuple(blocks),
        rotated=any(bool(each.get("transform_config")) for each in found),
    )


def signs(leaves: Iterable[str]) -> str | None:
    """Return the scheme that names of a module's tensors are a sign of; None where they aren't.

    Args:
        leaves: What follows the module's name in the names of its tensors.
    """
    leaves = list(leaves)
    for pattern, name in _SIGNS:
        if any(re.fullmatch(pattern, leaf) for leaf in leaves):
            return name
    return None


def quantised(got: str, scheme: Scheme, sign: str | None, *, why: str = "") -> CheckpointError:
    """Return the error for weights of a scheme that isn't undone here.

    Args:
        got: The tensor and what it is.
        scheme: What the configuration says.
        sign: What the tensors' names say.
        why: What keeps these from being undone, where it isn't the scheme as a whole.
    """
    name = scheme.name or sign or "a scheme that its config.json doesn't name"
    return CheckpointError(
        f"{got}: the weight is quantised by {name}",
        expected=(
            "floating point of 16 bits or more, FP8 or INT8 beside its scales, or bitsandbytes' "
            "NF4 or FP4"
        ),
        cause=why or f"vzip doesn't undo {name}",
        cure=(
            "export from the checkpoint as it was before it was quantised: its tokens are made for "
            "this LLM too"
        ),
    )


def _parts(config: Config) -> Iterator[Config]:
    yield config
    for key in _PARTS:
        part = config.get(key)
        if isinstance(part, dict):
            yield part


def _settings(part: Config) -> Iterator[Config]:
    for key in _KEYS:
        settings = part.get(key)
        if isinstance(settings, dict):
            yield settings


def _name(settings: Config) -> str:
    method = settings.get("quant_method")
    if not method and "quant_algo" in settings:
        method = "modelopt"
    if not method and {"bits", "group_size"} <= set(settings):
        method = "MLX"
    details = [settings.get(key) for key in ("format", "quant_algo", "quant_type")]
    if settings.get("load_in_4bit"):
        details.append(settings.get("bnb_4bit_quant_type", "fp4"))
    if settings.get("load_in_8bit"):
        details.append("int8")
    if "bits" in settings:
        details.append(f"{settings['bits']} bits")
    words = [str(word) for word in (method, *details) if word]
    return printable(" ".join(dict.fromkeys(words)))[:80]


def _blocks(settings: Config) -> Iterator[Block]:
    """Yield the block sizes that settings name, whatever they call them."""
    if settings.get("quant_method") == "fp8":
        size = settings.get("weight_block_size", _FINE_GRAINED)
        if size is not None:
            yield _block("weight_block_size", size)
        return
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            continue
        if weights.get("block_structure") is not None:
            structure = weights["block_structure"]
            if isinstance(structure, str):  # "128x128", as earlier versions wrote it
                structure = [int(each) for each in re.findall(r"\d+", structure)]
            yield _block("block_structure", structure)
        if isinstance(weights.get("group_size"), int) and weights["group_size"] > 0:
            yield _block("group_size", (1, weights["group_size"]))


def _block(key: str, size: object) -> Block:
    sides = tuple(size) if isinstance(size, (list, tuple)) else ()
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise CheckpointError(
            f"the quantization_config has {key} = {size!r}",
            expected="two integers above 0, rows and columns",
            cure="compare config.json with the published one",
        )
    return sides[0], sides[1]
