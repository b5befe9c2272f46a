"""The rules of the house: what is packaged, who may import whom, what an import costs."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

import tomllib
from packaging.specifiers import SpecifierSet

from tests import house
from tests.places import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# What each package may name of vzip: data flows calibration → export → runtime.
BELOW = {
    "runtime": {"runtime"},
    "export": {"export", "runtime"},
    "calibration": {"calibration", "export", "runtime"},
}
MOST_MODULES = 15


def test_pyproject_lists_every_package_of_the_tree() -> None:
    found = {"vzip." + ".".join(each[:-1]) for each in house.modules()}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_folder_with_modules_is_a_package() -> None:
    for module, path in house.modules().items():
        assert (*module[:-1], "__init__") in house.modules(), f"{path.parent} has no __init__.py"


def test_the_installed_modules_are_the_files_of_the_tree() -> None:
    for module, path in house.modules().items():
        name = "vzip." + ".".join(module).removesuffix(".__init__")
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"{name} is not installed: run 'make' again, new files need it"
        assert spec.origin is not None
        assert Path(spec.origin).samefile(path), f"{name} is {spec.origin}: run 'make' again"


def test_dependencies_point_one_way() -> None:
    for importer, imported in house.imports():
        assert imported[0] in BELOW[importer[0]], f"{'/'.join(importer)} imports {imported}"


def test_no_module_names_what_stands_above_it() -> None:
    """A name in a string is imported all the same; documentation may speak of anything."""
    above = {
        package: tuple(f"vzip.{each}" for each in house.PACKAGES if each not in BELOW[package])
        for package in house.PACKAGES
    }
    for module, path in house.modules().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documentation = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in documentation
            ):
                named = [each for each in above[module[0]] if each in node.value]
                assert not named, f"{path}:{node.lineno} names {named}"


def test_nothing_imports_in_a_circle() -> None:
    assert house.circles() == []


def test_a_file_s_name_means_one_thing_in_its_package() -> None:
    places = defaultdict(list)
    for module in house.modules():
        if module[-1] != "__init__" and "cli" not in module:
            places[module[0], module[-1]].append("/".join(module))
    twice = [each for each in places.values() if len(each) > 1]
    assert not twice


def test_no_folder_has_too_many_modules() -> None:
    counts = Counter(module[:-1] for module in house.modules() if module[-1] != "__init__")
    assert max(counts.values()) <= MOST_MODULES, counts.most_common(3)


def test_the_document_of_the_house_is_the_tree_s() -> None:
    assert house.DOCUMENT.read_text(encoding="utf-8") == house.document(), (
        "docs/house.md is not what the tree is: run 'python -m tests.house'"
    )


def test_the_runtime_imports_numpy_and_pillow_alone() -> None:
    allowed = {*sys.stdlib_module_names, "numpy", "PIL", "vzip"}
    for module, path in house.modules().items():
        if module[0] == "runtime":
            names = house.imported_names(path, top_level_only=True)
            foreign = {name.split(".")[0] for name, _ in names} - allowed
            assert not foreign, f"{path} imports {foreign} at module level"


def test_dependencies_of_a_plain_install_are_numpy_and_pillow() -> None:
    names = {entry.split(">")[0] for entry in PYPROJECT["project"]["dependencies"]}
    assert names == {"numpy", "pillow"}


def test_transformers_has_an_upper_bound_whose_newest_is_tested() -> None:
    (wanted,) = (
        each
        for each in PYPROJECT["project"]["optional-dependencies"]["export"]
        if each.startswith("transformers")
    )
    assert SpecifierSet(wanted.removeprefix("transformers")).contains(version("transformers"))
    assert ",<" in wanted
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "-W error::FutureWarning" in makefile.partition("\ntest-newest:")[2].partition("\n\n")[0]
    assert "test-newest" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    loaded = python(
        "import sys; from vzip.runtime import VisionEncoder, CompressedTokens; "
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    ).split()
    heavy = {"torch", "transformers", "onnx", "onnxruntime", "tqdm", "tokenizers", "safetensors"}
    assert not heavy & set(loaded)


def test_asking_for_openvino_s_version_loads_nothing_of_it() -> None:
    # A bundle with an engine of OpenVINO's asks at every opening, whatever backend then runs.
    loaded = python(
        "import sys; from vzip.runtime.backends.packages import version_of; "
        "print(version_of('openvino', 'a test'), 'openvino' in sys.modules)"
    ).split()
    assert loaded == [importlib.metadata.version("openvino"), "False"]


def test_the_help_of_every_command_loads_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "onnx", "onnxruntime", "matplotlib", "jinja2", "sklearn"}
    heavy |= {"openvino", "fastapi", "uvicorn", "ray"}
    code = (
        "import sys; from vzip.runtime.cli.main import COMMANDS, main\n"
        f"heavy = {heavy!r}\n"
        "for argv in ([], *([name] for group in COMMANDS.values() for name in group)):\n"
        "    assert main([*argv, '-h']) == 0, argv\n"
        "    assert not heavy & set(sys.modules), (argv, heavy & set(sys.modules))\n"
        "print('all of them')"
    )
    assert python(code).splitlines()[-1] == "all of them"


def test_no_file_carries_a_path_of_a_machine() -> None:
    home = str(Path.home())
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, tracked):
        path = ROOT / name
        if path.suffix in {".py", ".json", ".md", ".toml", ".jinja", ".txt"} and path.exists():
            text = path.read_text(encoding="utf-8")
            assert f"{home}/" not in text, f"{name} holds {home}"


def test_a_class_s_name_means_one_thing() -> None:
    places = defaultdict(list)
    for module, path in house.modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append("/".join(module))
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not twice
