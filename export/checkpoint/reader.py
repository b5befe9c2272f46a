"""Find a checkpoint and read its vision side: just the tensors needed, from just their files."""

from __future__ import annotations

import logging
import os
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
from vzip.export.checkpoint import leftovers
from vzip.export.checkpoint.containers import read_json, tensor_names
from vzip.export.checkpoint.folders import (
    Folder,
    HubFolder,
    LocalFolder,
    elsewhere,
    tower_advice,
)
from vzip.export.checkpoint.store import Reading, Store
from vzip.export.checkpoint.tensor_names import (
    NEWLINE_EMBEDDING,
    PROJECTOR,
    STANDALONE_PROJECTOR,
    STANDALONE_TOWER,
    Part,
    tower_part,
    unwrapped,
)
from vzip.export.checkpoint.weights import VisionWeights
from vzip.runtime.bundle.manifest import MANIFEST_FILE
from vzip.runtime.errors import CheckpointError, InvalidInputError
from vzip.runtime.guard import door
from vzip.runtime.models import locate

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)

_COMPARE: Final = "compare it with the published one, or download it again"
CONFIG = "config.json"
ORIGINAL_PROJECTOR = "mm_projector.bin"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
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
        vision_tower: Folder or hub id of the tower, in the place of what the configuration names.
    """

    model_id: str
    folder: Folder
    config: dict[str, Any]
    vision_tower: str | None = None

    @classmethod
    @door(
        CheckpointError,
        "the checkpoint '{model}' can't be read",
        cure=_COMPARE,
    )
    def open(
        cls,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        vision_tower: str | os.PathLike[str] | None = None,
    ) -> Checkpoint:
        """Open a checkpoint; from the hub, download its ``config.json``.

        Args:
            model: An alias, a local folder or a hub id; see `vzip.runtime.models.locate`.
            revision: Branch, tag or commit of a hub repository; None is its main branch.
            vision_tower: Folder or hub id of original LLaVA's tower, in the place of the one that
                ``mm_vision_tower`` names.

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
        named = None if vision_tower is None else os.fspath(vision_tower)
        return cls(location.model_id, folder, _config(folder), named)

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
        if self.vision_tower is not None:
            return self._named_tower(self.vision_tower, inside=reference is None)
        if reference is None:
            return None
        if isinstance(self.folder, LocalFolder) and (self.folder.path / reference).is_dir():
            reference = str(self.folder.path / reference)
        try:
            return Checkpoint.open(reference)
        except CheckpointError as error:
            raise CheckpointError(
                f"the tower '{reference}' that {self.folder.where} names in mm_vision_tower: "
                f"{error.got}",
                expected=error.expected,
                cause=elsewhere(reference)
                or error.cause
                or "a local checkpoint may also hold it in a folder of that name",
                cure=tower_advice(reference, self.folder, error.cure),
            ) from error

    @staticmethod
    def _named_tower(tower: str, *, inside: bool) -> Checkpoint:
        """Return the checkpoint of the tower that was asked for."""
        if inside:
            raise InvalidInputError(
                f"vision_tower is '{tower}'",
                expected="none",
                cause="the model's tower is in its own checkpoint",
                cure="leave --vision-tower out",
            )
        try:
            return Checkpoint.open(tower)
        except CheckpointError as error:
            raise CheckpointError(
                f"vision_tower '{tower}': {error.got}",
                expected="the folder or hub id of a CLIP checkpoint",
                cause=error.cause,
                cure=error.cure,
            ) from error

    def preprocessor(self, media: Media) -> dict[str, Any]:
        """Return the settings of the image or video processor, its tower's or else its own.

        The original code asks the tower's checkpoint alone. As in transformers, a part of
        ``processor_config.json`` comes before a file of its own, and for video the image
        processor's settings count where there are none for video.

        Args:
            media: What is to be prepared.

        Raises:
            CheckpointError: There are none.
        """
        for folder in [*([self.tower.folder] if self.tower else []), self.folder]:
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
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    media: Media | None = None,
    vision_tower: str | os.PathLike[str] | None = None,
) -> VisionConfig:
    """Return a model's architecture, for random weights.

    Published repositories behind the aliases are known by heart, so no hub is needed for them; of
    any other model the configuration files are read.

    Args:
        model: As for `Checkpoint.open`.
        revision: As for `Checkpoint.open`; with one, the configuration of that revision is read.
        media: As for `Checkpoint.vision`.
        vision_tower: As for `Checkpoint.open`.

    Raises:
        CheckpointError: As `Checkpoint.open` and `families.describe`.
        InvalidInputError: The model's family has no graph for `media`.
    """
    hub_id = locate(model).hub_id
    plain = hub_id is not None and revision is None and vision_tower is None
    known = families.published(hub_id, media) if plain and hub_id is not None else None
    if known is not None:
        return known
    return Checkpoint.open(model, revision=revision, vision_tower=vision_tower).vision(media)


