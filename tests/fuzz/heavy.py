"""Doors of the exporting side and of calibration, and the commands; see `tests.fuzz.doors`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.fuzz import mutations
from tests.fuzz.doors import Door, Draw, Spoilt, Trial, door, encoded_pictures, inside, odd_array
from tests.fuzz.mutations import TEXTS
from tests.places import GOLDEN

HEAVY: dict[str, Door] = {}


@door(HEAVY)
def a_checkpoints_configuration(folder: Path) -> Draw:
    from tests.export import layouts
    from vzip.export.checkpoint.reader import Checkpoint

    places = []
    for family in layouts.FAMILIES:
        path = folder / family
        layouts.write_layout(layouts.layouts_of(family)[0], path, family=family)
        places.append(path)
    original = folder / "original"
    name = next(each for each in layouts.layouts_of("llava") if layouts._TABLE[each].original)
    layouts.write_layout(name, original)
    places.append(original)
    all_spoilt = [
        Spoilt(place, sorted(str(each.relative_to(place)) for each in place.rglob("*.json")))
        for place in places
    ]

    def draw(rng: random.Random) -> Trial:
        spoilt = rng.choice(all_spoilt)
        spoilt.draw(rng)
        media = rng.choice((None, None, None, "image", "video"))
        return lambda: Checkpoint.open(spoilt.folder).vision(media)

    return draw


@door(HEAVY)
def a_checkpoints_tensors(folder: Path) -> Draw:
    from tests.export import layouts
    from vzip.export.checkpoint.reader import Checkpoint, read_projector, read_vision

    all_spoilt = []
    for name in ("llava-hf", "llava-hf-single", "llava-hf-bin-single", "llava-hf-bin"):
        path = folder / name
        layouts.write_layout(name, path)
        files = [str(each.relative_to(path)) for each in path.rglob("*")]
        tensors = [each for each in files if each.endswith((".safetensors", ".bin", ".index.json"))]
        if tensors:
            all_spoilt.append(Spoilt(path, tensors))

    def draw(rng: random.Random) -> Trial:
        spoilt = rng.choice(all_spoilt)
        name = spoilt.draw(rng)[0]
        path = rng.choice((str(spoilt.folder / name), rng.choice(TEXTS)))

        def trial() -> None:
            weights = read_vision(Checkpoint.open(spoilt.folder))
            read_projector(path, weights.config.projector)

        return trial

    return draw


def _text_side(folder: Path) -> Path:
    """Return a copy of what the demo's checkpoint has of text."""
    from vzip.runtime import demo

    target = folder / "checkpoint"
    target.mkdir()
    for path in demo.checkpoint().iterdir():
        if path.name != "model.safetensors":
            shutil.copyfile(path, target / path.name)
    return target


@door(HEAVY)
def a_text_side(folder: Path) -> Draw:
    from vzip.runtime.llm.text_side import TextCheckpoint

    place = _text_side(folder)
    names = [
        "config.json", "config.json", "tokenizer.json", "tokenizer_config.json",
        "processor_config.json", "generation_config.json", "chat_template.jinja",
    ]  # fmt: skip
    spoilt = Spoilt(place, names)

    def draw(rng: random.Random) -> Trial:
        spoilt.draw(rng)
        question = rng.choice(TEXTS)

        def trial() -> None:
            side = TextCheckpoint.open("fuzz", place)
            side.prompts.first(question)
            side.prompts.later(question)

        return trial

    return draw


TEMPLATES = (
    "{{ messages[0]['content'] }}", "{{ 1/0 }}", "{{ x.y.z }}", "{% for m in messages %}", "{{",
    "{{ raise_exception('no\x1b[2J') }}", "{{ messages[9].content }}", "{% include 'x' %}",
    "{{ ''.__class__.__mro__ }}", "{{ 'a' * 10**12 }}", "{{ messages | tojson }}", "",
    "{% for m in messages %}{{ m.role + m.content }}{% endfor %}", "{{ 10 ** 10 ** 8 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ strftime_now('%\ud800') }}",
    "{% for a in range(10**9) %}{% endfor %}", "{{ messages[0].content[0].text.encode('utf-8') }}",
    "{{ namespace(x=1).y.z }}", "{{ 'x'.format(*messages) }}", "{{ '%d' % 'x' }}",
    "{{ messages | sum }}", "{{ messages | sort }}", "{{ lipsum(n=10**6) }}",
    "{{ 'a'.center(10**11) }}", "{{ [1] * 10**11 }}", "\ud800{{ messages }}",
)  # fmt: skip


