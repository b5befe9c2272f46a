"""Every tensor is read, known to change nothing, or refused by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.layouts import TOWER_FOLDER, write_layout
from tests.refusals import Said, refused
from vzip.export.checkpoint.reader import Checkpoint, read_projector, read_vision
from vzip.runtime.errors import CheckpointError

T = "vision_tower.vision_model."
LAYER = T + "encoder.layers.0."
P = "multi_modal_projector."
FILE = "model.safetensors"
SHARDS = ("model-00002-of-00004.safetensors", "model-00003-of-00004.safetensors")
FC1 = LAYER + "mlp.fc1.weight"
ONE = torch.ones(1)


def add(file: Path, *names: str, value: torch.Tensor = ONE) -> None:
    more = {name: value.clone() for name in names}
    if file.suffix == ".bin":
        torch.save(torch.load(file, weights_only=True) | more, file)
    else:
        save_file(load_file(file) | more, file)


def read(folder: Path) -> dict[str, torch.Tensor]:
    return dict(read_vision(Checkpoint.open(folder)).tensors)


def faulty(folder: Path, got: Said = (), **said: Said) -> None:
    with refused(CheckpointError, got=got, **said):
        read(folder)


# Read neither, and refused


@pytest.mark.parametrize(
    "name",
    [
        LAYER + "layer_scale1.lambda1",
        LAYER + "ls1.gamma",
        LAYER + "self_attn.q_norm.weight",
        LAYER + "self_attn.k_norm.weight",
        LAYER + "self_attn.k_scale",
        LAYER + "self_attn.logit_scale",
        LAYER + "text_projection.weight",
        P + "visual_projection.weight",
        LAYER + "self_attn.rotary_emb.inv_freq",
        LAYER + "self_attn.relative_position_bias_table",
        LAYER + "mlp.fc3.weight",  # a gate
        LAYER + "temporal_attn.q_proj.weight",
        T + "embeddings.register_tokens",
        T + "embeddings.mask_token",
        T + "encoder.layers.4.layer_norm1.weight",  # more layers than config.json has
        T + "neck.0.weight",
        T + "odd",
        "model." + T + "odd",
        "vision_tower.odd.weight",
        "model.vision_tower.head_odd.weight",
        P + "layer_norm.weight",
        P + "pre_norm.weight",
        P + "linear_3.weight",
        P + "proj.0.weight",
        "model." + P + "patch_merger.merging_layer.weight",
        "model.mm_projector.4.weight",
        # Outside of both, and pictures go through it.
        "vision_tower_aux.stem.weight",
        "model.vision_resampler.query",
        "model.vlm_uni_query_projector.0.weight",
        "model.mm_dense_connector.0.weight",
        "image_newline",  # LLaVA-1.5 has none
        "visual.blocks.0.norm1.weight",
        "qformer.encoder.layer.0.attention.weight",
        "resampler.query",
        "model.image_adapter.fc.weight",
        "siglip.embeddings.odd",
    ],
)
def test_a_tensor_that_nothing_is_made_of(name: str, tmp_path: Path) -> None:
    write_layout("llava-hf-single", tmp_path)
    add(tmp_path / FILE, name)
    faulty(tmp_path, (f"'{name}'", FILE), cause="computes more")


@pytest.mark.parametrize(
    "name",
    [
        LAYER + "self_attn.q_proj.lora_A.default.weight",
        LAYER + "self_attn.q_proj.lora_B.weight",
        LAYER + "self_attn.q_proj.lora_magnitude_vector.default.weight",
        LAYER + "self_attn.q_proj.base_layer.weight",
        P + "modules_to_save.default.linear_1.weight",
        "base_model.model." + LAYER + "self_attn.q_proj.lora_A.weight",
    ],
)
def test_what_an_adapter_left(name: str, tmp_path: Path) -> None:
    write_layout("llava-hf-single", tmp_path)
    add(tmp_path / FILE, name)
    faulty(tmp_path, name.removeprefix("base_model.model."), cure="merge_and_unload")


def test_an_adapter_in_the_place_of_weights(tmp_path: Path) -> None:
    write_layout("llava-hf-single", tmp_path)
    state = load_file(tmp_path / FILE)
    for key in [key for key in state if key.startswith(P)]:
        tensor, rest = state.pop(key), key.removeprefix(P)
        state[f"{P}original_module.{rest}"] = tensor
        state[f"{P}modules_to_save.default.{rest}"] = tensor + 1
    save_file(state, tmp_path / FILE)
    faulty(tmp_path, (P, "projector.linear_1.weight"), cure="merge_and_unload")


def test_every_layout_and_place_is_looked_at(tmp_path: Path) -> None:
    for layout, file, name, where in (
        ("llava-hf", SHARDS[0], T + "odd", "index"),
        ("transformers-5", SHARDS[0], "vision_tower.odd", "index"),
        ("original", f"{TOWER_FOLDER}/pytorch_model.bin", "odd", TOWER_FOLDER),
        ("original-projector-file", "mm_projector.bin", "model.mm_projector.9.weight", "mm_proj"),
        ("original", "pytorch_model-00003-of-00004.bin", "model.mm_projector.9.weight", "index"),
    ):
        folder = tmp_path / layout / where
        write_layout(layout, folder)
        add(folder / file, name)
        faulty(folder, (f"'{name}'", where))


# Known to change nothing


@pytest.mark.parametrize(
    "names",
    [
        (T + "embeddings.position_ids",),
        ("vision_tower.visual_projection.weight",),
        (T + "head.probe", T + "head.attention.in_proj_weight", "vision_tower.head.mlp.fc1.bias"),
        ("language_model.model.layers.0.self_attn.q_proj.lora_A.weight",),
        ("language_model.model.layers.0.self_attn.rotary_emb.inv_freq",),
        ("model.language_model.layers.0.odd", "model.layers.3.odd", "lm_head.bias"),
    ],
)
def test_what_changes_nothing(
    names: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = write_layout("llava-hf-single", tmp_path)
    add(tmp_path / FILE, *names)
    with caplog.at_level(logging.WARNING):
        tensors = read(tmp_path)
    assert not caplog.records
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_scales_of_what_layers_take_in_a_quantised_checkpoint(tmp_path: Path) -> None:
    settings = {"quant_method": "modelopt", "quant_algo": "FP8"}
    expected = write_layout("llava-hf-single", tmp_path, change={"quantization_config": settings})
    add(tmp_path / FILE, LAYER + "mlp.fc1.input_scale", LAYER + "self_attn.k_scale")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read(tmp_path).items())


def test_a_text_side_beside_the_tower(tmp_path: Path) -> None:
    expected = write_layout("original", tmp_path)
    add(
        tmp_path / TOWER_FOLDER / "pytorch_model.bin",
        "text_model.encoder.layers.0.mlp.fc1.weight",
        "vision_model.embeddings.position_ids",
        "visual_projection.weight",
        "text_projection.weight",
        "logit_scale",
    )
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read(tmp_path).items())


def test_a_name_that_nobody_knows_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_layout("llava-hf-single", tmp_path)
    add(tmp_path / FILE, "odd.weight", "even.weight")
    with caplog.at_level(logging.WARNING):
        read(tmp_path)
    (record,) = caplog.records
    assert "'even.weight', 'odd.weight' (2 such" in record.getMessage()


# Shards


def test_a_shard_holds_what_its_index_does_not_say(tmp_path: Path) -> None:
    write_layout("llava-hf", tmp_path)
    file = tmp_path / SHARDS[0]
    save_file(load_file(file) | {T + "odd": ONE}, file)  # the index is as it was
    faulty(tmp_path, f"'{T}odd'")


@pytest.mark.parametrize("change", [0, 1])
def test_a_tensor_that_two_shards_hold(change: float, tmp_path: Path) -> None:
    expected = write_layout("llava-hf", tmp_path)
    tensor = load_file(tmp_path / SHARDS[0])[FC1] + change
    add(tmp_path / SHARDS[1], FC1, value=tensor)
    if change:
        faulty(tmp_path, (SHARDS[0], SHARDS[1], FC1))
    else:
        assert torch.equal(
            read(tmp_path)["tower.pre_layrnorm.bias"], expected["tower.pre_layrnorm.bias"]
        )


# What training wraps around a model


@pytest.mark.parametrize(
    ("start", "inside"),
    [
        ("base_model.model.", ""),
        ("module.", ""),
        ("_orig_mod.", ""),
        ("module._orig_mod.", ""),
        ("", "_orig_mod."),
    ],
)
def test_wrapped_names(start: str, inside: str, tmp_path: Path) -> None:
    expected = write_layout("llava-hf-single", tmp_path)
    state = load_file(tmp_path / FILE)
    state = {
        start + name.replace("vision_tower.", f"vision_tower.{inside}"): tensor
        for name, tensor in state.items()
    }
    save_file(state, tmp_path / FILE)
    tensors = read(tmp_path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    add(tmp_path / FILE, FC1, "module." + FC1)
    faulty(tmp_path, (f"'{FC1}'", "two names"), expected="one")


# LoRA


def lora(folder: Path, *names: str, base: str = "lmsys/vicuna-7b-v1.5") -> None:
    about = {"peft_type": "LORA", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    save_file(
        {f"base_model.model.{name}": torch.zeros(4, 4) for name in names},
        folder / "adapter_model.safetensors",
    )


LLM = "model.layers.0.self_attn.q_proj.lora_A.weight"


def original_lora(folder: Path, *names: str) -> dict[str, torch.Tensor]:
    """As original LLaVA saves one: an adapter of the LLM, and what else was trained."""
    expected = write_layout("original-projector-file", folder, change={"model_type": "llava_llama"})
    trained = torch.load(folder / "mm_projector.bin", weights_only=True)
    (folder / "mm_projector.bin").unlink()
    wrapped = {f"base_model.model.{name}": tensor for name, tensor in trained.items()}
    torch.save(wrapped, folder / "non_lora_trainables.bin")
    lora(folder, *names)
    return expected


def test_a_folder_of_originals_lora_has_a_whole_vision_side(tmp_path: Path) -> None:
    expected = original_lora(tmp_path, LLM)
    tensors = read(tmp_path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_originals_lora_may_hold_a_trained_tower(tmp_path: Path) -> None:
    original_lora(tmp_path, LLM)
    copied = write_layout("original-copy", tmp_path / "other", seed=7)
    tower = {
        f"base_model.model.model.vision_tower.vision_tower.vision_model.{name[6:]}": tensor
        for name, tensor in copied.items()
        if name.startswith("tower.")
    }
    file = tmp_path / "non_lora_trainables.bin"
    torch.save(torch.load(file, weights_only=True) | tower, file)
    config = json.loads((tmp_path / "config.json").read_text())
    config["unfreeze_mm_vision_tower"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(read(tmp_path)["tower.pre_layrnorm.bias"], copied["tower.pre_layrnorm.bias"])


def test_what_lora_left_out_serves_as_a_projector(tmp_path: Path) -> None:
    expected = original_lora(tmp_path, LLM)
    config = Checkpoint.open(tmp_path).vision().projector
    tensors = read_projector(tmp_path / "non_lora_trainables.bin", config)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "name",
    [
        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "model.mm_projector.0.lora_A.weight",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.lora_B.weight",
        "multi_modal_projector.linear_1.lora_A.weight",
    ],
)
def test_an_adapter_of_the_vision_side(name: str, tmp_path: Path) -> None:
    original_lora(tmp_path / "original", LLM, name)
    write_layout("llava-hf-single", tmp_path / "whole")
    lora(tmp_path / "whole", name)
    for folder in ("original", "whole"):
        faulty(tmp_path / folder, ("adapter_model", name), cure="merge_and_unload")


def test_an_adapter_of_the_llm_beside_a_whole_model(tmp_path: Path) -> None:
    write_layout("llava-hf-single", tmp_path)
    lora(tmp_path, LLM)
    assert read(tmp_path)


def test_an_adapter_alone(tmp_path: Path) -> None:
    lora(tmp_path, LLM, base="llava-hf/llava-1.5-7b-hf")
    said: dict[str, Any] = {"cause": "llava-hf/llava-1.5-7b-hf", "cure": "merge_and_unload"}
    faulty(tmp_path, ("LoRA", str(tmp_path)), **said)


def test_a_projector_that_is_more_than_one(tmp_path: Path) -> None:
    write_layout("llava-hf-single", tmp_path)
    config = Checkpoint.open(tmp_path).vision().projector
    state = load_file(tmp_path / FILE)
    alone = {name: tensor for name, tensor in state.items() if name.startswith(P)}
    file = tmp_path / "tuned.safetensors"
    for name, right in (
        ("model.embed_tokens.weight", True),  # of the marks around a picture
        (P + "layer_norm.weight", False),
        ("model.vision_tower.vision_tower.odd", False),
    ):
        save_file(alone | {name: ONE}, file)
        if right:
            assert read_projector(file, config)
            continue
        with refused(CheckpointError, got=(f"'{name}'", str(file))):
            read_projector(file, config)


# Values


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [FC1, P + "linear_2.bias"])
def test_a_number_that_is_none(value: float, name: str, tmp_path: Path) -> None:
    write_layout("llava-hf", tmp_path)
    for file in (tmp_path / each for each in SHARDS):
        state = load_file(file)
        if name in state:
            state[name].view(-1)[5:7] = value
            save_file(state, file)
            holder = file
    faulty(tmp_path, (f"'{name}'", str(holder), "2 of ", "[0, 5]" if name == FC1 else "[5]"))


def test_a_number_that_is_none_where_nothing_is_computed(tmp_path: Path) -> None:
    write_layout("llava-hf-single", tmp_path)
    add(tmp_path / FILE, T + "post_layernorm.bias", value=torch.full((32,), torch.nan))
    assert read(tmp_path)


@pytest.mark.parametrize("layout", ["llava-hf-single", "original-projector-file"])
def test_tensors_that_zero_3_left_empty(layout: str, tmp_path: Path) -> None:
    write_layout(layout, tmp_path)
    name = "model.mm_projector.0.weight" if "original" in layout else FC1
    file = tmp_path / ("mm_projector.bin" if "original" in layout else FILE)
    add(file, name, value=torch.empty(0))
    faulty(tmp_path, (name, str(file), "empty"), cause="ZeRO-3", cure="zero_to_fp32.py")


def test_positions_of_another_size(tmp_path: Path) -> None:
    write_layout("llava-hf-single", tmp_path)
    name = T + "embeddings.position_embedding.weight"
    add(tmp_path / FILE, name, value=torch.ones(37, 32))
    faulty(tmp_path, (name, "[37, 32]"), expected="[65, 32]", cause="image_size")


def test_a_sparse_tensor(tmp_path: Path) -> None:
    write_layout("llava-hf-bin-single", tmp_path)
    add(tmp_path / "pytorch_model.bin", FC1, value=torch.ones(64, 32).to_sparse())
    faulty(tmp_path, (FC1, "sparse"), expected="dense")


def test_a_tensor_that_pytorch_quantised(tmp_path: Path) -> None:
    write_layout("llava-hf-bin-single", tmp_path)
    value = torch.quantize_per_tensor(torch.ones(64, 32), 0.1, 0, torch.qint8)
    add(tmp_path / "pytorch_model.bin", FC1, value=value)
    faulty(tmp_path, (FC1, "qint8"))
