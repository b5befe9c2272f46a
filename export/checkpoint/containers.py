"""Tensor files: which names they hold, and single tensors out of them.

``.safetensors`` files are mapped into memory. ``.bin`` files are pickles, which can run code: they
are read with ``weights_only=True`` alone, mapped where PyTorch can.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from vzip.runtime.errors import CheckpointError
from vzip.runtime.files.plain import open_plain, read_text

if TYPE_CHECKING:
    from torch import Tensor

_LONGEST_NAME = 80
_LFS_POINTER = b"version https://git-lfs"


def tensor_names(path: Path) -> frozenset[str]:
    """Return the names of the tensors in a file.

    Raises:
        CheckpointError: The file is damaged, or no tensor file.
    """
    with _open(path) as tensors:
        return frozenset(tensors)


def read_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the named tensors of a file; others are not read.

    Raises:
        CheckpointError: The file is damaged or no tensor file, or a name is not in it.
    """
    wanted = list(names)
    with _open(path) as tensors:
        absent = [name for name in wanted if name not in tensors]
        if absent:
            raise CheckpointError(
                f"{path} lacks the tensor '{absent[0]}' that its index places there "
                f"({len(absent)} such in all)",
                cure="index and file are of two checkpoints: download both again",
            )
        return {name: tensors[name]() for name in wanted}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: The file is unreadable, no JSON, or no object.
    """
    try:
        data = json.loads(read_text(path))
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror or error}") from error
    except ValueError as error:  # covers wrong JSON and wrong UTF-8
        raise CheckpointError(
            f"{path} is no valid JSON ({error})",
            cause="it is damaged or truncated",
            cure="download it again",
        ) from error
    except RecursionError as error:
        raise CheckpointError(f"{path} is nested too deeply for a configuration") from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(data).__name__}",
            expected="an object",
            cause="it is damaged or another file",
            cure="download it again",
        )
    return data


def read_index(path: Path) -> dict[str, str]:
    """Return tensor name → file name of a sharded checkpoint's index.

    Raises:
        CheckpointError: Not an index, or it names a file outside its folder.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path} has no 'weight_map' of tensor names",
            expected="in an index",
            cure="download it again",
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or Path(file).name != file or "\\" in file:
            raise CheckpointError(
                f"{path} places the tensor '{name}' in {file!r}",
                expected="a file name without a folder",
                cause="the index was tampered with",
                cure="don't use this checkpoint",
            )
    return weight_map


Lazy: TypeAlias = "Mapping[str, Callable[[], Tensor]]"


@contextmanager
def _open(path: Path) -> Iterator[Lazy]:
    """Name → function that reads that tensor, as long as the file is open."""
    opener = _OPENERS.get(path.suffix)
    if opener is None:
        raise CheckpointError(
            f"{path} is no tensor file that vzip reads",
            expected=f"{' or '.join(_OPENERS)}",
        )
    try:
        with open_plain(path) as file:
            start = file.read(len(_LFS_POINTER))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"tensor file {path} does not exist",
            cure="check the path",
        ) from error
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror or error}") from error
    if start == _LFS_POINTER:
        raise CheckpointError(
            f"{path} is a Git LFS pointer",
            expected="tensors",
            cure="fetch the file with: git lfs pull",
        )
    with opener(path) as tensors:
        yield tensors


@contextmanager
def _safetensors(path: Path) -> Iterator[Lazy]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


@contextmanager
def _pickle(path: Path) -> Iterator[Lazy]:
    import torch

    try:
        # Files from before PyTorch 1.6 are no zip archives, and those can't be mapped.
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} can't be loaded with weights_only=True: {_more_than_tensors(path)}",
            expected="tensors and nothing that could run code",
            cause="it is damaged, or was saved with objects of the program that trained it",
            cure="get the checkpoint as .safetensors",
        ) from error
    except Exception as error:  # a damaged pickle can end in any of them
        raise _damaged(path, error) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} holds a {type(state).__name__}",
            expected="a dict of tensors",
        )
    tensors = {name: each for name, each in state.items() if isinstance(each, torch.Tensor)}
    if not all(isinstance(name, str) for name in tensors) or (state and not tensors):
        raise CheckpointError(
            f"{path} holds no tensors under names, but {', '.join(map(repr, list(state)[:5]))}",
            expected="a dict of names and tensors",
            cause="it is a training's state, whose weights are a part of it",
            cure="save the part with the weights alone",
        )
    yield {name: partial(_same, tensor.detach()) for name, tensor in tensors.items()}


def _more_than_tensors(path: Path) -> str:
    """Say what a pickle holds besides tensors; nothing of it is loaded."""
    from torch.serialization import get_unsafe_globals_in_checkpoint

    try:
        names = get_unsafe_globals_in_checkpoint(path)
    except Exception:  # noqa: BLE001 - of a damaged pickle: any of them
        names = []
    if not names:
        return "it is no pickle of tensors"
    shown = ", ".join(name[:_LONGEST_NAME] for name in names[:3])
    return f"it holds {shown}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _same(tensor: Tensor) -> Tensor:
    return tensor


_OPENERS: Mapping[str, Callable[[Path], AbstractContextManager[Lazy]]] = {
    ".safetensors": _safetensors,
    ".bin": _pickle,
}


def _damaged(path: Path, error: Exception) -> CheckpointError:
    if any(sign in str(error) for sign in ("Dtype not understood", "unknown variant")):
        return CheckpointError(
            f"can't read tensors from {path}: {_first_line(error)}",
            expected="floating point of 8 bits or more",
            cause="the checkpoint is quantised to numbers that safetensors or PyTorch lack here",
            cure="export from the checkpoint as it was before it was quantised",
        )
    return CheckpointError(
        f"can't read tensors from {path} ({path.stat().st_size} bytes): {_first_line(error)}",
        cause="the file is truncated or damaged",
        cure="download it again",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