@door(HEAVY)
def a_chat_template(folder: Path) -> Draw:
    import transformers

    from vzip.runtime.llm.chat_template import make_prompts

    place = _text_side(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        place, local_files_only=True, trust_remote_code=False
    )
    whole = (place / "chat_template.jinja").read_bytes()

    def draw(rng: random.Random) -> Trial:
        template = rng.choice(TEMPLATES)
        if rng.random() < 0.85:  # the others, of which some never end, take seconds each
            template = mutations.damaged(rng, whole).decode(errors="surrogateescape")
        placeholders = {"image": rng.choice((4, 0, -1, 10**9, 2**40, 5))}
        return lambda: make_prompts("fuzz", tokenizer, placeholders, template)

    return draw


@door(HEAVY)
def images_of_samples(folder: Path) -> Draw:
    from vzip.calibration.samples import Samples, images_of

    pictures = folder / "pictures"
    pictures.mkdir()
    for name, data in encoded_pictures().items():
        (pictures / name).write_bytes(data)
    listing = folder / "list.txt"
    names = [f"pictures/{each.name}" for each in pictures.iterdir()]

    def draw(rng: random.Random) -> Trial:
        lines = [*rng.sample(names, 3), *rng.sample(TEXTS, 3), "\udcff.png"]
        rng.shuffle(lines)
        text = "\n".join(lines).encode(errors="surrogatepass")
        listing.write_bytes(mutations.damaged(rng, text) if rng.random() < 0.3 else text)
        victim = pictures / rng.choice(list(encoded_pictures()))
        victim.write_bytes(mutations.damaged(rng, victim.read_bytes() or b"x"))
        odd = os.fsencode(pictures) + rng.choice((b"/\xff.png", b"/a\nb.png", b"/\x1b[2J.png"))
        Path(os.fsdecode(odd)).write_bytes(encoded_pictures()["png"])
        source = rng.choice((str(listing), str(pictures), rng.choice(TEXTS)))
        if source in ("/", "/etc", "..", ".", "~", "/proc/self/mem", "//", ""):
            source = str(listing)
        count = rng.choice((None, 2, 3, -1, 2**70, True))
        seed = rng.choice((0, 1, -1, 2**70, 10**400))

        def trial() -> None:
            with inside(folder):
                found = Samples.open(source, count=count, seed=seed)
                json.dumps(found.to_json()).encode()
                for each in found:
                    each.read()
                images_of(source, model="x", count=count, say=lambda _: None)

        return trial

    return draw


@door(HEAVY)
def tunings_data(folder: Path) -> Draw:
    from vzip.calibration.tuning.data import InstructionData, choose

    pictures = folder / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(encoded_pictures()["png"])
    data = folder / "data.json"
    records = [
        {
            "id": f"r{number}",
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a thing"},
            ],
        }
        for number in range(3)
    ]  # fmt: skip
    data.write_bytes(json.dumps(records).encode())
    spoilt = Spoilt(folder, ["data.json"])

    def draw(rng: random.Random) -> Trial:
        spoilt.draw(rng)
        path = data if rng.random() < 0.9 else Path(rng.choice(TEXTS))
        place = pictures if rng.random() < 0.9 else Path(rng.choice(TEXTS))
        count = rng.choice((None, 1, 0, -1, 2**70))
        seed = rng.choice((0, -1, 2**70))

        def trial() -> None:
            found = InstructionData(path, place)
            for each in choose(found, count, seed):
                found.read(each.image)
            json.dumps([each.reason for each in found.left_out])

        return trial

    return draw


@door(HEAVY)
def a_run_to_resume(folder: Path) -> Draw:
    import torch

    from vzip.calibration.tuning.session import Session
    from vzip.calibration.tuning.workers import Workers

    run = {"model": "demo", "seed": 1, "budget": {"dominant": 4}, "names": ["a"]}
    work = folder / "p.safetensors.work"
    work.mkdir()
    (work / "run.json").write_bytes(json.dumps(run).encode())
    torch.save(
        {"records": "0" * 64, "step": 3, "tensors": {"a": torch.zeros(4)}}, work / "state.pt"
    )
    spoilt = Spoilt(work, ["run.json", "state.pt", "state.pt"])

    def draw(rng: random.Random) -> Trial:
        spoilt.draw(rng)
        output = folder / rng.choice(("p.safetensors",) * 9 + tuple(
            each for each in TEXTS if each.strip("./~") and not each.startswith("/")
        ))  # fmt: skip

        def trial() -> None:
            with Session(output, run, resume=True, workers=Workers()) as session:
                session.load("0" * 64, torch.device("cpu"))

        return trial

    return draw