@door(
    CheckpointError,
    "the tensors of '{checkpoint.model_id}' can't be read",
    cure=_COMPARE,
)
def read_vision(checkpoint: Checkpoint, media: Media | None = None) -> VisionWeights:
    """Read tower, projector and, where the model has one, the newline embedding.

    The dead last layers and the post-LayerNorm come along where they are in the checkpoint.
    Original LLaVA's tower comes from the checkpoint if it was trained and there is a copy in it,
    else from the one that it names, as in the original code; its projector from the checkpoint,
    else from ``mm_projector.bin``.

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
    shapes, needed = tensor_shapes(config), needed_tensors(config)
    original = checkpoint.tower is not None
    own = Store.of(checkpoint.folder, checkpoint.config, original=original)
    part = tower_part(config.tower_module)
    _check_adapter(checkpoint.folder, (*part.roots, *PROJECTOR.roots))
    reading = Reading(shapes, needed)
    tower = _tower_place(own, checkpoint, part)
    for place in (tower, _projector_place(own, checkpoint), (NEWLINE_EMBEDDING, own)):
        reading.read(*place)
    skipped = _other_towers(config)
    if tower[1] is not own:
        skipped += part.roots  # the copy of a tower that was frozen
    reading.check_leftovers(skipped=skipped)
    origin = "" if checkpoint.tower is None else tower[1].source
    return VisionWeights(config, reading.tensors, reading.dequantised, origin)


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
        CheckpointError: The file is missing or damaged, or a tensor is missing, unknown, of a wrong
            shape or not finite.
    """
    file = Path(path)
    shapes = {f"projector.{name}": shape for name, shape in projector_shapes(config).items()}
    reading = Reading(shapes, frozenset(shapes))
    reading.read(STANDALONE_PROJECTOR, Store.of_file(file))
    reading.check_leftovers()
    return reading.tensors


def _other_towers(config: VisionConfig) -> tuple[str, ...]:
    """Return what names of the tower begin with that the other media have, where they have one."""
    pair = ("image_tower", "video_tower")
    others = [name for name in pair if config.tower_module in pair and name != config.tower_module]
    return tuple(root for name in others for root in tower_part(name).roots)


def _check_adapter(folder: Folder, roots: tuple[str, ...]) -> None:
    """Raise where an adapter beside the checkpoint changes what pictures go through.

    One that changes the LLM alone leaves tower and projector as they are.
    """
    if folder.find(ADAPTER[0]) is None:
        return
    for file in ADAPTER[1:]:
        path = folder.find(file)
        names = [] if path is None else map(unwrapped, sorted(tensor_names(path)))
        ours = [name for name in names if name.startswith(roots) or leftovers.is_visual(name)]
        if ours:
            raise leftovers.unmerged(f"{path} holds '{ours[0]}' ({len(ours)} such tensors in all)")


def _tower_place(own: Store, checkpoint: Checkpoint, part: Part) -> tuple[Part, Store]:
    """Return where the tower is: a trained one in the checkpoint, else the one that it names."""
    if checkpoint.tower is None:
        return part, own
    copied, trained = _holds(part, own), families.own_tower(checkpoint.config)
    if copied and trained:
        return part, own
    named = Store.of(checkpoint.tower.folder, checkpoint.tower.config, original=False)
    if copied or trained:
        _log.warning(
            "the tower is the one in %s: %s",
            named.source,
            "its copy in the checkpoint isn't used, as by the original code, since "
            "unfreeze_mm_vision_tower isn't true in config.json"
            if copied
            else "config.json says that it was trained, and the checkpoint has no copy of it",
        )
    return STANDALONE_TOWER, named


def _projector_place(own: Store, checkpoint: Checkpoint) -> tuple[Part, Store]:
    """Return where the projector is: in the checkpoint, else in a file of its own."""
    if checkpoint.tower is not None and not _holds(PROJECTOR, own):
        path = checkpoint.folder.find(ORIGINAL_PROJECTOR)
        if path is not None:
            return STANDALONE_PROJECTOR, Store.of_file(path)
    return PROJECTOR, own


def _holds(part: Part, store: Store) -> bool:
    return any(name.startswith(part.prefixes) for name in store.files)


def _config(folder: Folder) -> dict[str, Any]:
    path = folder.find(CONFIG)
    if path is not None:
        return read_json(path)
    adapter = folder.find(ADAPTER[0])
    if adapter is None and folder.find(MANIFEST_FILE) is not None:
        raise CheckpointError(
            f"{folder.where} holds a bundle ({MANIFEST_FILE})",
            expected="a model: the folder of a checkpoint, a hub id or an alias",
            cause="bundles are made of checkpoints",
            cure=f"give the checkpoint that it was exported from, model.id in its {MANIFEST_FILE}",
        )
    if adapter is None:
        raise folder.missing([CONFIG], purpose="the model's architecture")
    base = read_json(adapter).get("base_model_name_or_path")
    raise CheckpointError(
        f"{folder.where} holds a LoRA or another adapter of PEFT",
        expected="a model",
        cause=f"its base model is {base!r}",
        cure=(
            f"export the base model if the adapter changes the LLM alone; else {leftovers.MERGE}"
        ),
    )


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
