"""Chat templates as they are out there: vzip asks what the template writes, turn for turn."""

from __future__ import annotations

import importlib.util
import resource
import shutil
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from tests.bundles import copy_files
from tests.parity.tiny_llm import IMAGE, make_tokenizer
from tests.places import GOLDEN
from tests.refusals import refused
from tests.runtime.llm.chat_templates import PARTS, TEMPLATES, TEXTS, TOKENS, Template
from tests.runtime.llm.tiny_checkpoints import WIDTH as LLM_WIDTH
from tests.runtime.llm.tiny_checkpoints import save_checkpoint, sentencepiece
from vzip.calibration.tuning.data import Turn
from vzip.calibration.tuning.text import Wording
from vzip.export.llm import onnx_decoder
from vzip.export.llm.gguf import convert
from vzip.runtime import demo
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.bundle.writer import bundle_writer
from vzip.runtime.errors import CheckpointError, MissingDependencyError
from vzip.runtime.llm import rendering
from vzip.runtime.llm.chat_template import make_prompts
from vzip.runtime.llm.conversation import GreedyLLM
from vzip.runtime.llm.local.llama_cpp import LlamaCppLLM
from vzip.runtime.llm.local.onnx_decoder import OnnxRuntimeLLM
from vzip.runtime.llm.local.transformers import TransformersLLM
from vzip.runtime.llm.rendering import Chat, render
from vzip.runtime.llm.text_side import TextSide

WIDTH = 4
QUESTIONS = ("what is it?", "is it red?", "and the 7?")
ANSWERS = ("a red circle", "it is below", "red")


def tokenizer_of(template: Template, kind: str = "bytes") -> Any:
    tokenizer = make_tokenizer(kind, TOKENS)
    tokenizer.eos_token = template.eos
    return tokenizer


def messages_of(name: str, turns: int) -> list[dict[str, Any]]:
    """A conversation of some questions, in the form that a template takes."""
    messages: list[dict[str, Any]] = []
    for turn in range(turns):
        if name in TEXTS:
            place = "<image>\n" * (turn == 0 and name != "writes the image")
            question: Any = place + QUESTIONS[turn]
        else:
            question = [{"type": "image"}] * (turn == 0)
            question += [{"type": "text", "text": QUESTIONS[turn]}]
        messages.append({"role": "user", "content": question})
        if turn + 1 < turns:
            texts = name in TEXTS or name == "pixtral"
            answer: Any = [{"type": "text", "text": ANSWERS[turn]}]
            messages.append({"role": "assistant", "content": ANSWERS[turn] if texts else answer})
    return messages


def theirs(name: str, tokenizer: Any, turns: int) -> list[int]:
    """The ids of a whole conversation by transformers alone; bos once, as its processors do it."""
    text = tokenizer.apply_chat_template(
        messages_of(name, turns),
        chat_template=TEMPLATES[name].text,
        tokenize=False,
        add_generation_prompt=True,
    )
    ids: list[int] = tokenizer(text, add_special_tokens=not text.startswith("<s>")).input_ids
    return ids


class Scripted(GreedyLLM):
    """An LLM that says what it is told to."""

    name = "scripted"
    largest = 1e30

    def __init__(self, text: TextSide) -> None:
        self.text = text
        self.says: list[int] = []

    def new_cache(self) -> None:
        return None

    def step(self, ids: list[int], cache: Any, rows: Any, positions: Any = None) -> int:
        return self.says.pop(0)


def scripted(name: str, tokenizer: Any) -> Scripted:
    prompts = make_prompts("tests", tokenizer, {"image": IMAGE}, TEMPLATES[name].text)
    return Scripted(TextSide("tests", prompts, prompts.ends, WIDTH, None, None))


def find(ids: list[int], part: list[int], start: int) -> int:
    return next(n for n in range(start, len(ids)) if ids[n : n + len(part)] == part)