@door(HEAVY)
def an_llm_in_a_bundle(folder: Path) -> Draw:
    from tests.fuzz.doors import refresh
    from tests.runtime.llm.demo_llm import demo_with_llm
    from vzip.runtime import open_llm
    from vzip.runtime.bundle.manifest import LLM_FILES

    bundle = folder / "bundle"
    shutil.copytree(demo_with_llm(), bundle)
    small = [name for name in LLM_FILES if name in ("llm.json", "tokenizer.json")]
    small += [name for name in LLM_FILES if name.endswith(".npy")]
    small += [name for name in LLM_FILES if name.endswith(".json") and name not in small]
    spoilt = Spoilt(bundle, small)

    def draw(rng: random.Random) -> Trial:
        spoilt.draw(rng)
        with contextlib.suppress(OSError):
            refresh(bundle)

        def trial() -> None:
            llm = open_llm(bundle)
            rows = np.zeros((43, 128), np.float32)
            llm.ask(rows, "what?", max_new_tokens=2)

        return trial

    return draw


# ── commands ────────────────────────────────────────────────────────────────────────────────────

# {b} is a bundle, {m} a model, {p} a picture, {o} an output without its suffix. What takes long to
# run has a bundle or model that is refused when it is read.
COMMANDS = (
    "ask {b} {p} what? --llm vllm:http://127.0.0.1:9 --max-new-tokens 3",
    "chat {b} {p} --llm sglang:http://127.0.0.1:9 --frames 3",
    "show {b} {p} --backend onnxruntime --precision fp32 -o {o}.png",
    "encode {b} {p} --backend onnxruntime --shard-size 2 -o {o}.safetensors",
    "encode {b} {p} --engine x -o {o}.npy",
    "inspect {b} --engine x",
    "inspect {b} --json",
    "plan --model {m} --target l4 --tokens 64,128 --text-tokens 10 --max-latency-ms 5",
    "plan --model llava-1.5-7b --target orin-nx-16gb --tokens 64 --max-latency-ms 5 --json",
    "models --json",
    "targets",
    "export --model {x} --tokens 64 --batch 2 --opset 17 --seed 1 --weights random -o {o}",
    "export --model {x} --dominant 3 --contextual 2 --projector {p} --target l4 -o {o}",
    "convert --model {x} --to gguf -o {o}.gguf",
    "check {x} {p} --projector {p}",
    "build {x} --cpu --name n --workspace 3 --builder-optimization-level 2",
    "build {x} --rtx sm89 --opt-batch 2",
    "calibrate {x} --images {p} --precision int8 --count 3 --smooth 0.5 --min-agreement 0.9",
    "tune --model {x} --data {p} --images {p} --tokens 22 --count 3 --seed 3 -o {o}.safetensors",
    "sweep --model {x} --tokens 6,7 --images {p} --count 3 --max-latency-ms 3 -o {o}",
    "report {x} --images {p} --count 3 -o {o}.html",
    "bench {x} --rounds 3 --batches 1,2 --only onnxruntime -o {o}",
)


def _run(folder: Path, words: list[str], questions: str) -> None:
    """Run a command in a folder; it has to say on standard error why it isn't done."""
    from vzip.runtime.cli.main import main

    said = io.StringIO()
    stdin, sys.stdin = sys.stdin, io.StringIO(questions)
    try:
        with (
            inside(folder),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(said),
        ):
            status = main(words)
    finally:
        sys.stdin = stdin
    lines = said.getvalue().splitlines()
    assert status in (0, 1, 2), (status, words)
    assert status != 2 or "error: " in lines[-1], (lines[-3:], words)
    assert all(each.isprintable() for each in lines), (lines[-3:], words)


@door(HEAVY)
def a_command(folder: Path) -> Draw:
    picture = folder / "picture.png"
    picture.write_bytes(encoded_pictures()["png"])
    nothing = folder / "nothing"
    nothing.mkdir()
    (nothing / "config.json").write_text("[]")
    (nothing / "manifest.json").write_text("{}")
    places = {
        "b": str(GOLDEN / "tiny_bundle"), "m": str(nothing), "x": str(nothing), "p": str(picture),
        "o": "out",
    }  # fmt: skip

    def draw(rng: random.Random) -> Trial:
        words = [each.format(**places) for each in rng.choice(COMMANDS).split()]
        for _ in range(rng.choice((1, 1, 2)) if len(words) > 1 else 0):
            place, text = rng.randrange(1, len(words)), rng.choice(TEXTS)
            if rng.random() < 0.8:
                words[place] = text
            else:
                words.insert(place, text)
        if any(each in ("/", "/etc", "/dev/zero", "..", "//") for each in words):
            words = words[:1]
        questions = rng.choice(TEXTS)

        return lambda: _run(folder, words, questions)

    return draw


