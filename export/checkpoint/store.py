"""The tensors of one folder: where each lies, and those of the vision side read part by part."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vzip.export.checkpoint import leftovers
from vzip.export.checkpoint.containers import read_index, read_json, read_tensors, tensor_names
from vzip.export.checkpoint.dequantize import StoredWeight, companions, dequantised, is_quantised
from vzip.export.checkpoint.folders import Folder, LocalFolder
from vzip.export.checkpoint.schemes import NONE, Scheme, quantised, read_scheme, signs
from vzip.export.checkpoint.tensor_names import Part, missing, resolve, twice, unwrapped
from vzip.export.checkpoint.weights import check_finite, check_tensor
from vzip.runtime.errors import CheckpointError
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)

# In the order in which transformers looks for them.
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_SUFFIX = ".index.json"
ORIGINAL_ADAPTER = "non_lora_trainables.bin"
"""What original LLaVA saves beside a LoRA of its LLM: the projector, and the tower if trained."""
MODELOPT = "hf_quant_config.json"


@dataclass(frozen=True)
class Store:
    """Tensors of one folder.

    Attributes:
        folder: The folder.
        files: Tensor name → file name; names without what training wraps around a model.
        stored: The same names → names in the files.
        source: Where the names were read, for messages.
        indexed: Whether that is an index.
        scheme: What the folder's configuration says of quantisation.
    """

    folder: Folder
    files: Mapping[str, str]
    stored: Mapping[str, str]
    source: str
    indexed: bool = False
    scheme: Scheme = NONE

    @classmethod
    def of(cls, folder: Folder, config: Mapping[str, Any], *, original: bool) -> Store:
        """Read the names in a folder's tensor file or index; none where it has neither.

        Args:
            folder: The folder.
            config: Its ``config.json``.
            original: Whether it is original LLaVA's, which may hold an adapter's remainder alone.

        Raises:
            CheckpointError: A file can't be read.
        """
        modelopt = folder.find(MODELOPT)
        others = [] if modelopt is None else [read_json(modelopt)]
        scheme = read_scheme(config, *others)
        for single in SINGLE_FILES:
            path = folder.find(single)
            if path is not None:
                files = dict.fromkeys(tensor_names(path), single)
                return cls._unwrapped(folder, files, str(path), scheme=scheme)
            index = folder.find(single + INDEX_SUFFIX)
            if index is not None:
                files = read_index(index)
                return cls._unwrapped(folder, files, str(index), scheme=scheme, indexed=True)
        path = folder.find(ORIGINAL_ADAPTER) if original else None
        if path is not None:
            files = dict.fromkeys(tensor_names(path), ORIGINAL_ADAPTER)
            return cls._unwrapped(folder, files, str(path), scheme=scheme)
        return cls(folder, {}, {}, folder.where, scheme=scheme)

    @classmethod
    def of_file(cls, path: Path) -> Store:
        """Read the names in one file."""
        files = dict.fromkeys(tensor_names(path), path.name)
        return cls._unwrapped(LocalFolder(path.parent), files, str(path))

    @classmethod
    def _unwrapped(
        cls, folder: Folder, files: Mapping[str, str], source: str, **others: Any
    ) -> Store:
        stored: dict[str, str] = {}
        for name in files:
            same = stored.setdefault(unwrapped(name), name)
            if same != name:
                raise twice(unwrapped(name), same, name, source=source)
        unwrapped_files = {name: files[each] for name, each in stored.items()}
        return cls(folder, unwrapped_files, stored, source, **others)

    def path(self, name: str) -> Path:
        """Return the file that holds a tensor, which `read` has found."""
        path = self.folder.find(self.files[name])
        assert path is not None, name
        return path

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return name → tensor, opening only the files that hold them."""
        by_file: dict[str, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.files[name]].append(name)
        paths = {file: self.folder.find(file) for file in by_file}
        absent = sorted(file for file, path in paths.items() if path is None)
        if absent:
            count = sum(len(by_file[file]) for file in absent)
            raise self.folder.missing(
                absent, purpose=f"{counted(count, 'tensor')} that {self.source} places there"
            )
        tensors: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            path = paths[file]
            assert path is not None
            _log.info("reading %d tensors of %s", len(wanted), path)
            stored = read_tensors(path, [self.stored[name] for name in wanted])
            tensors |= {name: stored[self.stored[name]] for name in wanted}
        return tensors

    def unindexed(self, files: Iterable[str]) -> list[tuple[str, str, Path]]:
        """Return what files hold that the index doesn't place there: name, name in it, file."""
        found: list[tuple[str, str, Path]] = []
        for file in sorted(files) if self.indexed else ():
            path = self.folder.find(file)
            assert path is not None, file
            names = ((unwrapped(stored), stored, path) for stored in sorted(tensor_names(path)))
            found += [each for each in names if self.files.get(each[0]) != file]
        return found


