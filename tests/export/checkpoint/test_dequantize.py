"""Quantised checkpoints: made whole as their own libraries do it, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.layouts import upstream_model, write_layout
from tests.refusals import Said, refused
from vzip.export.checkpoint.reader import Checkpoint, read_vision
from vzip.runtime.errors import CheckpointError

Tensors = dict[str, torch.Tensor]
Change = Callable[[str, torch.Tensor], Tensors]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FC1 = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
PROJECTOR = "multi_modal_projector.linear_1.weight"
NAME = {FC1: "tower.encoder.layers.0.mlp.fc1.weight", PROJECTOR: "projector.linear_1.weight"}
FILE = "model.safetensors"


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    return name.endswith(".weight") and tensor.ndim == 2 and "embed" not in name


def written(
    folder: Path,
    change: Change | Mapping[str, Tensors],
    settings: Mapping[str, Any] | None = None,
    *,
    key: str = "quantization_config",
    of: Callable[[str], bool] = lambda name: "lm_head" not in name,
) -> Path:
    """Write a tiny LLaVA whose linear layers were changed, and what says how they were."""
    config = {} if settings is None else {key: dict(settings)}
    write_layout("llava-hf-single", folder, llm="written", change=config)
    file = folder / FILE
    tensors = load_file(file)
    for name in [name for name, tensor in tensors.items() if is_linear(name, tensor)]:
        if callable(change):
            more = change(name, tensors[name]) if of(name) else {}
        else:
            more = change.get(name, {})
        if more and name not in more:
            del tensors[name]
        tensors |= more
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def read(folder: Path) -> Any:
    return read_vision(Checkpoint.open(folder))


def faulty(folder: Path, got: Said = (), **said: Said) -> None:
    with refused(CheckpointError, got=got, **said):
        read(folder)


def channels(
    dtype: torch.dtype, most: float, suffix: str = "_scale", shape: tuple[int, ...] = (-1, 1)
) -> Change:
    """One scale for each output channel."""

    def change(name: str, weight: torch.Tensor) -> Tensors:
        scale = weight.abs().amax(1, keepdim=True) / most
        numbers = weight / scale
        if not dtype.is_floating_point:
            numbers = numbers.round()
        return {name: numbers.to(dtype), name + suffix: scale.reshape(shape).contiguous()}

    return change


def blocks(size: int, suffix: str = "_scale_inv") -> Change:
    """One scale for each block; the last rows and columns may be fewer."""

    def change(name: str, weight: torch.Tensor) -> Tensors:
        rows, columns = weight.shape
        scale = torch.rand(-(-rows // size), -(-columns // size)) + 0.5
        wide = torch.from_numpy(np.kron(scale.numpy(), np.ones((size, size), np.float32)))
        return {name: (weight / wide[:rows, :columns]).to(E4M3), name + suffix: scale}

    return change


def groups(size: int) -> Change:
    """One scale for some numbers of a row that stand together."""

    def change(name: str, weight: torch.Tensor) -> Tensors:
        rows, columns = weight.shape
        scale = torch.rand(rows, columns // size) + 0.5
        numbers = weight.reshape(rows, -1, size) / scale[:, :, None]
        return {name: numbers.reshape(rows, columns).to(E4M3), name + "_scale": scale}

    return change


def compressed(kind: str, form: str, **weights: Any) -> dict[str, Any]:
    group = {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": group}},
    }


FINE_GRAINED = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [16, 16],
}


# The untouched library is the reference


@pytest.mark.parametrize(
    ("change", "settings", "name"),
    [
        (blocks(16), FINE_GRAINED, "fp8"),
        (
            channels(E4M3, 448),
            compressed("float", "float-quantized"),
            "compressed-tensors float-quantized",
        ),
        (
            channels(torch.int8, 127),
            compressed("int", "int-quantized"),
            "compressed-tensors int-quantized",
        ),
    ],
    ids=["fine-grained", "float-quantized", "int-quantized"],
)
def test_weights_are_those_of_transformers_own_loading(
    change: Change, settings: Any, name: str, tmp_path: Path
) -> None:
    from transformers import CompressedTensorsConfig, LlavaForConditionalGeneration

    weights = read(written(tmp_path, change, settings))
    assert weights.dequantised == name
    whole = {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
    options = whole if "compressed" in name else {}
    untouched = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, trust_remote_code=False, **options
    ).model
    state = {f"tower.{key}": each for key, each in untouched.vision_tower.state_dict().items()}
    projector = untouched.multi_modal_projector.state_dict()
    state |= {f"projector.{key}": each for key, each in projector.items()}
    for key, tensor in weights.tensors.items():
        assert torch.equal(tensor.float(), state[key].float()), key


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_are_those_of_bitsandbytes(
    kind: str, nested: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    import bitsandbytes.functional as bnb

    # Blocks that divide a row: of others bitsandbytes 0.50's own kernel for CPUs takes the wrong
    # scales, which is seen against the weights that were packed (the next test).
    expected: Tensors = {}

    def change(name: str, weight: torch.Tensor) -> Tensors:
        packed, state = bnb.quantize_4bit(
            weight.to(dtype), quant_type=kind, compress_statistics=nested, blocksize=32
        )
        expected[name] = bnb.dequantize_4bit(packed, state)
        beside = state.as_dict(packed=True)
        return {name: packed, **{f"{name}.{key}": each for key, each in beside.items()}}

    settings = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "llm_int8_skip_modules": ["lm_head"],
    }
    weights = read(written(tmp_path, change, settings))
    assert weights.dequantised == f"bitsandbytes {kind}"
    for stored, canonical in NAME.items():
        # bitsandbytes rounds to the dtype that the weights had.
        close = {"rtol": 1e-6 if dtype == torch.float32 else 2**-7, "atol": 1e-9}
        torch.testing.assert_close(weights.tensors[canonical], expected[stored].float(), **close)


def test_four_bits_whose_blocks_go_over_rows(tmp_path: Path) -> None:
    import bitsandbytes.functional as bnb

    weight = torch.randn(64, 32)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    beside = {f"{FC1}.{key}": each for key, each in state.as_dict(packed=True).items()}
    weights = read(written(tmp_path, {FC1: {FC1: packed, **beside}}))
    largest = weight.reshape(-1, 64).abs().amax(1, keepdim=True)
    difference = (weights.tensors[NAME[FC1]] - weight).reshape(-1, 64).abs()
    assert (difference <= 0.16 * largest).all()  # half of NF4's widest step, and a little


def test_int8_is_that_of_bitsandbytes(tmp_path: Path) -> None:
    import bitsandbytes.functional as bnb

    expected: Tensors = {}

    def change(name: str, weight: torch.Tensor) -> Tensors:
        numbers, largest, _ = bnb.int8_vectorwise_quant(weight.half())
        expected[name] = bnb.int8_vectorwise_dequant(numbers, largest)
        module = name.removesuffix("weight")
        return {
            name: numbers,
            f"{module}SCB": largest,
            f"{module}weight_format": torch.tensor(0, dtype=torch.uint8),
        }

    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    weights = read(written(tmp_path, change, settings))
    assert weights.dequantised == "bitsandbytes int8"
    for stored, canonical in NAME.items():
        torch.testing.assert_close(weights.tensors[canonical], expected[stored], rtol=1e-6, atol=0)


# Every way in which a scale is written


def scalar(shape: tuple[int, ...], suffix: str) -> Change:
    def change(name: str, weight: torch.Tensor) -> Tensors:
        return {
            name: (weight / 0.01).to(E4M3),
            name.removesuffix("weight") + suffix: torch.full(shape, 0.01),
            name.removesuffix("weight") + "input_scale": torch.tensor(3.0),
        }

    return change


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (scalar((), "weight_scale"), {"quant_method": "modelopt", "quant_algo": "FP8"}),
        (scalar((1,), "weight_scale"), None),
        (scalar((1, 1), "weight_scale_inv"), FINE_GRAINED),
        (scalar((), "weight_scale_inv"), FINE_GRAINED | {"weight_block_size": None}),
        (scalar((1,), "scale_weight"), None),  # ComfyUI's name
        (channels(E4M3, 448), {"quant_method": "fbgemm_fp8"}),
        (channels(E4M3, 448, shape=(-1,)), None),
        (channels(E5M2, 57344), None),
        (channels(torch.float8_e4m3fnuz, 240), None),
        (blocks(16), FINE_GRAINED),
        (blocks(20), FINE_GRAINED | {"weight_block_size": [20, 20]}),  # 20 divides no side
        (
            blocks(16, "_scale"),
            compressed("float", "float-quantized", strategy="block", block_structure=[16, 16]),
        ),
        (
            blocks(16, "_scale"),
            compressed("float", "float-quantized", strategy="block", block_structure="16x16"),
        ),
        (groups(16), compressed("float", "naive-quantized", strategy="group", group_size=16)),
    ],
)
def test_fp8_with_its_scales_is_the_weight(change: Change, settings: Any, tmp_path: Path) -> None:
    whole = write_layout("llava-hf-single", tmp_path / "whole")
    tensors = read(written(tmp_path / "fp8", change, settings)).tensors
    for name, tensor in tensors.items():
        assert torch.allclose(tensor.float(), whole[name], rtol=0.13, atol=2e-3), name
        assert tensor.dtype == torch.float32


def test_blocks_without_a_configuration_are_those_of_deepseek(tmp_path: Path) -> None:
    write_layout("llava-hf-single", tmp_path)
    file = tmp_path / FILE
    name = "vision_tower.vision_model.embeddings.position_embedding.weight"  # 65 × 32
    tensors = load_file(file)
    numbers, scale = tensors[name].to(E4M3), torch.tensor([[0.5]])
    save_file(tensors | {name: numbers, f"{name}_scale_inv": scale}, file)
    tensor = read(tmp_path).tensors["tower.embeddings.position_embedding.weight"]
    assert torch.equal(tensor, numbers.float() * 0.5)


@pytest.mark.parametrize("shape", [(), (32,), (32, 1), (32, 1, 1, 1)])
def test_a_convolution_has_scales_too(shape: tuple[int, ...], tmp_path: Path) -> None:
    write_layout("llava-hf-single", tmp_path)
    name = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    tensors = load_file(tmp_path / FILE)
    numbers, scale = tensors[name].to(E4M3), torch.rand(shape)
    save_file(tensors | {name: numbers, f"{name}_scale": scale}, tmp_path / FILE)
    tensor = read(tmp_path).tensors["tower.embeddings.patch_embedding.weight"]
    each = scale.reshape(-1, 1, 1, 1)
    assert torch.equal(tensor, numbers.float() * each)


def test_zero_points_are_taken_off(tmp_path: Path) -> None:
    numbers = torch.randint(-100, 100, (64, 32), dtype=torch.int8)
    zero, scale = torch.randint(-9, 9, (64, 1), dtype=torch.int8), torch.rand(64, 1)
    beside = {FC1 + "_scale": scale, FC1 + "_zero_point": zero}
    weights = read(written(tmp_path, {FC1: {FC1: numbers, **beside}}))
    expected = (numbers.float() - zero.float()) * scale
    assert torch.equal(weights.tensors[NAME[FC1]], expected)


def test_what_is_beside_says_it_where_the_configuration_does_not(tmp_path: Path) -> None:
    change = {FC1: channels(E4M3, 448)(FC1, torch.randn(64, 32))}
    # Its list of exceptions says that the tower is whole, and the tensors say that it isn't.
    settings = {"quant_method": "fp8", "modules_to_not_convert": ["vision_tower"]}
    assert read(written(tmp_path / "a", change, settings)).dequantised == "fp8"
    assert read(written(tmp_path / "b", change)).dequantised == "float8_e4m3fn with weight_scale"


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "awq", "bits": 4, "modules_to_not_convert": None},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors", "ignore": ["re:.*lm_head", "re:vision_tower.*"]},
    ],
)
def test_a_whole_tower_beside_a_quantised_llm(settings: Any, tmp_path: Path) -> None:
    def packed(name: str, weight: torch.Tensor) -> Tensors:
        module = name.removesuffix("weight")
        return {module + "qweight": torch.zeros(3, 3, dtype=torch.int32)} if weight.ndim else {}

    whole = write_layout("llava-hf-single", tmp_path / "whole")
    llm = written(tmp_path / "q", packed, settings, of=lambda name: "language" in name)
    weights = read(llm)
    assert weights.dequantised is None
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights.tensors.items())


def test_mlx_keeps_colours_last(tmp_path: Path) -> None:
    whole = write_layout("llava-hf-single", tmp_path, change={"quantization": {"bits": 4}})
    name = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    tensors = load_file(tmp_path / FILE)
    turned = tensors[name].permute(0, 2, 3, 1).contiguous()
    save_file(tensors | {name: turned}, tmp_path / FILE, metadata={"format": "mlx"})
    tensor = read(tmp_path).tensors["tower.embeddings.patch_embedding.weight"]
    assert torch.equal(tensor, whole["tower.embeddings.patch_embedding.weight"])


# Refused


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(*shape).to(dtype)


Q8, F8, F16 = ones(64, 32, dtype=torch.int8), ones(64, 32, dtype=E4M3), ones(64, 32).half()
M = FC1.removesuffix("weight")
NF4_STATE = {
    "quant_type": "nf4",
    "blocksize": 64,
    "dtype": "float32",
    "shape": [64, 32],
}


def nf4(state: Any, *, absmax: int = 32, table: int = 16) -> Tensors:
    return {
        FC1: torch.zeros(1024, 1, dtype=torch.uint8),
        f"{FC1}.absmax": ones(absmax),
        f"{FC1}.quant_map": ones(table),
        f"{FC1}.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


@pytest.mark.parametrize(
    ("beside", "settings", "got", "said"),
    [
        # Nothing says what one number is.
        ({FC1: F8}, None, "no scale", {"expected": "weight_scale"}),
        ({FC1: Q8}, None, "no scale", {}),
        ({FC1: Q8, M + "weight_scales": ones(64)}, {"quant_method": "eetq"}, "eetq", {}),
        ({FC1: F8, FC1 + "_zero_point": ones(1)}, None, "no scale", {}),
        (
            {FC1: F8, FC1 + "_scale": ones(1), M + "bias": ones(64, dtype=E4M3)},
            None,
            (M + "bias", "no scale"),
            {},
        ),
        ({FC1: F16, FC1 + "_scale": ones(1)}, None, FC1, {"cause": "'weight_scale'"}),
        (
            {FC1: F8, FC1 + "_scale": ones(1), FC1 + "_scale_inv": ones(1)},
            None,
            "weight_scale and weight_scale_inv",
            {"expected": "one scale"},
        ),
        # Scales that don't fit, and weights that scales would spread to the right shape.
        (
            {FC1: Q8[:1].contiguous(), M + "SCB": ones(64)},
            None,
            "[1, 32]",
            {"expected": "[64, 32]"},
        ),
        ({FC1: ones(32, dtype=E4M3), FC1 + "_scale": ones(64, 1)}, None, "[32]", {}),
        ({FC1: F8, FC1 + "_scale": ones(32)}, None, "[32]", {"expected": "64 output channels"}),
        ({FC1: F8, FC1 + "_scale": ones(1, 32)}, None, "[1, 32]", {"cause": "weight_block_size"}),
        (
            {FC1: F8, FC1 + "_scale_inv": ones(2, 2)},
            FINE_GRAINED,
            "[2, 2]",
            {"expected": "16 × 16"},
        ),
        ({FC1: F8, FC1 + "_scale": ones(1) * torch.nan}, None, "NaN", {}),
        ({FC1: F8, FC1 + "_scale": -ones(1)}, None, "negative", {}),
        ({FC1: F8, FC1 + "_scale": ones(1, dtype=torch.uint8)}, None, "uint8", {}),
        ({FC1: Q8, M + "SCB": ones(32)}, None, "SCB", {"expected": "64 output channels"}),
        (
            {FC1: Q8, FC1 + "_scale": ones(64), FC1 + "_zero_point": ones(3)},
            None,
            "weight_zero_point",
            {},
        ),
        (
            {FC1: Q8, M + "SCB": ones(64), M + "weight_format": torch.tensor(2)},
            None,
            "bitsandbytes",
            {"cause": "weight_format"},
        ),
        # Schemes that aren't undone: named by the configuration, or by what they call a tensor.
        (
            {M + "qweight": ones(4, 64), M + "qzeros": ones(1, 8), M + "scales": ones(1, 64)},
            {"quant_method": "awq", "bits": 4},
            "awq 4 bits",
            {"cure": "before it was quantised"},
        ),
        ({M + "qweight": ones(4, 64), M + "scales": ones(1, 64)}, None, "AWQ or GPTQ", {}),
        (
            {M + "weight_packed": ones(64, 4), FC1 + "_scale": ones(64, 1)},
            compressed("int", "pack-quantized", num_bits=4),
            "compressed-tensors pack-quantized",
            {},
        ),
        ({M + "W_q": ones(64, 4), M + "scale": ones(64)}, {"quant_method": "hqq"}, "hqq", {}),
        ({M + "weight._data": Q8, M + "weight._scale": ones(64, 1)}, None, "quanto", {}),
        (
            {M + "weight_qdata": Q8, FC1 + "_scale": ones(64)},
            {"quant_method": "torchao"},
            "torchao",
            {},
        ),
        ({M + "codes": Q8, M + "codebooks": ones(1)}, None, "AQLM", {}),
        (
            {FC1: ones(64, 16, dtype=torch.uint8), FC1 + "_scale": ones(64, 2, dtype=E4M3)}
            | {FC1 + "_scale_2": ones(1)},
            {"quant_algo": "NVFP4"},
            "modelopt NVFP4",
            {},
        ),
        (
            {FC1: torch.ones(64, 4, dtype=torch.uint32), M + "scales": ones(64, 1)}
            | {M + "biases": ones(64, 1)},
            {"group_size": 64, "bits": 4},
            "MLX 4 bits",
            {},
        ),
        ({FC1: torch.ones(64, 4, dtype=torch.int32)}, {"quant_method": "odd"}, "int32", {}),
        (
            {FC1: torch.zeros(64, 16, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)},
            None,
            "float4",
            {},
        ),
        ({FC1: torch.ones(64, 32, dtype=torch.bool)}, None, "bool", {}),
        ({FC1: torch.ones(64, 32, dtype=torch.complex64)}, None, "complex64", {}),
        (
            {FC1: F8, FC1 + "_scale": ones(1)},
            compressed("float", "float-quantized") | {"transform_config": {"R1": {}}},
            "compressed-tensors",
            {"cause": "transform_config"},
        ),
        # The weight is whole, and what else is there would change it when it is run.
        ({FC1: F16, M + "pre_quant_scale": ones(32)}, None, "pre_quant_scale", {}),
        ({FC1: F16, M + "weight_quantizer._amax": ones(1)}, None, "ModelOpt", {}),
        # What bitsandbytes wrote beside its numbers is damaged.
        (nf4([1]), None, "bitsandbytes", {"cause": "JSON"}),
        (nf4(NF4_STATE, absmax=31), None, "bitsandbytes", {"cause": "31 scales"}),
        (nf4(NF4_STATE, table=15), None, "bitsandbytes", {"cause": "15 entries"}),
        (nf4(NF4_STATE | {"shape": [32, 64]}), None, "bitsandbytes", {"cause": "[32, 64]"}),
        (nf4(NF4_STATE | {"blocksize": 2**60}), None, "bitsandbytes", {"cause": "scales"}),
        (nf4(NF4_STATE | {"blocksize": -1}), None, "bitsandbytes", {"cause": "-1"}),
        (nf4({}), None, "bitsandbytes", {"cause": "KeyError"}),
    ],
)
def test_what_is_refused(
    beside: Tensors, settings: Any, got: Said, said: dict[str, Said], tmp_path: Path
) -> None:
    faulty(written(tmp_path, {FC1: beside}, settings), got, **said)


@pytest.mark.parametrize("size", [[16], [0, 16], "16", 16, [16, 16.0]])
def test_sizes_of_blocks_that_are_none(size: object, tmp_path: Path) -> None:
    settings = FINE_GRAINED | {"weight_block_size": size}
    faulty(written(tmp_path, blocks(16), settings), ("weight_block_size", repr(size)))


@pytest.mark.parametrize("size", [2**40, 2**60])
def test_a_huge_block_takes_no_memory(size: int, tmp_path: Path) -> None:
    settings = FINE_GRAINED | {"weight_block_size": [16, size]}
    change = {FC1: {FC1: F8, FC1 + "_scale_inv": torch.rand(4, 1)}}
    assert read(written(tmp_path, change, settings)).dequantised == "fp8"


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("compression_config", {"quant_method": "old"}),
        ("quantization", {"group_size": 64, "bits": 8}),
        ("vision_config", {"quantization_config": {"quant_method": "inner"}}),
    ],
)
def test_where_a_scheme_is_named(key: str, settings: Any, tmp_path: Path) -> None:
    from tests.export.layouts import VISION

    if key == "vision_config":
        settings = VISION | settings
    change = {FC1: {FC1: torch.ones(64, 4, dtype=torch.int32)}}
    names = {"compression_config": "old", "quantization": "MLX 8 bits", "vision_config": "inner"}
    faulty(written(tmp_path, change, settings, key=key), f"by {names[key]}")


def test_modelopts_file_names_its_scheme(tmp_path: Path) -> None:
    folder = written(tmp_path, {FC1: {FC1: torch.ones(64, 4, dtype=torch.int32)}})
    named = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A8_AWQ"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(named))
    faulty(folder, "by modelopt W4A8_AWQ")


def test_the_reference_of_an_export_is_the_dequantised_model(tmp_path: Path) -> None:
    from vzip.export.parity.reference import tower_features

    upstream = upstream_model("llava", 0)
    weights = read(written(tmp_path, channels(E4M3, 448), compressed("float", "float-quantized")))
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    (features,) = tower_features(weights, [image])
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    mean = torch.tensor(weights.config.preprocessing.mean)[:, None, None]
    std = torch.tensor(weights.config.preprocessing.std)[:, None, None]
    with torch.no_grad():
        tower = upstream.model.vision_tower
        hidden = tower((pixels - mean) / std, output_hidden_states=True).hidden_states[-2]
    difference = np.abs(features.hidden - hidden.numpy()).max()
    assert difference < 0.1 * hidden.abs().max()  # FP8 has 3 bits


@pytest.mark.slow
def test_a_bundle_says_what_its_weights_were_made_of(tmp_path: Path) -> None:
    from vzip.export import export
    from vzip.runtime.cli.main import main

    name = "compressed-tensors float-quantized"
    folder = written(tmp_path / "fp8", channels(E4M3, 448), compressed("float", name.split()[1]))
    lines: list[str] = []
    bundle = export(folder, tmp_path / "out", tokens=16, say=lines.append)
    assert bundle.manifest.model.dequantised == name
    assert any(name in line for line in lines)
    assert main(["check", str(tmp_path / "out")]) == 0
    whole = written(tmp_path / "whole", {})
    plain = export(whole, tmp_path / "plain", tokens=16, say=lines.append).manifest
    assert plain.model.dequantised is None
    assert "dequantised" not in plain.to_json()["model"]