# ── values of options, graphs, folders, the environment ─────────────────────────────────────────

NUMBERS: tuple[Any, ...] = (
    None, 0, -1, 1, 2, 5, 64, 576, 2**31, 2**63, 2**70, 10**400, -(10**400), float("nan"),
    float("inf"), -0.0, 1.5, True, "", "64",
)  # fmt: skip


@door(HEAVY)
def numbers_of_an_export(folder: Path) -> Draw:
    from tests.export import layouts
    from vzip.export import export

    place = folder / "model"
    layouts.write_layout("llava-hf", place)
    file = folder / "file"
    file.write_bytes(b"x")

    def draw(rng: random.Random) -> Trial:
        values: dict[str, Any] = {}
        for name in rng.sample(
            ("tokens", "dominant", "contextual", "merge", "selection", "seed", "media", "tiles",
             "target", "dtype", "batch", "max_batch", "graph_input", "opset", "projector",
             "revision", "weights"), rng.choice((1, 2, 3)),
        ):  # fmt: skip
            values[name] = rng.choice((*NUMBERS, *TEXTS))
        # What is accepted is not exported: a file stands where the bundle's folder would be made.
        return lambda: export(place, file / "out", **values, check_images=[], say=lambda _: None)

    return draw


@door(HEAVY)
def numbers_of_a_plan(folder: Path) -> Draw:
    from tests.export import layouts
    from vzip.export.hardware import find_device
    from vzip.export.plan.model import read_model

    all_spoilt = []
    for family in ("llava", "llava-next", "llava-onevision"):
        place = folder / family
        layouts.write_layout(layouts.layouts_of(family)[0], place, family=family)
        all_spoilt.append(Spoilt(place, ["config.json"]))

    def draw(rng: random.Random) -> Trial:
        spoilt = rng.choice(all_spoilt)
        spoilt.draw(rng)
        text = rng.choice(("l4", "orin-nx-16gb", *TEXTS))

        def trial() -> None:
            find_device(text)
            model = read_model(spoilt.folder)
            str((model.llm_parameters, model.read_parameters, model.prefill_flops(64)))
            json.dumps(model.llm_tokens(4, 5))

        return trial

    return draw


@door(HEAVY)
def a_graph(folder: Path) -> Draw:
    from tests.fuzz.doors import refresh, tiny
    from vzip.export.graph.reading import read_graph
    from vzip.export.inspect.describe import describe_graph
    from vzip.runtime import VisionEncoder
    from vzip.runtime.bundle.reader import read_bundle

    bundle, picture = tiny(folder), np.zeros((16, 16, 3), np.uint8)
    spoilt = Spoilt(bundle, ["model.onnx"])

    def draw(rng: random.Random) -> Trial:
        spoilt.draw(rng)
        if (bundle / "model.onnx").is_file() and (bundle / "model.onnx").stat().st_size:
            refresh(bundle)

        def described() -> None:
            found = read_bundle(bundle)
            read_graph(found, "fuzz")
            list(describe_graph(bundle))

        def run() -> None:  # what would kill a process has to be refused before
            with VisionEncoder.open(bundle, "onnxruntime") as encoder:
                encoder.encode(picture)

        return rng.choice((described, run))

    return draw


@door(HEAVY)
def a_folder_to_encode(folder: Path) -> Draw:
    pictures = encoded_pictures()
    output = folder / "out.safetensors"

    def draw(rng: random.Random) -> Trial:
        place = folder / "pictures"
        shutil.rmtree(place, ignore_errors=True)
        (place / "below").mkdir(parents=True)
        for name in rng.sample(list(pictures), 3):
            data = pictures[name]
            data = mutations.of_name(name)(rng, data) if rng.random() < 0.6 else data
            odd = rng.choice((os.fsencode(name), b"\xff.png", b"a\nb.png", b"\x1b[2J.png", b"%s"))
            (place / rng.choice((".", "below")) / os.fsdecode(odd)).write_bytes(data)
        if rng.random() < 0.2:
            os.mkfifo(place / "fifo.png")
        if output.is_file() and rng.random() < 0.4:
            output.write_bytes(mutations.damaged(rng, output.read_bytes()))
        elif rng.random() < 0.5:
            output.unlink(missing_ok=True)
        parts = folder / ".out.vzip-parts"
        shutil.rmtree(parts, ignore_errors=True)
        if rng.random() < 0.3:
            parts.mkdir()
            entry = parts / f"{'0' * 64}.{'1' * 64}.safetensors"
            entry.write_bytes(rng.randbytes(30))
        words = ["encode", str(GOLDEN / "tiny_bundle"), str(place), "-o", str(output)]
        return lambda: _run(folder, [*words, "--backend", "onnxruntime"], "")

    return draw


