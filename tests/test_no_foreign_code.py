"""No code of a model, a bundle or a data set ever runs: every call says so; nothing is asked."""

from __future__ import annotations

import ast
import io
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest

from tests.places import ROOT
from tests.runtime.llm.demo_llm import demo_with_llm
from vzip.runtime import demo
from vzip.runtime.cli.main import main

# A name, whole or its last part → what a call must say, lest it runs what it loads.
REMOTE: Final = ("trust_remote_code", False)
TOLD: Final = {
    "from_pretrained": REMOTE,
    "from_config": REMOTE,
    "get_processor_dict": REMOTE,
    "get_config_dict": REMOTE,
    "load_dataset": REMOTE,
    "load_dataset_builder": REMOTE,
    "transformers.pipeline": REMOTE,
    "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
    "numpy.save": ("allow_pickle", False),
    "numpy.lib.format.read_array": ("allow_pickle", False),
}
# What runs what it reads, whatever it is told.
NEVER: Final = (
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads"),
    *("dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load"),
    *("shelve.open", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
    *("runpy.run_path", "runpy.run_module", "torch.hub.load", "torch.jit.load", "read_pickle"),
    *("builtins.eval", "builtins.exec", "get_class_from_dynamic_module", "load_custom_generate"),
)
PACKAGES: Final = ("runtime", "export", "calibration")


def dotted(node: ast.AST, places: Mapping[str, str]) -> str | None:
    """Return the whole name of what is mentioned: ``t.load`` is ``torch.load`` where t is torch."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        return places.get(node.id, f"builtins.{node.id}")
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value, places)
        return f"{owner or '?'}.{node.attr}"
    return None


def imported(tree: ast.AST) -> dict[str, str]:
    """Return name in a module → the whole name of what it is."""
    places = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            places |= {
                each.asname or each.name: f"{node.module}.{each.name}" for each in node.names
            }
        elif isinstance(node, ast.Import):
            for each in node.names:
                top = each.name.partition(".")[0]
                places[each.asname or top] = each.name if each.asname else top
    return places


def is_called(name: str, known: str) -> bool:
    """Return whether a whole name is one of the tables'; without a module, of any module's."""
    return name == known if "." in known else name.rpartition(".")[2] == known


def faults(source: str, *, tests: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (line, what is wrong) of every call, or mention, that may run what it loads.

    Args:
        source: Text of a module.
        tests: Whether it is one of tests, which pickle errors and run documents of ours.
    """
    words = {each.rpartition(".")[2] for each in (*TOLD, *NEVER, "snapshot_download")}
    if not any(word in source for word in words):  # most modules: not parsed at all
        return
    tree = ast.parse(source)
    places = imported(tree)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        name = dotted(node, places)
        if name is None:
            continue
        call = calls.get(id(node))
        words = {} if call is None else {each.arg: each.value for each in call.keywords}
        for known, (key, value) in TOLD.items():
            if is_called(name, known):
                given = words.get(key)
                if not (isinstance(given, ast.Constant) and given.value is value):
                    yield node.lineno, f"{known} without {key}={value}"
        if name.endswith(".snapshot_download") and "allow_patterns" not in words:
            yield node.lineno, "snapshot_download without allow_patterns"
        if not tests and any(is_called(name, each) for each in NEVER):
            yield node.lineno, name


def test_every_call_that_could_run_foreign_code_says_that_it_must_not() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {fault}"
        for folder in (*PACKAGES, "benchmarks", "tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, fault in faults(path.read_text(encoding="utf-8"), tests=folder not in PACKAGES)
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "transformers.AutoConfig.from_pretrained(folder)",
        "transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)",
        "AutoConfig.from_pretrained(folder, trust_remote_code=told)",
        "AutoConfig.from_pretrained(folder, **options)",
        "open = functools.partial(AutoTokenizer.from_pretrained, folder)",
        "AutoModel.from_config(config)",
        "from datasets import load_dataset\nload_dataset('a')",
        "import torch\ntorch.load(path)",
        "from torch import load\nload(path, weights_only=False)",
        "from torch import load as read\nread(path)",
        "import torch as t\nt.load(path)",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import pickle\npickle.load(file)",
        "from pickle import loads\nloads(data)",
        "import pickle as p\np.Unpickler(file).load()",
        "import torch\ntorch.hub.load('a', 'b')",
        "eval(text)",
        "exec(text)",
        "from huggingface_hub import snapshot_download\nsnapshot_download('a/b')",
        "import huggingface_hub\nhuggingface_hub.snapshot_download('a/b')",
        "from transformers import pipeline\npipeline('image-to-text', model=folder)",
    ],
)  # fmt: skip
def test_a_call_to_come_is_found(source: str) -> None:
    assert list(faults(source))


@pytest.mark.parametrize(
    "source",
    [
        "AutoConfig.from_pretrained(folder, trust_remote_code=False)",
        "torch.load(path, weights_only=True)",
        "np.load(path, mmap_mode='r', allow_pickle=False)",
        "json.load(file)",
        "model.eval()",
        "pipeline.load(path)",
        "from safetensors.numpy import load\nload(path)",
        "pickle.dumps(error)",
    ],
)
def test_a_call_that_is_right_is_not(source: str) -> None:
    assert not list(faults(source))


