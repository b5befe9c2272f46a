"""Servers and checkpoints that stand in for LLM servers which need a GPU."""

from __future__ import annotations

import contextlib
import json
import shutil
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.places import GOLDEN
from tests.runtime.llm.fake_chat_server import Handler, event, fake_server, stream
from vzip.runtime import demo
from vzip.runtime.bundle.manifest import Llm, Selection
from vzip.runtime.bundle.origin import Model
from vzip.runtime.llm.local.transformers import TransformersLLM

REQUESTS = json.loads((GOLDEN / "llm_requests.json").read_text())

WIDTH, IMAGE, VOCABULARY = 128, 4, 431  # of the demo model
Answer = Callable[[Mapping[str, Any]], Iterator[Any]]


def embeds_of(count: int, seed: int = 0) -> np.ndarray:
    """Tokens of the size of the demo model's own."""
    generator = np.random.default_rng(seed)
    return generator.standard_normal((count, WIDTH)).astype(np.float32)


def bundle_of(model: str = "demo", family: str = "llava", tokens: int = 43) -> Any:
    """What of a bundle an LLM server's `open_for` reads."""
    return types.SimpleNamespace(
        manifest=types.SimpleNamespace(
            model=Model(model, None, family, "checkpoint", None),
            selection=Selection("visionzip", tokens - 3, 3, "average", True),
            tiling=None,
            llm=Llm(WIDTH, IMAGE),
            tower=types.SimpleNamespace(pool=1),
        )
    )


def checkpoint_of(folder: Path, **changes: Any) -> Path:
    """Copy the text side of the demo model, with changes to its configuration."""
    folder.mkdir()
    for path in demo.checkpoint().iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def embedded(llm: TransformersLLM, ids: list[int], rows: np.ndarray) -> torch.Tensor:
    """The reference: what the LLM takes for a prompt, [m, L]."""
    with torch.no_grad():
        return llm._embeddings(torch.tensor([ids]), rows)[0]


def greedy(llm: TransformersLLM, prompt: torch.Tensor, most: int) -> Iterator[int]:
    """Decode by running the whole sequence anew for each token: slow, and without a cache."""
    table = llm.model.get_input_embeddings()
    with torch.no_grad():
        for _ in range(most):
            logits = llm.model(inputs_embeds=prompt[None]).logits[0, -1]
            token = int(logits.argmax())
            yield token
            if token in llm.text.eos_ids:
                return
            prompt = torch.cat([prompt, table(torch.tensor([token]))])


@contextlib.contextmanager
def serving(
    pages: Mapping[str, Any], path: str, answer: Answer, *, whole: bool = True
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server with some JSON pages and one path that answers a POST with events.

    Args:
        pages: Path → what it holds.
        path: The path that takes POST.
        answer: Body → the events that answer it.
        whole: Whether the stream is ended as it should be.

    Yields:
        Its address, and the bodies that it got, which grow.
    """
    bodies: list[dict[str, Any]] = []

    def reply(handler: Handler, body: Any) -> None:
        bodies.append(body)
        end = [event("[DONE]")] if whole else []
        stream(handler, [*map(event, answer(body)), *end])

    with fake_server() as fake:
        fake.pages, fake.reply = {**pages, path: reply}, reply
        yield fake.url, bodies