@door(HEAVY)
def the_environment(folder: Path) -> Draw:
    from vzip.calibration.tuning.workers import Workers
    from vzip.export.checkpoint.reader import Checkpoint
    from vzip.runtime.llm.server.http_client import Client
    from vzip.runtime.machine import process

    del folder
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "HF_ENDPOINT", "HF_TOKEN", "http_proxy",
             "HTTPS_PROXY", "no_proxy", "ALL_PROXY", "HOME", "SSL_CERT_FILE", "TMPDIR",
             "OMP_NUM_THREADS", "VLLM_API_KEY")  # fmt: skip
    values = [each for each in TEXTS if "\0" not in each and mutations.SURROGATE not in each]

    def draw(rng: random.Random) -> Trial:
        changed = {name: rng.choice(values) for name in rng.sample(names, 3)}
        url = rng.choice(("http://example.invalid:9", "https://127.0.0.1:9"))

        def ask() -> None:
            Client("fuzz", url, "VLLM_API_KEY").get("/v1/models")

        chosen: Trial = rng.choice(
            (
                Workers.of_environment,
                ask,
                process.threads,
                lambda: Checkpoint.open("~/x"),
                lambda: Checkpoint.open("someone/something"),
            )
        )

        def trial() -> None:
            before = dict(os.environ)
            os.environ.update(changed)
            try:
                chosen()
            finally:
                os.environ.clear()
                os.environ.update(before)

        return trial

    return draw


@door(HEAVY)
def an_overlay(folder: Path) -> Draw:
    from vzip.runtime.bundle.manifest import Manifest
    from vzip.runtime.pictures.overlay import overlay

    del folder
    manifest = Manifest.from_bytes((GOLDEN / "tiny_bundle/manifest.json").read_bytes())
    image = Image.new("RGB", (20, 16))

    def draw(rng: random.Random) -> Trial:
        one, other = odd_array(rng), odd_array(rng)
        kept = np.array([0, 3, 5, 7])
        groups = np.full(17, -1)
        if isinstance(one, np.ndarray):
            kept = one
        if isinstance(other, np.ndarray) and rng.random() < 0.5:
            groups = other
        picture = one if isinstance(one, Image.Image) else image
        grid = rng.choice((manifest.tower.grid, (0, 0), (-1, 4), (10**9, 10**9), (1, 16)))
        return lambda: overlay(
            picture, kept, grid=grid, cls_token=True, prep=manifest.preprocessing, groups=groups
        )

    return draw


@door(HEAVY)
def a_bundles_place(folder: Path) -> Draw:
    from vzip.runtime.bundle.reader import read_bundle
    from vzip.runtime.bundle.writer import bundle_writer

    manifest = read_bundle(GOLDEN / "tiny_bundle").manifest

    def draw(rng: random.Random) -> Trial:
        text = rng.choice(TEXTS)
        bad = text.startswith(("/", "..", "~", "C:"))
        path = folder / "x" if bad else folder / rng.choice(("", "y")) / text

        def trial() -> None:
            with inside(folder), bundle_writer(path) as writer:
                for name in manifest.files:
                    shutil.copyfile(GOLDEN / "tiny_bundle" / name, writer.folder / name)
                writer.publish(manifest)

        return trial

    return draw


@door(HEAVY)
def an_embedding_table(folder: Path) -> Draw:
    from safetensors.numpy import save_file

    from vzip.runtime.llm.experimental.embedding_table import EmbeddingTable
    from vzip.runtime.llm.text_side import TextCheckpoint

    place = _text_side(folder)
    checkpoint = TextCheckpoint.open("fuzz", place)
    table = np.zeros((300, checkpoint.hidden_size), np.float32)
    save_file({"language_model.model.embed_tokens.weight": table}, place / "model.safetensors")
    index = {"weight_map": {"language_model.model.embed_tokens.weight": "model.safetensors"}}
    (place / "model.safetensors.index.json").write_bytes(json.dumps(index).encode())
    spoilt = Spoilt(
        place, ["model.safetensors", "model.safetensors", "model.safetensors.index.json"]
    )

    def draw(rng: random.Random) -> Trial:
        spoilt.draw(rng)
        ids = rng.choice(([0, 1, 2], [299]))

        def trial() -> None:
            EmbeddingTable.of(checkpoint).rows(ids)

        return trial

    return draw
