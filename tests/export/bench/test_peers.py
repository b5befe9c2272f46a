"""The encoders that a bundle is compared with compute what they are called."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from tests.precisions import add_precision
from tests.refusals import refused
from vzip.export.algorithm.budget import Budget, split_tokens
from vzip.export.bench.peers import UNCOMPRESSED, prove
from vzip.export.bench.peers.catalogue import open_peer
from vzip.export.bench.peers.ceiling import Ceiling, flops
from vzip.export.bench.peers.torch_forms import Published, Sdpa, TorchEncoder, Uncompressed
from vzip.export.checkpoint.reader import vision_config
from vzip.export.graph.trace import GraphOptions
from vzip.export.pipeline import WeightSource, describe
from vzip.runtime.agreement import Reference
from vzip.runtime.bundle.manifest import EMBEDS, KEPT
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.errors import InvalidInputError, MissingDependencyError


@pytest.fixture(scope="module")
def demo():
    return WeightSource("demo").load()


def manifest(demo, **options):
    weights, model = demo
    settings = {"merge": "sum", "precision": "fp32", "batch": 2, **options}
    return describe(
        weights.config,
        model,
        budget=Budget(*split_tokens(43), merge=settings["merge"]),
        precision=settings["precision"],
        options=GraphOptions(batch=settings["batch"]),
    )


def pictures(manifest):
    shape = (manifest.batch.max, *manifest.input.shape[1:])
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("merge", ["sum", "average"])
def test_the_published_form_and_ours_agree(demo, merge):
    wanted = manifest(demo, merge=merge)
    images = torch.from_numpy(pictures(wanted))
    with torch.inference_mode():
        published = Published(demo[0], wanted, torch.float32).float().eval()(images)
        ours = Sdpa(demo[0], wanted, torch.float32).float().eval()(images)
    torch.testing.assert_close(published[1], ours[1], rtol=0, atol=0)
    torch.testing.assert_close(published[0], ours[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_ours_compiles_without_a_break(demo):
    """Under TorchDynamo, without the code generator, which needs a compiler."""
    wanted = manifest(demo, batch=1)
    images = torch.from_numpy(pictures(wanted))
    module = Sdpa(demo[0], wanted, torch.float32).float().eval()
    with torch.inference_mode():
        plain = module(images)
        compiled = torch.compile(module, backend="eager", fullgraph=True)(images)
    torch.testing.assert_close(plain, compiled, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["torch-published", "torch-sdpa"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_in_half_precision_from_host_to_host(demo, form, precision):
    wanted = manifest(demo)
    full, half = (
        TorchEncoder(form, each, Bundle(Path(), wanted), "cpu").run(pictures(wanted))
        for each in ("fp32", precision)
    )
    # numpy has no BF16.
    assert half[EMBEDS].dtype == (np.float16 if precision == "fp16" else np.float32)
    assert not np.array_equal(half[EMBEDS], full[EMBEDS])
    assert half[KEPT].dtype == np.int64
    assert half[EMBEDS].shape == full[EMBEDS].shape
    same = np.mean([len({*a} & {*b}) / len(a) for a, b in zip(half[KEPT], full[KEPT], strict=True)])
    assert same > 0.9


def test_without_compression_the_kept_patches_are_the_same(demo):
    wanted = manifest(demo)
    images = torch.from_numpy(pictures(wanted))
    with torch.inference_mode():
        every, tokens = Uncompressed(demo[0], wanted, torch.float32).float().eval()(images)
        embeds, kept = Sdpa(demo[0], wanted, torch.float32).float().eval()(images)
    assert every.shape[1] == tokens.shape[1] == wanted.tower.tokens - 1
    for row in range(len(images)):
        patches = kept[row][kept[row] > 0]
        got = every[row][torch.isin(tokens[row], patches)]
        expected = embeds[row, : kept.shape[1]][kept[row] > 0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_patches_that_differ_are_not_proven(demo):
    wanted = manifest(demo)
    encoder = TorchEncoder(UNCOMPRESSED, "fp32", Bundle(Path(), wanted), "cpu")
    images = pictures(wanted)
    outputs = TorchEncoder("torch-sdpa", "fp32", Bundle(Path(), wanted), "cpu").run(images)
    scores = np.zeros((len(images), wanted.tower.tokens - 1), np.float32)
    right = Reference(images, outputs[KEPT], scores, outputs[EMBEDS])
    assert encoder.prove(right, [2])["passed"] is True
    wrong = dataclasses.replace(right, embeds=np.roll(right.embeds, 1, axis=1))
    assert encoder.prove(wrong, [2])["passed"] is False


def test_what_the_forms_can_not_be_is_said(demo):
    wanted = manifest(demo)
    tuned = dataclasses.replace(wanted.model, projector="0" * 64)
    with refused(InvalidInputError, got="projector", cure="--projector"):
        TorchEncoder(
            "torch-sdpa", "fp32", Bundle(Path(), dataclasses.replace(wanted, model=tuned)), "cpu"
        )
    other = dataclasses.replace(wanted.selection, method="random")
    with refused(InvalidInputError, got="'random'"):
        TorchEncoder(
            "torch-sdpa",
            "fp32",
            Bundle(Path(), dataclasses.replace(wanted, selection=other)),
            "cpu",
        )


def test_the_flops_of_llava():
    """The specification says about 366 GFLOP for the 23 layers that are needed."""
    config = vision_config("llava-1.5-7b")
    size, width, inner = 577, 1024, 4096
    layers = 23 * 2 * (4 * size * width**2 + 2 * size**2 * width + 2 * size * width * inner)
    assert layers == pytest.approx(366e9, rel=0.01)
    beside = 2 * (576 * 3 * 14 * 14 * width + 64 * (width * 4096 + 4096 * 4096))
    assert flops(config, 64, 1) == layers + beside
    assert flops(config, 64, 8) == 8 * flops(config, 64, 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_ceiling_multiplies_what_it_counts(demo, precision):
    ceiling = Ceiling(manifest(demo), precision, 2, "cpu")
    done = sum(2 * times * one.out.numel() * one.left.shape[-1] for times, one in ceiling.work)
    assert done == ceiling.flops == flops(demo[0].config, 43, 2)
    ceiling.call()
    for _, one in ceiling.work:
        expected = one.left.double() @ one.right.double()
        torch.testing.assert_close(one.out.double(), expected, rtol=1e-2, atol=0.1)
    kinds = {one.left.dtype for _, one in ceiling.work}
    assert kinds == {"fp32": {torch.float32}, "bf16": {torch.bfloat16},
                     "int8": {torch.int8, torch.bfloat16}}[precision]  # fmt: skip


@pytest.mark.slow
def test_a_manifest_with_another_merge_is_another_function(demo):
    wanted = manifest(demo, merge="sum")
    other = dataclasses.replace(
        wanted, selection=dataclasses.replace(wanted.selection, merge="average")
    )
    images = torch.from_numpy(pictures(wanted))
    with torch.inference_mode():
        first, second = (
            Published(demo[0], each, torch.float32).float().eval()(images)[0]
            for each in (wanted, other)
        )
    assert not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize(("name", "precision"), [("onnxruntime-plain", "fp32"),
                                                 ("onnxruntime-dynamic", "int8")])  # fmt: skip
def test_onnx_runtime_as_it_comes_and_quantised_by_itself(tiny_bundle, golden, name, precision):
    peer = open_peer(name, precision, read_bundle(tiny_bundle), "cpu")
    outputs = peer.run(golden["images"][:3])
    np.testing.assert_array_equal(outputs[KEPT], golden["kept"][:3])
    error = np.abs(outputs[EMBEDS] - golden["embeds"][:3]).max()
    # Eight bits lose something, and not much.
    assert (error < 1e-4) if precision == "fp32" else (1e-4 < error < 0.3)


class OpenVino(ModuleType):
    """Stands in for the package: says what it was asked for, and answers with ones."""

    def __init__(self, manifest):
        super().__init__("openvino")
        self.manifest, self.read, self.settings = manifest, [], []

    def Core(self):  # noqa: N802 - OpenVINO's name
        return self

    def read_model(self, path):
        self.read.append(Path(path).name)

    def compile_model(self, model, device, settings):
        self.settings.append((device, settings))
        return self

    def create_infer_request(self):
        return self

    def infer(self, inputs, *, share_inputs):
        self.images = inputs[0]

    def get_tensor(self, name):
        shape = {each.name: each.shape[1:] for each in self.manifest.outputs}[name]
        return SimpleNamespace(data=np.ones((len(self.images), *shape)))


def test_openvino_gets_the_graph_and_the_precision(monkeypatch, tiny_bundle, golden):
    bundle = read_bundle(tiny_bundle)
    openvino = OpenVino(bundle.manifest)
    monkeypatch.setitem(sys.modules, "openvino", openvino)
    for precision in ("fp32", "bf16"):
        peer = open_peer("openvino", precision, bundle, "cpu")
        assert peer.run(golden["images"][:2])[EMBEDS].shape == (2, 7, 6)
    assert openvino.read == ["model.onnx"] * 2
    hints = [settings["INFERENCE_PRECISION_HINT"] for _, settings in openvino.settings]
    assert hints == ["f32", "bf16"]
    assert sys.modules["openvino_telemetry"] is None  # nothing is reported to anyone
    for name in ("openvino", "openvino-f32"):
        with refused(InvalidInputError, got=("INT8", name), cure="vzip calibrate"):
            open_peer(name, "int8", bundle, "cpu")
    with refused(InvalidInputError, got=("openvino", "cuda", "'fp16'"), expected="none"):
        open_peer("openvino", "fp16", bundle, "cuda")


@pytest.mark.parametrize(("name", "hint"), [("openvino", None), ("openvino-f32", "f32")])
def test_openvino_gets_the_int8_graph(monkeypatch, tiny_bundle, name, hint):
    bundle = add_precision(tiny_bundle)
    openvino = OpenVino(bundle.manifest)
    monkeypatch.setitem(sys.modules, "openvino", openvino)
    open_peer(name, "int8", bundle, "cpu")
    assert openvino.read == ["model.int8.onnx"]
    ((device, settings),) = openvino.settings
    assert (device, settings.get("INFERENCE_PRECISION_HINT")) == ("CPU", hint)


def test_without_openvino_it_is_one_line(monkeypatch, tiny_bundle):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with refused(MissingDependencyError, cure="vzip[openvino]"):
        open_peer("openvino", "fp32", read_bundle(tiny_bundle), "cpu")


def test_merged_tokens_exclude_no_coarser_encoder(demo):
    wanted = manifest(demo)
    bundle, images = Bundle(Path(), wanted), pictures(wanted)
    outputs = TorchEncoder("torch-sdpa", "fp32", bundle, "cpu").run(images)
    patches = np.ones((len(images), wanted.tower.tokens - 1), np.float32)
    right = Reference(images, outputs[KEPT], patches, outputs[EMBEDS])
    dominant = wanted.selection.dominant
    merged, kept = outputs[EMBEDS].copy(), outputs[EMBEDS].copy()
    merged[:, dominant:] *= -1
    kept[:, :dominant] *= -1

    def passed(embeds, within):
        run = {EMBEDS: embeds, KEPT: outputs[KEPT]}
        return prove(lambda _: run, right, bundle, [2], within)["passed"]

    assert passed(outputs[EMBEDS], "fp32")
    assert not passed(merged, "fp32")
    assert passed(merged, "bf16")
    assert not passed(kept, "bf16")
