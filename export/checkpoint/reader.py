"""Find a checkpoint and read its vision side: just the tensors needed, from just their files."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vzip.export import families
from vzip.export.architecture import (
    Media,
    ProjectorConfig,
    VisionConfig,
    needed_tensors,
    projector_shapes,
    tensor_shapes,
)
from vzip.export.checkpoint.containers import read_index, read_json, read_tensors, tensor_names
from vzip.export.checkpoint.folders import Folder, HubFolder, LocalFolder
from vzip.export.checkpoint.tensor_names import (
    NEWLINE_EMBEDDING,
    PROJECTOR,
    STANDALONE_PROJECTOR,
    STANDALONE_TOWER,
    Part,
    missing,
    resolve,
    tower_part,
)
from vzip.export.checkpoint.weights import VisionWeights, check_tensor
from vzip.runtime.errors import CheckpointError
from vzip.runtime.guard import door
from vzip.runtime.models import locate

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)

_COMPARE: Final = "compare it with the published one, or download it again"
CONFIG = "config.json"
# In the order in which transformers looks for them.
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_SUFFIX = ".index.json"
ORIGINAL_PROJECTOR = "mm_projector.bin"
_PROCESSOR_FILES = {
    "image": "preprocessor_config.json",
    "video": "video_preprocessor_config.json",
}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its configuration is read, its tensors are not.

    Attributes:
        model_id: What finds it again: ``demo``, a hub id, or an absolute folder.
        folder: Its files.
        config: Its ``config.json``.
    """

    model_id: str
    folder: Folder
    config: dict[str, Any]

    @classmethod
    @door(
        CheckpointError,
        "the checkpoint '{model}' can't be read",
        cure=_COMPARE,
    )
    def open(cls, model: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
        """Open a checkpoint; from the hub, download its ``config.json``.

        Args:
            model: An alias, a local folder or a hub id; see `vzip.runtime.models.locate`.
            revision: Branch, tag or commit of a hub repository; None is its main branch.

        Raises:
            CheckpointError: It isn't there or can't be reached, or a local folder was given a
                revision.
        """
        location = locate(model)
        folder: Folder
        if location.hub_id is not None:
            folder = HubFolder.open(location.hub_id, revision)
        else:
            assert location.folder is not None
            if revision is not None:
                raise CheckpointError(
                    f"revision '{revision}' was given for the local folder {location.folder}",
                    expected="with a hub id only",
                    cure="leave it out",
                )
            folder = LocalFolder(location.folder)
        return cls(location.model_id, folder, _config(folder))

    @property
    def revision(self) -> str | None:
        """Commit of the hub repository; None for a local folder."""
        return self.folder.revision

    @cached_property
    def tower(self) -> Checkpoint | None:
        """The checkpoint that original LLaVA takes its tower from, None where it is inside.

        The name is looked for as a folder in the checkpoint's own, then as original LLaVA does: a
        folder relative to the working directory, then a hub id.
        """
        reference = families.tower_reference(self.config)
        if reference is None:
            return None
        if isinstance(self.folder, LocalFolder) and (self.folder.path / reference).is_dir():
            reference = str(self.folder.path / reference)
        try:
            return Checkpoint.open(reference)
        except CheckpointError as error:
            raise CheckpointError(
                f"the tower '{reference}' that {self.folder.where} names in mm_vision_tower: "
                f"{error}",
                cause="a local checkpoint may also hold it in a folder of that name",
            ) from error

    def preprocessor(self, media: Media) -> dict[str, Any]:
        """Return the settings of the image or video processor, its own or else its tower's.

        As in transformers, a part of ``processor_config.json`` comes before a file of its own, and
        for video the image processor's settings count where there are none for video.

        Args:
            media: What is to be prepared.

        Raises:
            CheckpointError: There are none.
        """
        for folder in [self.folder, *([self.tower.folder] if self.tower else [])]:
            settings = _processor(folder, media)
            if settings is not None:
                return settings
        owner = self.tower or self
        raise owner.folder.missing(["preprocessor_config.json"], purpose="image preprocessing")

    @door(
        CheckpointError,
        "the configuration of '{self.model_id}' can't be understood",
        cure=_COMPARE,
    )
    def vision(self, media: Media | None = None) -> VisionConfig:
        """Return the architecture of the vision side, feature layers and preprocessing.

        Args:
            media: What the graph is made for; None for the family's own choice.

        Raises:
            CheckpointError: As `families.describe`, or a file is missing.
            InvalidInputError: The family has no graph for `media`.
        """
        chosen = families.chosen_media(self.config, media)
        families.tower_reference(self.config)  # an unknown variant is said before a missing file
        tower = None if self.tower is None else self.tower.config
        return families.describe(self.config, self.preprocessor(chosen), tower=tower, media=chosen)


@door(
    CheckpointError,
    "the configuration of '{model}' can't be understood",
    cure=_COMPARE,
)
def vision_config(
    model: str | os.PathLike[str], *, revision: str | None = None, media: Media | None = None
) -> VisionConfig:
    """Return a model's architecture, for random weights.

    Published repositories behind the aliases are known by heart, so no hub is needed for them; of
    any other model the configuration files are read.

    Args:
        model: As for `Checkpoint.open`.
        revision: As for `Checkpoint.open`; with one, the configuration of that revision is read.
        media: As for `Checkpoint.vision`.

    Raises:
        CheckpointError: As `Checkpoint.open` and `families.describe`.
        InvalidInputError: The model's family has no graph for `media`.
    """
    hub_id = locate(model).hub_id
    known = families.published(hub_id, media) if hub_id is not None and revision is None else None
    return known or Checkpoint.open(model, revision=revision).vision(media)


@door(
    CheckpointError,
    "the tensors of '{checkpoint.model_id}' can't be read",
    cure=_COMPARE,
)
def read_vision(checkpoint: Checkpoint, media: Media | None = None) -> VisionWeights:
    """Read tower, projector and, where the model has one, the newline embedding.

    The dead last layers and the post-LayerNorm come along where they are in the checkpoint.
    Original LLaVA's tower comes from the checkpoint if there is a copy in it, else from the one
    that it names; its projector from the checkpoint, else from ``mm_projector.bin``.

    Args:
        checkpoint: The opened checkpoint.
        media: As for `Checkpoint.vision`; where images and video have a tower each, it says whose.

    Returns:
        Canonical names → tensors in the dtype of the checkpoint, mapped from its files.

    Raises:
        CheckpointError: A file or needed tensor is missing, damaged or of a wrong shape.
        InvalidInputError: The model's family has no graph for `media`.
    """
    config = checkpoint.vision(media)
    shapes = tensor_shapes(config)
    own = _Store.open(checkpoint.folder)
    tensors: dict[str, Tensor] = {}
    for places in (
        _tower_places(own, checkpoint, tower_part(config.tower_module)),
        _projector_places(own, checkpoint),
        [(NEWLINE_EMBEDDING, own)],
    ):
        tensors |= _read_part(places, shapes, needed_tensors(config))
    return VisionWeights(config, tensors)


@door(
    CheckpointError,
    "the projector '{path}' can't be read",
    cure=_COMPARE,
)
def read_projector(path: str | os.PathLike[str], config: ProjectorConfig) -> dict[str, Tensor]:
    """Read a projector from a file of its own, such as a tuned one.

    Args:
        path: ``.safetensors`` or ``.bin``, with the names of any layout.
        config: The projector that it replaces.

    Returns:
        Canonical names (``projector.linear_1.weight`` …) → tensors.

    Raises:
        CheckpointError: The file is missing or damaged, or a tensor is or has a wrong shape.
    """
    file = Path(path)
    shapes = {f"projector.{name}": shape for name, shape in projector_shapes(config).items()}
    files = dict.fromkeys(tensor_names(file), file.name)
    store = _Store(LocalFolder(file.parent), files, str(file))
    return _read_part([(STANDALONE_PROJECTOR, store)], shapes, frozenset(shapes))


@dataclass(frozen=True)
class _Store:
    """Tensors of one folder.

    Attributes:
        folder: The folder.
        files: Stored tensor name → file name.
        source: Where the names were read, for messages.
    """

    folder: Folder
    files: Mapping[str, str]
    source: str

    @classmethod
    def open(cls, folder: Folder) -> _Store:
        """Read the names in a folder's tensor file or index; none where it has neither."""
        for single in SINGLE_FILES:
            path = folder.find(single)
            if path is not None:
                return cls(folder, dict.fromkeys(tensor_names(path), single), str(path))
            index = folder.find(single + INDEX_SUFFIX)
            if index is not None:
                return cls(folder, read_index(index), str(index))
        return cls(folder, {}, folder.where)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return stored name → tensor, opening only the files that hold them."""
        by_file: dict[str, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.files[name]].append(name)
        paths = {file: self.folder.find(file) for file in by_file}
        absent = sorted(file for file, path in paths.items() if path is None)
        if absent:
            count = sum(len(by_file[file]) for file in absent)
            raise self.folder.missing(
                absent, purpose=f"{count} tensors that {self.source} places there"
            )
        tensors: dict[str, Tensor] = {}
        for file, stored in by_file.items():
            path = paths[file]
            assert path is not None
            _log.info("reading %d tensors of %s", len(stored), path)
            tensors |= read_tensors(path, stored)
        return tensors


Place = tuple[Part, _Store]


def _tower_places(own: _Store, checkpoint: Checkpoint, part: Part) -> list[Place]:
    """Where the tower may be, best first."""
    places = [(part, own)]
    if checkpoint.tower is not None and not _holds(part, own):
        places.append((STANDALONE_TOWER, _Store.open(checkpoint.tower.folder)))
    return places


def _projector_places(own: _Store, checkpoint: Checkpoint) -> list[Place]:
    """Where the projector may be, best first."""
    places = [(PROJECTOR, own)]
    if checkpoint.tower is not None and not _holds(PROJECTOR, own):
        path = checkpoint.folder.find(ORIGINAL_PROJECTOR)
        if path is not None:
            files = dict.fromkeys(tensor_names(path), ORIGINAL_PROJECTOR)
            places.append((STANDALONE_PROJECTOR, _Store(checkpoint.folder, files, str(path))))
    return places


def _holds(part: Part, store: _Store) -> bool:
    return any(name.startswith(part.prefixes) for name in store.files)


def _read_part(
    places: list[Place], shapes: Mapping[str, tuple[int, ...]], needed: frozenset[str]
) -> dict[str, Tensor]:
    """Read a part from the last of its places: the others were found not to hold it."""
    part, store = places[-1]
    wanted = [name for name in shapes if name.startswith(part.canonical)]
    found = resolve(part, wanted, store.files, source=store.source)
    for name in wanted:
        if name in needed and name not in found:
            if not store.files:
                raise store.folder.missing(
                    [*SINGLE_FILES, *(single + INDEX_SUFFIX for single in SINGLE_FILES)],
                    purpose=f"the tensors '{part.canonical}…'",
                )
            raise missing(part, name, store.files, source=store.source)
    stored = store.read(found.values())
    tensors = {name: stored[file_name] for name, file_name in found.items()}
    for name, tensor in tensors.items():
        check_tensor(found[name], tensor, shapes[name], source=store.source)
    return tensors


def _config(folder: Folder) -> dict[str, Any]:
    path = folder.find(CONFIG)
    if path is None:
        raise folder.missing([CONFIG], purpose="the model's architecture")
    return read_json(path)


def _processor(folder: Folder, media: Media) -> dict[str, Any] | None:
    path = folder.find("processor_config.json")
    parts = read_json(path) if path is not None else {}
    for each in ("video", "image") if media == "video" else ("image",):
        nested = parts.get(f"{each}_processor")
        if isinstance(nested, dict):
            return nested
        path = folder.find(_PROCESSOR_FILES[each])
        if path is not None:
            return read_json(path)
    return None
