"""`vzip export --with-llm`: what is refused, what is compared, what is left behind."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers

from tests.bundles import copy_files
from tests.parity.tiny_llm import make_tokenizer, tiny_llava
from tests.refusals import refused
from tests.runtime.llm.demo_llm import demo_with_llm
from vzip.export.llm import decoder_graph as llm_graph
from vzip.export.llm import onnx_decoder as llm
from vzip.runtime import VisionEncoder, demo
from vzip.runtime.bundle.manifest import LLM_FILES
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.bundle.writer import bundle_writer
from vzip.runtime.cli.main import main
from vzip.runtime.errors import CheckpointError, ExportError, ParityError
from vzip.runtime.llm.llm_files import Settings
from vzip.runtime.llm.local.onnx_decoder import OnnxRuntimeLLM
from vzip.runtime.llm.local.transformers import TransformersLLM
from vzip.runtime.machine import sensors

QUICK = ("--tokens", "9", "--no-check", "--with-llm")


@pytest.fixture(scope="module", autouse=True)
def _demo() -> None:
    """Exported before a test breaks what exports."""
    demo_with_llm()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's checkpoint with the smallest LLM: one layer; no test changes it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    shutil.copytree(demo.checkpoint(), folder, copy_function=shutil.copyfile)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype="float32", trust_remote_code=False
    )
    decoder = model.get_decoder()
    decoder.layers = decoder.layers[:1]
    model.config.text_config.num_hidden_layers = 1
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies of the checkpoint with other settings of its LLM."""

    def change(**text: Any) -> Path:
        folder = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
        config = json.loads((folder / "config.json").read_text())
        config["text_config"] |= text
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return change


def refused_command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Return the one line that an export ends with, which leaves nothing behind."""
    output = Path(arguments[-1])
    assert main(["export", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [*output.parent.glob(".*"), *output.parent.glob(output.name)] == []
    return err.splitlines()[-1]


# ── refused before any work ─────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_random_weights_answer_nothing(tmp_path, capsys):
    arguments = ("--model", "demo", "--weights", "random", "--with-llm", "-o", tmp_path / "x")
    assert "random" in refused_command(capsys, *arguments)


def test_a_model_without_room_is_refused(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sensors, "memory", lambda: types.SimpleNamespace(available=1))  # MiB
    text = refused_command(capsys, "--model", checkpoint, *QUICK, "-o", tmp_path / "x")
    assert "--with-llm: the LLM has 0.00 billion parameters" in text
    assert "export takes about 0.0 GiB of memory" in text
    assert "llama.cpp" in text
    size = llm.Size(6_738_415_616)
    monkeypatch.setattr(sensors, "memory", lambda: types.SimpleNamespace(available=24 * 1024))
    with pytest.raises(
        ExportError, match=r"6\.74 billion parameters, .* about 37\.7 GiB .* but 24"
    ):
        size.check_fits()
    for enough in (types.SimpleNamespace(available=64 * 1024), None):
        monkeypatch.setattr(sensors, "memory", lambda enough=enough: enough)
        size.check_fits()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_type": "gemma"}, "is a 'gemma', expected one of llama, mistral, qwen2"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "has rotary embeddings of the type 'dynamic', which change with the length",
        ),
    ],
)
def test_an_llm_of_another_kind_is_refused(settings, change, text, tmp_path, capsys):
    line = refused_command(capsys, "--model", settings(**change), *QUICK, "-o", tmp_path / "x")
    assert text in line
    assert "leave out --with-llm" in line


def test_the_original_layout_is_refused(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "original"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama"}
    (folder / "config.json").write_text(json.dumps(config))
    with refused(CheckpointError, cure="llava-hf"):
        llm.plan(str(folder), None)


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq 4 bits"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "float-quantized"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes fp4"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, None),
    ],
)
def test_a_quantised_llm_is_refused_before_any_work(checkpoint, scheme, name, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "quantised"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    if name is None:
        llm.plan(str(folder), None)
        return
    with refused(CheckpointError, got=(str(folder), name), cure="--with-llm"):
        llm.plan(str(folder), None)


# ── weights that are equal ──────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_layers_and_parts_of_equal_weights_answer_as_the_untouched_model_does(
    checkpoint: Path, tmp_path: Path, precision: Literal["fp32", "fp16"]
) -> None:
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype="float32", trust_remote_code=False
    )
    decoder = model.get_decoder()
    (layer,) = decoder.layers
    layer.self_attn.k_proj.load_state_dict(layer.self_attn.q_proj.state_dict())
    layer.mlp.up_proj.load_state_dict(layer.mlp.gate_proj.state_dict())
    decoder.layers.append(copy.deepcopy(layer))
    decoder.layers[1].self_attn.layer_idx = 1
    model.config.text_config.num_hidden_layers = 2
    with torch.no_grad():
        for each in (decoder.norm, *(n for x in decoder.layers for n in (x.input_layernorm,))):
            each.weight.fill_(1)
    folder = Path(shutil.copytree(checkpoint, tmp_path / "equal"))
    model.save_pretrained(folder)
    made = add(folder, tmp_path / "bundle", precision)  # compared before it is published
    assert set(LLM_FILES) <= set(made.manifest.files)


# ── refused after a comparison ──────────────────────────────────────────────────────────────────


def add(checkpoint: Path, output: Path, precision: Literal["fp32", "fp16"] = "fp32") -> Bundle:
    """Export the LLM alone, into a bundle with the demo's vision graph."""
    vision = read_bundle(demo_with_llm(), verify=False)
    manifest = vision.manifest
    if precision == "fp16":
        outputs = (dataclasses.replace(manifest.embeds, dtype="float16"), *manifest.outputs[1:])
        manifest = dataclasses.replace(manifest, precision="fp16", outputs=outputs)
    with bundle_writer(output) as writer:
        copy_files(vision.path, writer.folder)
        llm.add_llm(writer, manifest, model=str(checkpoint), revision=None, step=lambda text: None)
        return writer.publish(manifest)


