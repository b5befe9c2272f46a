"""The rules of the house: what is packaged, who may import whom, what an import costs."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parent.parent
FOLDERS = ("export", "runtime", "calibration")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# What each folder may import of vzip: data flows calibration → export → runtime.
MAY_IMPORT = {
    "runtime": {"runtime"},
    "export": {"export", "runtime"},
    "calibration": {"calibration", "export", "runtime"},
}


def modules() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path, *, top_level_only: bool) -> Iterator[str]:
    """Names of imported modules; `if TYPE_CHECKING:` blocks don't count."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a module lives"
            assert node.module is not None
            yield node.module
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
        elif not (top_level_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            pending.extend(ast.iter_child_nodes(node))


def test_pyproject_lists_every_package_of_the_tree() -> None:
    found = {
        "vzip." + ".".join(path.parent.relative_to(ROOT).parts)
        for path in modules()
        if path.name == "__init__.py"
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_folder_with_modules_is_a_package() -> None:
    for path in modules():
        assert (path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_installed_module_is_the_file_of_the_tree(path: Path) -> None:
    name = "vzip." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
    spec = importlib.util.find_spec(name.removesuffix(".__init__"))
    assert spec is not None, f"{name} is not installed: run 'make' again, new files need it"
    assert spec.origin is not None
    assert Path(spec.origin).samefile(path), f"{name} is {spec.origin}: run 'make' again"


@pytest.mark.parametrize("folder", FOLDERS)
def test_dependencies_point_one_way(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for name in imports(path, top_level_only=False):
            if name.split(".")[0] == "vzip":
                owner = name.split(".")[1]
                assert owner in MAY_IMPORT[folder], f"{path} imports {name}"


def test_the_runtime_imports_numpy_and_pillow_alone() -> None:
    allowed = {*sys.stdlib_module_names, "numpy", "PIL", "vzip"}
    for path in (ROOT / "runtime").rglob("*.py"):
        foreign = {name.split(".")[0] for name in imports(path, top_level_only=True)} - allowed
        assert not foreign, f"{path} imports {foreign} at module level"


def test_dependencies_of_a_plain_install_are_numpy_and_pillow() -> None:
    names = {entry.split(">")[0] for entry in PYPROJECT["project"]["dependencies"]}
    assert names == {"numpy", "pillow"}


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


@pytest.mark.parametrize("command", ["vzip", "vzip export", "vzip check", "vzip ask", "vzip chat"])
def test_help_loads_nothing_heavy(command: str) -> None:
    prog, *rest = command.split()
    code = (
        "import sys; from vzip.runtime.cli.main import main; "
        f"sys.argv = ['{prog}']; status = main({[*rest, '-h']!r}); "
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules); "
        "print(status, heavy)"
    )
    assert python(code).splitlines()[-1] == "0 set()"


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
