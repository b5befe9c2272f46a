"""The PyTorch encoders that engines are compared with compute what they are called."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.torch_encoders import Ceiling, Published, Sdpa, TorchEncoder, flops
from vzip.export.budget import split_tokens
from vzip.export.checkpoint import vision_config
from vzip.export.onnx_graph import GraphOptions
from vzip.export.pipeline import Method, WeightSource, describe
from vzip.runtime.manifest import EMBEDS, KEPT


@pytest.fixture(scope="module")
def demo():
    return WeightSource("demo").load()


def manifest(demo, **options):
    weights, model = demo
    settings = {"merge": "sum", "precision": "fp32", "batch": 2, **options}
    return describe(
        weights.config,
        model,
        method=Method(split_tokens(43), settings["merge"]),
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


def test_ours_compiles_without_a_break(demo):
    """Under TorchDynamo, without the code generator, which needs a compiler."""
    wanted = manifest(demo, batch=1)
    images = torch.from_numpy(pictures(wanted))
    module = Sdpa(demo[0], wanted, torch.float32).float().eval()
    with torch.inference_mode():
        plain = module(images)
        compiled = torch.compile(module, backend="eager", fullgraph=True)(images)
    torch.testing.assert_close(plain, compiled, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["pytorch-eager", "pytorch-sdpa"])
def test_in_fp16_from_host_to_host(demo, form):
    full, half = (
        TorchEncoder(form, "demo", manifest(demo, precision=precision), "cpu").run(
            pictures(manifest(demo))
        )
        for precision in ("fp32", "fp16")
    )
    assert half[EMBEDS].dtype == np.float16
    assert half[KEPT].dtype == np.int64
    assert half[EMBEDS].shape == full[EMBEDS].shape
    same = np.mean([len({*a} & {*b}) / len(a) for a, b in zip(half[KEPT], full[KEPT], strict=True)])
    assert same > 0.9


def test_the_flops_of_llava():
    """The specification says about 366 GFLOP for the 23 layers that are needed."""
    config = vision_config("llava-1.5-7b")
    size, width, inner = 577, 1024, 4096
    layers = 23 * 2 * (4 * size * width**2 + 2 * size**2 * width + 2 * size * width * inner)
    assert layers == pytest.approx(366e9, rel=0.01)
    beside = 2 * (576 * 3 * 14 * 14 * width + 64 * (width * 4096 + 4096 * 4096))
    assert flops(config, 64, 1) == layers + beside
    assert flops(config, 64, 8) == 8 * flops(config, 64, 1)


def test_the_ceiling_multiplies_what_it_counts(demo):
    weights, _ = demo
    ceiling = Ceiling(weights.config, manifest(demo), "cpu")
    done = sum(
        2 * times * left.shape[0] * left.shape[1] * left.shape[2] * right.shape[2]
        for times, left, right, _ in ceiling._work
    )
    assert done == ceiling.flops
    ceiling.call()
    _, left, right, out = ceiling._work[0]
    torch.testing.assert_close(out, left @ right)


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