@pytest.mark.slow
def test_a_graph_that_differs_is_not_published(checkpoint, tmp_path, capsys, monkeypatch):
    trace = llm_graph.trace

    def spoiled(decoder: llm_graph.Decoder) -> Any:
        with torch.no_grad():
            decoder.decoder.norm.weight.mul_(1.001)
        return trace(decoder)

    monkeypatch.setattr(llm, "trace", spoiled)
    line = refused_command(capsys, "--model", checkpoint, *QUICK, "-o", tmp_path / "x")
    assert "the LLM's graph differs from the untouched model at call 0 of 6" in line
    assert "expected at most 1e-04 of the largest logit; nothing was written" in line


@pytest.mark.slow
def test_in_fp16_more_may_differ(checkpoint, tmp_path, monkeypatch):
    made = add(checkpoint, tmp_path / "half", "fp16")
    assert Settings.of(made).dtype == "float16"
    trial = llm.Trial(TransformersLLM.open(checkpoint, device="cpu", dtype="float32"))
    trial.compare(made)
    trial._logits[1] = trial._logits[1] * np.float32(1.03)
    with refused(ParityError, got="at call 1 of 6", expected="2e-02"):
        trial.compare(made)
    trial._logits[1][:] = np.nan
    with refused(ParityError, got="at call 1 of 6"):
        trial.compare(made)