@pytest.mark.parametrize("kind", ["bytes", "first", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_s_ids_are_apply_chat_template_s(name: str, kind: str) -> None:
    template = TEMPLATES[name]
    tokenizer = tokenizer_of(template, kind)
    llm = scripted(name, tokenizer)
    closing = list(llm.text.prompts.closing)
    assert tokenizer.decode(closing).strip() == template.close.strip()
    asked = [theirs(name, tokenizer, turns) for turns in (1, 2, 3)]
    # Behind an answer: how its own ids are made of its text is the LLM's business.
    tails = [asked[n][find(asked[n], closing, len(asked[n - 1])) :] for n in (1, 2)]
    said = [tokenizer(answer, add_special_tokens=False).input_ids for answer in ANSWERS]
    expected = [*asked[0], *said[0], *tails[0], *said[1], *tails[1]]
    eos = [tokenizer.eos_token_id]
    spelt = closing if closing[-1] in llm.text.eos_ids else closing + eos
    for end in (spelt, closing[-1:] if spelt == closing else eos, eos, []):
        conversation = llm.conversation(np.zeros((1, WIDTH), np.float32))
        for question, answer in zip(QUESTIONS, said, strict=True):
            llm.says = [*answer, *end]
            conversation.ask(question, max_new_tokens=len(llm.says))
            assert not llm.says
        assert list(conversation.ids)[: len(expected)] == expected


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_first_turn_is_the_template_s(name: str, count: int) -> None:
    template = TEMPLATES[name]
    tokenizer = tokenizer_of(template)
    prompts = make_prompts("tests", tokenizer, {"image": IMAGE}, template.text)
    text = prompts.first_text("what is it?", "image", 1)
    assert f"{template.image}what is it?" in text
    assert "'type'" not in text
    if name in ("joycaption", "writes the image") and count == 2:
        with refused(CheckpointError, got="2 images", cure="one"):
            prompts.first_text("what is it?", "image", 2)
        return
    message = messages_of(name, 1)
    if count == 2:
        content = message[0]["content"]
        twice = "<image>\n" + content if isinstance(content, str) else [{"type": "image"}, *content]
        message[0]["content"] = twice
    expected = tokenizer.apply_chat_template(
        message, chat_template=template.text, tokenize=False, add_generation_prompt=True
    )
    assert prompts.first_text("what is it?", "image", count) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_render_is_transformers_own(name: str) -> None:
    template = TEMPLATES[name]
    tokenizer = tokenizer_of(template)
    chats = [Chat(messages_of(name, n), add) for n in (1, 2, 3) for add in (True, False)]
    found = render("it", template.text, tokenizer.special_tokens_map, chats)
    assert [(each.text, each.fault) for each in found] == [
        (
            tokenizer.apply_chat_template(
                chat.messages,
                chat_template=template.text,
                tokenize=False,
                add_generation_prompt=chat.generate,
            ),
            "",
        )
        for chat in chats
    ]


@pytest.mark.parametrize("name", ["llama-3", "gemma", "vicuna", "llama-2"])
def test_what_is_tuned_on_are_the_conversation_s_ids(name: str) -> None:
    tokenizer = tokenizer_of(TEMPLATES[name])
    llm = scripted(name, tokenizer)
    closing = list(llm.text.prompts.closing)
    wording = Wording(types.SimpleNamespace(text=llm.text, tokenizer=tokenizer), 1)  # type: ignore[arg-type]
    turns = [Turn(question, answer) for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    ids = wording.example(turns[:2]).ids.tolist()
    whole = theirs(name, tokenizer, 2)
    tail = whole[find(whole, closing, len(theirs(name, tokenizer, 1))) :]
    start = find(ids, tail, 0)
    assert ids[start - 1] not in llm.text.eos_ids, "one end"
    assert ids[-len(closing) :] == closing


# ── the same through every local LLM ─────────────────────────────────────────────────────────────


def opened(name: str, folder: Path) -> dict[str, GreedyLLM]:
    """A tiny checkpoint with a template, opened by every local LLM that can be run here."""
    template = TEMPLATES[name]
    tokenizer = sentencepiece("prepend")
    tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS[5:])})
    tokenizer.eos_token = template.eos
    save_checkpoint(folder / "llava", tokenizer, template=template.text)
    theirs = TransformersLLM.open(folder / "llava", device="cpu")
    llms: dict[str, GreedyLLM] = {"transformers": theirs}
    tiny = read_bundle(GOLDEN / "tiny_bundle")
    with bundle_writer(folder / "bundle") as writer:
        copy_files(tiny.path, writer.folder, tiny.manifest.files)
        copy = TransformersLLM.open(folder / "llava", device="cpu")  # its weights are laid out anew
        onnx_decoder.write(copy, writer.folder, precision="fp32")
        llms["onnxruntime"] = OnnxRuntimeLLM(writer.publish(tiny.manifest))
    convert(folder / "llava", folder / "tiny.gguf")
    if importlib.util.find_spec("llama_cpp"):
        llms["llama.cpp"] = LlamaCppLLM(folder / "tiny.gguf", tokens=None)
    return llms


