"""An edge box: `vzip ask` where torch, transformers and what comes with them can't be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.llm.demo_llm import demo_with_llm
from vzip.runtime import VisionEncoder, demo
from vzip.runtime.llm import TokenSpec
from vzip.runtime.llm.local.transformers import TransformersLLM

pytestmark = pytest.mark.local_llm

ABSENT = ("torch", "transformers", "jinja2", "safetensors", "huggingface_hub", "onnx", "tqdm")

# `-I` would hide the repository too; what is absent is made so before anything of vzip is imported.
EDGE = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from vzip.runtime.cli.main import main
status = main(sys.argv[2:])
loaded = {name.split(".")[0] for name, module in sys.modules.items() if module is not None}
foreign = sorted(
    name for name in loaded
    if "site-packages" in (getattr(sys.modules.get(name), "__file__", None) or "")
)
print("loaded:", *foreign, file=sys.stderr)
sys.exit(status)
"""


def edge(*arguments: str | Path, stdin: str = "") -> tuple[str, list[str]]:
    """Return what a command says on an edge box, and the packages it had loaded at its end."""
    command = [sys.executable, "-c", EDGE, ",".join(ABSENT), *map(str, arguments)]
    home = {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **home},
    )
    assert done.returncode == 0, done.stderr
    *rest, loaded = done.stderr.splitlines()
    assert rest == []
    return done.stdout, loaded.removeprefix("loaded: ").split()


@pytest.fixture(scope="module")
def questions() -> dict[str, list[str]]:
    asked = json.loads((demo.pictures() / "questions.json").read_text())
    return {name: [each["question"] for each in several] for name, several in asked.items()}


@pytest.fixture(scope="module")
def expected(questions: dict[str, list[str]]) -> dict[str, list[str]]:
    """What transformers answers, with torch, in this process."""
    answers = {}
    with VisionEncoder.open(demo_with_llm()) as encoder:
        llm = TransformersLLM.open("demo", tokens=TokenSpec.of(encoder.manifest), device="cpu")
        for name, asked in questions.items():
            conversation = llm.conversation(encoder.image_tokens(demo.pictures() / name))
            answers[name] = [conversation.ask(question) for question in asked]
    return answers


@pytest.mark.slow
def test_a_question_is_answered(questions, expected):
    name = next(iter(questions))
    picture = demo.pictures() / name
    out, loaded = edge("ask", demo_with_llm(), picture, questions[name][0])
    assert out == expected[name][0] + "\n"
    assert {"numpy", "PIL", "onnxruntime", "tokenizers"} <= set(loaded)
    assert not set(ABSENT) & set(loaded)


@pytest.mark.slow
def test_a_conversation_goes_on(questions, expected):
    for name, asked in questions.items():
        picture = demo.pictures() / name
        out, _ = edge("chat", demo_with_llm(), picture, stdin="\n".join(asked))
        assert out.splitlines() == expected[name]


@pytest.mark.slow
def test_several_images(questions):
    pictures = [demo.pictures() / name for name in questions][:2]
    question = next(iter(questions.values()))[0]
    out, _ = edge("ask", demo_with_llm(), *pictures, question)
    with VisionEncoder.open(demo_with_llm()) as encoder:
        llm = TransformersLLM.open("demo", tokens=TokenSpec.of(encoder.manifest), device="cpu")
        encoded = [encoder.image_tokens(picture) for picture in pictures]
    assert out == llm.ask(encoded, question) + "\n"