EVIL = """
from pathlib import Path
Path({witness!r}).write_text("it ran")
import transformers
class EvilConfig(transformers.LlavaConfig):
    model_type = "evil"
class EvilTokenizer(transformers.PreTrainedTokenizerFast):
    pass
class EvilModel(transformers.LlavaForConditionalGeneration):
    config_class = EvilConfig
class EvilProcessor(transformers.CLIPImageProcessor):
    pass
def generate(model, **_):
    return model
"""
MAPS = {
    "config.json": {
        "AutoConfig": "evil.EvilConfig",
        "AutoModel": "evil.EvilModel",
        "AutoModelForCausalLM": "evil.EvilModel",
        "AutoModelForImageTextToText": "evil.EvilModel",
    },
    "tokenizer_config.json": {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]},
    "preprocessor_config.json": {"AutoImageProcessor": "evil.EvilProcessor"},
    "processor_config.json": {"AutoProcessor": "evil.EvilProcessor"},
}
KINDS = {
    "known": {},
    "config": {"config.json": {"auto_map": {"AutoConfig": "evil.EvilConfig"}}},
    "tokenizer": {"tokenizer_config.json": {"tokenizer_class": "EvilTokenizer"}},
    "model": {"config.json": {"model_type": "evil", "architectures": ["EvilModel"]}},
    "kernel": {"config.json": {"attn_implementation": "evil/kernel"}},
}


def change(path: Path, **settings: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.fixture
def witness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that foreign code would write. Whoever asks on standard input gets a yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 3))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "witness"


def hostile(folder: Path, kind: str, witness: Path) -> Path:
    """Return a copy of the demo's checkpoint whose every file names code beside it."""
    shutil.copytree(demo.checkpoint(), folder)
    code = EVIL.format(witness=str(witness))
    (folder / "evil.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    for name, classes in MAPS.items():
        change(folder / name, auto_map=classes)
    config = json.loads((folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part]["auto_map"] = MAPS["config.json"]
    change(folder / "config.json", **config)
    for name, settings in KINDS[kind].items():
        change(folder / name, **settings)
    if kind == "config":  # a tower of its own code is refused
        del config["vision_config"]["auto_map"]
        change(folder / "config.json", vision_config=config["vision_config"])
    return folder


def bundle_of(folder: Path, model: Path) -> Path:
    """Return a copy of the demo's bundle that names another checkpoint, without its LLM."""
    shutil.copytree(demo_with_llm(), folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"]["id"] = str(model)
    manifest["files"] = {
        name: entry for name, entry in manifest["files"].items() if "llm" not in name
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for path in folder.glob("*llm*"):
        path.unlink()
    return folder


COMMANDS = {
    "ask": "ask BUNDLE PICTURE what?",
    "ask --llm": "ask DEMO PICTURE what? --llm MODEL",
    "chat": "chat BUNDLE PICTURE",
    "convert": "convert --model MODEL --to gguf -o OUT.gguf",
    "export": "export --model MODEL --tokens 43 --no-check --with-llm -o OUT",
    "plan": "plan --model MODEL --target orin-nx --tokens 43",
    "tune": "tune --model MODEL --data DATA --images PICTURES --tokens 43 -o OUT.safetensors",
    "calibrate": "calibrate BUNDLE --images PICTURES --precision int8",
    "check": "check BUNDLE PICTURE",
    "sweep": "sweep --model MODEL --tokens 43 --images PICTURES -o OUT",
    "report": "report BUNDLE --images PICTURES -o OUT.html",
}
QUICK: Final = ("convert", "plan")
CASES: Final = (
    *((command, kind) for command in (*QUICK, "ask --llm") for kind in KINDS),
    *((command, "config") for command in COMMANDS if command not in (*QUICK, "ask --llm")),
    ("export", "known"),
    *(("ask", "model"), ("chat", "model"), ("ask", "tokenizer"), ("export", "kernel")),
)


REFUSED: Final = {
    *((command, "model") for command in ("ask", "ask --llm", "chat", "convert")),
    *((command, "kernel") for command in ("ask --llm", "convert")),
    # A checkpoint whose model is code of its own may compute anything else.
    *((command, kind) for command in ("plan", "export") for kind in KINDS if kind != "config"),
}


@pytest.mark.parametrize(
    ("command", "kind"),
    [pytest.param(*case, marks=() if case[0] in QUICK else pytest.mark.slow) for case in CASES],
)
def test_nothing_of_a_checkpoint_runs(
    command: str, kind: str, tmp_path: Path, witness: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = hostile(tmp_path / "model", kind, witness)
    picture = demo.pictures() / "scene-1.jpg"
    turns = [
        {"from": "human", "value": "<image>\nwhat is it?"},
        {"from": "gpt", "value": "a circle"},
    ]
    records = [{"id": str(n), "image": picture.name, "conversations": turns} for n in range(16)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    places = {
        "MODEL": model,
        "PICTURE": picture,
        "PICTURES": demo.pictures(),
        "DATA": tmp_path / "data.json",
        "OUT": tmp_path / "out",
        "OUT.gguf": tmp_path / "out.gguf",
        "OUT.html": tmp_path / "out.html",
        "OUT.safetensors": tmp_path / "out.safetensors",
    }
    if "BUNDLE" in COMMANDS[command]:
        places["BUNDLE"] = bundle_of(tmp_path / "bundle", model)
    if "DEMO" in COMMANDS[command]:
        places["DEMO"] = demo_with_llm()
    status = main([str(places.get(each, each)) for each in COMMANDS[command].split()])
    said = capsys.readouterr()
    assert status == (2 if (command, kind) in REFUSED else 0), said.err
    assert not witness.exists()
    assert "[y/N]" not in said.out + said.err