def says(step: Any, script: list[int]) -> Any:
    """A step that runs the LLM, and has it say what is written."""
    return lambda *call: (step(*call), script.pop(0))[1]


@pytest.mark.slow
@pytest.mark.local_llm
@pytest.mark.parametrize("name", ["llama-3", "phi-3", "gemma", "chatml", "glm", "llama-2"])
def test_every_local_llm_has_the_ids_of_apply_chat_template(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for runner, llm in opened(name, tmp_path).items():
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            tmp_path / "llava", trust_remote_code=False
        )
        image = llm.text.prompts.placeholders["image"]
        closing = list(llm.text.prompts.closing)
        said = [tokenizer(each, add_special_tokens=False).input_ids for each in ANSWERS]
        asked = [theirs(name, tokenizer, turns) for turns in (1, 2, 3)]
        tails = [asked[n][find(asked[n], closing, len(asked[n - 1])) :] for n in (1, 2)]
        place = asked[0].index(image)
        first = [*asked[0][:place], *[image] * 3, *asked[0][place + 1 :]]
        expected = [*first, *said[0], *tails[0], *said[1], *tails[1]]
        real = llm.step
        assert closing[-1] in llm.text.eos_ids
        for end in ([closing[-1]], [tokenizer.eos_token_id], []):
            conversation = llm.conversation(np.zeros((3, LLM_WIDTH), np.float32))
            for question, answer in zip(QUESTIONS, said, strict=True):
                script = [*answer, *end]
                monkeypatch.setattr(llm, "step", says(real, script))
                conversation.ask(question, max_new_tokens=len(script))
            found = list(conversation.ids)[: len(expected)]
            assert found == expected, f"{runner}, ended by {end}"


# ── what can't be rendered, is dropped or printed ────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("template", "got", "expected"),
    [
        ("{{ messages }}", ("as Python prints them",), "their text"),
        ("<image>{% for m in messages %}{{ m }}{% endfor %}", ("as Python prints them",), ""),
        ("{{ 1 / 0 }}", ("ZeroDivisionError",), ""),
        ("{% for m in messages %}{{ m.content }", ("TemplateSyntaxError",), ""),
        ("{{ raise_exception('not\ntoday') }}", ("TemplateError: not today",), ""),
        ("{{ ''.__class__.__mro__ }}", ("SecurityError",), ""),
        ("{% include 'x' %}", ("TypeError",), ""),
        ("{{ nothing + messages[0]['content'] }}", ("'nothing' is undefined",), ""),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", ("RecursionError",), ""),
        ("{{ 'a' * 10 ** 10 }}", ("MemoryError",), ""),
        ("{% for i in range(10 ** 9) %}a{% endfor %}", ("OverflowError",), ""),
        ("{{ 'a' * 2 ** 21 }}", ("writes 2097152 characters",), ""),
        ("<image>{{ messages[0]['content'] | upper }}", ("a question 0 times",), "as it is"),
        ("{{ messages[0]['content'] | e }}", ("a question 0 times",), "as it is"),
        ("{{ messages[0]['content'] | replace('\n', ' ') }}", ("a question 0 times",), ""),
        ("{{ messages[0]['content'][:9] }}", ("a question 0 times",), ""),
        ("{% for m in messages %}{% endfor %}", ("a question 0 times",), ""),
    ],
)
def test_what_is_no_template_of_messages_is_one_line(template, got, expected):
    with refused(
        CheckpointError, got=("a.jinja of 'b'", *got), expected=expected, cure="a.jinja of 'b'"
    ) as raised:
        make_prompts("tests", make_tokenizer(), {"image": IMAGE}, template, home="a.jinja of 'b'")
    assert "\n" not in str(raised.value)