@pytest.mark.slow
def test_a_graph_that_forgets_its_cache_is_not_published(checkpoint, tmp_path, monkeypatch):
    def forget(self: Any, keys: Any, values: Any, layer: int, *_: Any, **__: Any) -> Any:
        both = self.parts[2 * layer : 2 * layer + 2]
        new = (keys, values)
        grown = [torch.cat([old * 0, each], 2) for old, each in zip(both, new, strict=True)]
        self.parts[2 * layer : 2 * layer + 2] = grown
        return tuple(grown)

    monkeypatch.setattr(llm_graph._Cache, "update", forget)
    with refused(ParityError, got="at call 1 of 6 (1 token)"):
        add(checkpoint, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_tokenizer_that_differs_is_not_published(checkpoint, tmp_path, monkeypatch):
    tokenizer = llm._tokenizer

    def other(of: TransformersLLM) -> str:
        data = json.loads(tokenizer(of))
        data["post_processor"] = None  # no beginning of a sequence
        return json.dumps(data)

    monkeypatch.setattr(llm, "_tokenizer", other)
    with refused(ParityError, got="tokenizer"):
        add(checkpoint, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_fp16_are_refused(checkpoint, tmp_path):
    model = TransformersLLM.open(checkpoint, device="cpu", dtype="float32")
    with torch.no_grad():
        model.model.get_decoder().layers[0].mlp.up_proj.weight[0, 0] = 7e4
    with refused(ExportError, got=("up_proj.weight", "7e+04"), cure="fp32"):
        llm.write(model, tmp_path, precision="fp16")


def test_a_tokenizer_without_a_file_of_its_own_is_refused(checkpoint, tmp_path):
    model = TransformersLLM.open(checkpoint, device="cpu", dtype="float32")
    model.tokenizer = types.SimpleNamespace()
    with refused(CheckpointError, got="SimpleNamespace", cure="--with-llm"):
        llm.write(model, tmp_path, precision="fp32")


# ── what is written ─────────────────────────────────────────────────────────────────────────────


def test_the_tokenizers_file_has_no_state_of_earlier_calls(checkpoint):
    model = TransformersLLM.open(checkpoint, device="cpu", dtype="float32")
    fresh = llm._tokenizer(model)
    model.tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert llm._tokenizer(model) == fresh
    assert json.loads(fresh)["truncation"] is None
    assert json.loads(fresh)["padding"] is None


def test_attention_that_slides_serves_its_window(tmp_path):
    """Within the window it is the same; beyond it the context ends."""
    tokenizer = make_tokenizer()
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "sliding_window": 24}
    model = tiny_llava("llava", "mistral", "clip", text)
    untouched = TransformersLLM(model, tokenizer, template=None)
    made = llm._settings(untouched, "fp32")
    assert made.context == 24
    ids = list(range(5, 29))
    with torch.no_grad():
        row = torch.tensor([ids])
        expected = untouched.model(
            inputs_embeds=untouched.model.get_input_embeddings()(row)
        ).logits[0, -1]
        decoder = llm_graph.Decoder(model)
        empty = [torch.zeros(1, 1, 0, 32)] * 2
        positions = torch.arange(len(ids))[None]
        logits, *_ = decoder(model.get_input_embeddings()(row), positions, empty)
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-5)


def test_a_bundle_with_an_llm_is_a_bundle(capsys, tmp_path):
    """`vzip check` and an encoder take it; `check` leaves the LLM as it was."""
    folder = Path(shutil.copytree(demo_with_llm(), tmp_path / "copy"))
    bundle = read_bundle(folder)
    assert set(LLM_FILES) <= set(bundle.manifest.files)
    assert bundle.manifest.parity is None
    capsys.readouterr()
    assert main(["check", str(folder), str(demo.pictures() / "scene-1.jpg")]) == 0
    assert "passed: True" in capsys.readouterr().out
    checked = read_bundle(folder)
    assert checked.manifest.files == bundle.manifest.files
    picture = demo.pictures() / "scene-2.jpg"
    with VisionEncoder.open(checked) as encoder:
        embeds = encoder.image_embeds(picture)
    assert OnnxRuntimeLLM(checked).ask(embeds, "What digit is there?")
    assert Settings.of(checked).layers == 4


def test_the_graph_carries_no_path_of_this_machine():
    data = (demo_with_llm() / "llm.onnx").read_bytes()
    for text in (b"/work", b"site-packages", os.fsencode(Path.home()) + b"/", b".py"):
        assert text not in data


def test_the_table_is_the_models(checkpoint):
    table = np.load(demo_with_llm() / "llm_embeddings.npy", mmap_mode="r", allow_pickle=False)
    model = TransformersLLM.open("demo", device="cpu", dtype="float32").model
    assert np.array_equal(table, model.get_input_embeddings().weight.detach().numpy())


# ── killed ──────────────────────────────────────────────────────────────────────────────────────

KILLED = """
import os, signal, sys
from vzip.export.llm import onnx_decoder as llm
from vzip.runtime.cli.main import main
name = sys.argv[1]
real = getattr(llm, name)
def dies(*arguments, **more):
    real(*arguments, **more)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(llm, name, dies)
main(sys.argv[2:])
"""


@pytest.mark.slow
def test_killed_behind_the_last_file_of_the_llm(checkpoint, tmp_path):
    """The old bundle stays, and the next writer removes what was left."""
    output = tmp_path / "bundle"
    shutil.copytree(demo_with_llm(), output)
    before = read_bundle(output).manifest
    options = ["export", "--model", str(checkpoint), *QUICK, "-o", str(output), "--replace"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "write", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    hidden = [path for path in tmp_path.iterdir() if path != output]
    assert len(hidden) == 1
    assert hidden[0].name.startswith(".bundle.")
    assert set(LLM_FILES) < {path.name for path in hidden[0].iterdir()}
    assert read_bundle(output).manifest == before
    with bundle_writer(output, replace=True) as writer:
        copy_files(demo_with_llm(), writer.folder, before.files)
        writer.publish(before)
    assert [path for path in tmp_path.iterdir() if path != output] == []