class Reading:
    """Tensors of the vision side, part by part, and what was left of the files they are in.

    Args:
        shapes: Canonical name → shape of all that may be read.
        needed: Those that must be there.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], needed: frozenset[str]) -> None:
        self._shapes, self._needed = shapes, needed
        self.tensors: dict[str, Tensor] = {}
        self._schemes: dict[str, None] = {}
        self._read: list[tuple[Store, Part, set[str]]] = []

    @property
    def dequantised(self) -> str | None:
        """Names of the schemes that tensors were dequantised from; None where all were whole."""
        return ", ".join(self._schemes) or None

    def read(self, part: Part, store: Store) -> None:
        """Read a part from a store.

        Raises:
            CheckpointError: A needed tensor isn't there, or one can't be read or used.
        """
        wanted = [name for name in self._shapes if name.startswith(part.canonical)]
        found = resolve(part, wanted, store.files, source=store.source)
        for name in wanted:
            if name in self._needed and name not in found:
                raise self._absent(part, name, store)
        beside = {name: companions(stored, store.files) for name, stored in found.items()}
        used = {*found.values(), *(each for more in beside.values() for each in more.values())}
        tensors = store.read(used)
        for name, stored in found.items():
            weight = StoredWeight(
                store.stored[stored],
                str(store.path(stored)),
                self._shapes[name],
                tensors[stored],
                {leaf: tensors[each] for leaf, each in beside[name].items()},
                partial(_around, stored, store),
            )
            self.tensors[name] = self._whole(name, weight, store.scheme)
        self._read.append((store, part, used))

    def _whole(self, name: str, weight: StoredWeight, scheme: Scheme) -> Tensor:
        """Return a weight as the graph takes it, in the dtype of the checkpoint where it can be."""
        tensor = weight.tensor
        if is_quantised(weight) and tensor.numel() and not tensor.is_complex():
            tensor = dequantised(weight, scheme)
            self._schemes[scheme.name or _called(weight)] = None
        elif _channels_last(tuple(tensor.shape), weight.shape):
            tensor = tensor.permute(0, 3, 1, 2)
        check_tensor(weight.name, tensor, weight.shape, source=weight.where)
        if name in self._needed:
            check_finite(weight.name, tensor, source=weight.where)
        return tensor

    def _absent(self, part: Part, name: str, store: Store) -> CheckpointError:
        """Return the error for a needed tensor that isn't there: why, as far as names tell."""
        if not store.files:
            return store.folder.missing(
                [*SINGLE_FILES, *(single + INDEX_SUFFIX for single in SINGLE_FILES)],
                purpose=f"the tensors '{part.canonical}…'",
            )
        adapters = [each for each in store.files if each.startswith(part.roots)]
        adapters = [each for each in adapters if leftovers.is_adapter(each)]
        if adapters:
            return leftovers.unmerged(
                f"{store.source} holds '{store.stored[adapters[0]]}' and lacks '{name}'"
            )
        for stored in part.stored(name):
            sign = signs(_around(stored, store))
            if sign is not None:
                return quantised(f"{store.source} lacks '{stored}'", store.scheme, sign)
        return missing(part, name, store.files, source=store.source)

    def check_leftovers(self, skipped: tuple[str, ...] = ()) -> None:
        """Raise unless all that wasn't read changes nothing.

        Args:
            skipped: What names begin with that were left out on purpose.

        Raises:
            CheckpointError: There is a tensor that would change what the vision side computes.
        """
        for store in dict.fromkeys(store.source for store, *_ in self._read):
            same = [each for each in self._read if each[0].source == store]
            first = same[0][0]
            used = {name for *_, names in same for name in names}
            more = first.unindexed({first.files[name] for name in used})
            _check_same(first, [each for each in more if each[0] in used])
            leftovers.check_leftovers(
                {*first.files, *(name for name, *_ in more)} - used,
                roots=tuple(root for _, part, _ in same for root in part.roots),
                harmless=skipped,
                where=store,
                scheme=first.scheme,
                dequantised=self.dequantised is not None,
            )


def _check_same(store: Store, copies: Iterable[tuple[str, str, Path]]) -> None:
    """Raise where a tensor's copy in another shard isn't equal to the one that was read.

    The index decides here, and in transformers the order of the files.
    """
    for name, stored, path in copies:
        if not read_tensors(path, [stored])[stored].equal(store.read([name])[name]):
            raise CheckpointError(
                f"{path} holds another tensor '{stored}' than {store.path(name)}",
                expected="one, or two that are equal",
                cause="shards of two checkpoints were merged",
                cure="download the checkpoint again, or save the model anew",
            )


def _around(name: str, store: Store) -> tuple[str, ...]:
    """Return what follows the module's name in the names of all its tensors."""
    module = name.rpartition(".")[0] + "."
    return tuple(each.removeprefix(module) for each in store.files if each.startswith(module))


def _called(weight: StoredWeight) -> str:
    """Return a name for the scheme of a weight whose configuration has none."""
    dtype = str(weight.tensor.dtype).removeprefix("torch.")
    return f"{dtype} with {' and '.join(sorted(weight.beside))}"


def _channels_last(got: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Say whether a convolution has its three colours at the end, as MLX has them."""
    return len(got) == 4 and got != expected and (got[0], got[3], *got[1:3]) == expected