def test_another_image_token_is_named():
    template = PARTS["llama-3.2-vision"].text.replace("<image>", "<|image|>")
    with refused(CheckpointError, got="'<|image|>\\n'", expected="'<image>'"):
        make_prompts("tests", make_tokenizer(), {"image": IMAGE}, template)


def test_a_template_that_counts_images_takes_one():
    template = (
        "{% set n = namespace(i=0) %}{% for c in messages[0]['content'] %}"
        "{% if c['type'] == 'image' %}{% set n.i = n.i + 1 %}{{ 'P ' ~ n.i ~ ': <image>\\n' }}"
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    )
    prompts = make_prompts("tests", make_tokenizer(), {"image": IMAGE}, template)
    assert prompts.first_text("what?") == "P 1: <image>\nwhat?"
    with refused(CheckpointError, got="2 images", cure="one"):
        prompts.first_text("what?", "image", 2)


def test_a_special_token_that_the_tokenizer_lacks_is_named():
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    template = TEXTS["llama-3"].text
    with refused(CheckpointError, got="'bos_token' is undefined"):
        make_prompts("tests", tokenizer, {"image": IMAGE}, template)
    assert make_prompts("tests", tokenizer, {"image": IMAGE}, TEXTS["mistral"].text)


@pytest.mark.parametrize(
    "template",
    [
        # The answer's header is written only where there is an answer.
        TEXTS["chatml"].text.replace("add_generation_prompt", "false"),
        # The turns before are summed up.
        "{{ messages | length }}<image>{{ messages[-1]['content'] }}",
        # Answers are shortened.
        TEXTS["chatml"].text.replace(
            "m['content']", "(m['content'] if m['role'] == 'user' else m['content'][:40])"
        ),
        # One turn is all.
        "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
        + TEXTS["chatml"].text,
    ],
)
def test_turns_that_are_written_otherwise_when_they_are_over_end_a_conversation(template):
    prompts = make_prompts("tests", make_tokenizer(), {"image": IMAGE}, template)
    assert prompts.words.later is None
    with refused(CheckpointError, got="the assistant's turns", cure="vzip ask"):
        prompts.later("why?")


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** 10 ** 10 }}",
        "{% macro a(n) %}{% if n %}{{ a(n-1) }}{{ a(n-1) }}{% endif %}{% endmacro %}{{ a(99) }}",
        "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s=n.s~n.s %}{% endfor %}",
        "{{ '%0999999999999d' | format(1) }}",
        "{{ 'a' | center(99999999999) }}",
        "{{ lipsum(n=9999999) }}",
        "{{ [1] * 10 ** 11 }}",
    ],
)
def test_a_template_without_end_ends(template):
    begun, largest = (time.process_time(), time.monotonic()), _largest_child()
    with refused(CheckpointError, got="chat template"):
        make_prompts("tests", make_tokenizer(), {"image": IMAGE}, template)
    assert time.process_time() - begun[0] < 2, "it takes another process's time"
    assert time.monotonic() - begun[1] < 59
    assert _largest_child() <= max(largest, 2**20)


def _largest_child() -> int:
    """KiB of memory that the largest of this process's children had, of all tests so far."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def test_a_template_of_megabytes_is_refused():
    with refused(CheckpointError, got="1048577 characters", expected="at most"):
        make_prompts("tests", make_tokenizer(), {"image": IMAGE}, "a" * (2**20 + 1))


def test_an_old_jinja_is_refused(monkeypatch):
    monkeypatch.setattr(rendering.metadata, "version", lambda _: "3.1.5")
    with refused(MissingDependencyError, got="3.1.5", expected="3.1.6"):
        render("it", "a", {}, [])


def test_a_date_that_goes_into_a_file_is_said(tmp_path, caplog):
    folder = Path(shutil.copytree(demo.checkpoint(), tmp_path / "a"))
    path = folder / "chat_template.jinja"
    convert(folder, tmp_path / "a.gguf")
    assert not caplog.records
    path.write_text("{{ strftime_now('%d %b %Y') }}" + path.read_text())
    convert(folder, tmp_path / "b.gguf")
    assert ["b.gguf" in record.getMessage() for record in caplog.records] == [True]
    year = time.strftime("%Y")
    assert year in TransformersLLM.open(folder).text.prompts.first_text("what?")
