"""The text side of a LLaVA checkpoint, without running it: words, tokenizer, token embeddings.

For engines that take a prompt as ids or as embeddings but know nothing of images: they run the LLM,
and what stands around and at an image's place is made here. No weight is read but the rows of the
embedding table that a prompt needs, and neither torch nor safetensors is needed for that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vzip.runtime.errors import CheckpointError, VzipError, missing
from vzip.runtime.llm import ImageTokens, Shown, check_question, check_shown
from vzip.runtime.llm.chat_template import HubTokenizer, words_of
from vzip.runtime.llm.prompts import KINDS, Kind, Prompts
from vzip.runtime.models import locate

if TYPE_CHECKING:
    import numpy.typing as npt

    from vzip.runtime.llm import Embeds

# What transformers reads of a checkpoint for its configuration, tokenizer and chat template.
_TEXT_FILES: Final = ("*.json", "*.jinja", "*.model")
_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
# In every layout of transformers, old and new, the LLM's table is the only tensor of this name.
_TABLE: Final = "embed_tokens.weight"
_LONGEST_HEADER: Final = 100_000_000  # bytes; safetensors itself reads no longer one

# Families and LLMs that were trained with LLaVA-1.5's words; the others need a chat template.
_LLAVA_15_FAMILIES: Final = ("llava", "video_llava")
_LLAVA_15_LLMS: Final = ("llama", "mistral")

LARGEST: Final = {"float32": 3.4028235e38, "bfloat16": 3.3895314e38, "float16": 65504.0}
"""dtype → largest magnitude."""


@dataclass(frozen=True)
class TextCheckpoint:
    """What a prompt for a checkpoint's LLM is made of.

    Attributes:
        engine: The engine's name, for messages.
        model: What was opened.
        folder: Where it is on this machine.
        revision: Commit on the hub; None for the newest, or a local folder.
        model_type: That of its configuration, such as ``llava_next``.
        tokenizer: Its tokenizer.
        prompts: Its prompts.
        hidden_size: L, the width of a token.
        dtype: The checkpoint's, of `LARGEST`.
        context: Longest sequence in tokens; None when the LLM states none.
        eos_ids: Ids that end an answer.
        tokens: What the bundle says about its tokens; None to take any number.
    """

    engine: str
    model: str
    folder: Path
    revision: str | None
    model_type: str
    tokenizer: HubTokenizer
    prompts: Prompts
    hidden_size: int
    dtype: str
    context: int | None
    eos_ids: frozenset[int]
    tokens: ImageTokens | None

    @classmethod
    def open(
        cls,
        engine: str,
        model: str | Path,
        *,
        tokens: ImageTokens | None = None,
        revision: str | None = None,
    ) -> TextCheckpoint:
        """Read a checkpoint's configuration and tokenizer.

        Args:
            engine: The engine's name, for messages.
            model: An alias (``demo``), a hub id or a local folder.
            tokens: What the bundle says about its tokens, from `ImageTokens.of`.
            revision: Commit on the hub.

        Raises:
            MissingDependencyError: transformers is not installed.
            CheckpointError: The checkpoint was not found, is incomplete, is no LLaVA of
                transformers, or lacks the chat template that its family needs.
            InvalidInputError: The bundle's tokens are not made for this LLM.
        """
        try:
            import transformers
        except ImportError as error:
            package = error.name or "transformers"
            raise missing(package, needed_for=f"{engine}: tokenizing", extra="export") from error
        name = str(model)
        folder = _fetch(engine, name, revision, _TEXT_FILES)
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            processor, _ = transformers.LlavaProcessor.get_processor_dict(
                folder, local_files_only=True
            )
            text = config.get_text_config()
            hidden_size = int(text.hidden_size)
            ends = _ends(folder)
        except Exception as error:  # the libraries' classes change between versions
            raise CheckpointError(
                f"{engine}: the text side of {name!r} can't be read ({_first_line(error)})",
                cure="give a whole llava-hf checkpoint with its tokenizer",
            ) from error
        template = processor.get("chat_template") or tokenizer.chat_template
        if isinstance(template, dict):
            template = template["default"]
        placeholders: dict[Kind, int] = {
            kind: int(getattr(config, f"{kind}_token_index"))
            for kind in KINDS
            if getattr(config, f"{kind}_token_index", None) is not None
        }
        plain = config.model_type in _LLAVA_15_FAMILIES and text.model_type in _LLAVA_15_LLMS
        if "image" not in placeholders or (template is None and not plain):
            lacks = "chat template" if "image" in placeholders else "image token"
            raise CheckpointError(
                f"{engine}: {name!r} is a {config.model_type!r} model with a "
                f"{text.model_type!r} LLM and no {lacks}",
                expected="a LLaVA of transformers",
                cure="give a whole llava-hf checkpoint",
            )
        if tokens is not None:
            tokens.check_llm(
                engine,
                model=name,
                hidden_size=hidden_size,
                image_token_id=placeholders["image"],
                video_token_id=placeholders.get("video"),
            )
        try:
            adapted = HubTokenizer(tokenizer)
            known = {k: i for k, i in placeholders.items() if adapted.token(i) is not None}
            prompts = Prompts(engine, adapted, words_of(tokenizer, known, template), placeholders)
        except CheckpointError as error:
            raise CheckpointError(_named(engine, error)) from error
        context = getattr(text, "max_position_embeddings", None)
        # As text: transformers gives torch's dtype where torch is, else the name.
        dtype = str(config.dtype).removeprefix("torch.")
        if dtype not in LARGEST:
            raise CheckpointError(
                f"{engine}: {name!r} says that its dtype is {dtype!r}",
                expected=f"one of {', '.join(LARGEST)}",
                cure="repair its config.json",
            )
        return cls(
            engine=engine,
            model=name,
            folder=folder,
            revision=revision,
            model_type=str(config.model_type),
            tokenizer=adapted,
            prompts=prompts,
            hidden_size=hidden_size,
            dtype=dtype,
            context=None if context is None else int(context),
            eos_ids=frozenset({prompts.eos_id, *ends}),
            tokens=tokens,
        )

    def shown(
        self,
        embeds: Embeds | Sequence[Embeds],
        frames: int | None = None,
        *,
        dtype: str,
        takes_videos: bool,
    ) -> Shown:
        """Check what the first turn shows; see `vzip.runtime.llm.check_shown`.

        Args:
            embeds: The tokens of an image, several, or a video.
            frames: The video's frames; ``None`` for images.
            dtype: The LLM's dtype, of `LARGEST`.
            takes_videos: Whether the engine takes a video at a placeholder of its own.
        """
        return check_shown(
            self.engine,
            embeds,
            frames=frames,
            tokens=self.tokens,
            hidden_size=self.hidden_size,
            takes_videos=takes_videos and "video" in self.prompts.placeholders,
            largest=LARGEST[dtype],
        )

    def first(self, shown: Shown, question: str) -> list[int]:
        """Return the first turn's ids, with one placeholder for each image or video.

        Raises:
            CheckpointError: The LLM's words have no place for what is shown.
            InvalidInputError: The question is empty or contains a placeholder.
        """
        check_question(self.engine, question)
        return self.prompts.first(question.strip(), shown.kind, len(shown.parts))

    def text(self, shown: Shown, question: str) -> str:
        """Return the first turn as text, without what a tokenizer puts in front.

        Raises:
            CheckpointError: The LLM's words have no place for what is shown.
            InvalidInputError: The question is empty or contains a placeholder.
        """
        ids = self.first(shown, question)
        turn = self.prompts.words.first[shown.kind]
        token = str(self.tokenizer.token(self.prompts.placeholders[shown.kind]))
        places = (turn.between or "").join([token] * len(shown.parts))
        text = f"{turn.before}{places}{turn.after}{question.strip()}{turn.end}"
        # A template may write the beginning-of-sequence token that the tokenizer writes too.
        for each in (text, text.removeprefix(self.tokenizer.bos or "")):
            if self.tokenizer.encode(each, special=True) == ids:
                return each
        raise CheckpointError(
            f"{self.engine}: the tokenizer of {self.model!r} makes other ids of a prompt than "
            "of its parts, so that it can't be given as text",
            cure="use another engine (--llm)",
        )

    def table(self) -> EmbeddingTable:
        """Find the LLM's embedding table; its rows are read as they are asked for.

        Raises:
            CheckpointError: It is not there, or the file is damaged.
        """
        folder = self.folder
        index = folder / _INDEX
        file = _SINGLE
        if index.is_file():
            try:
                files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                found = {str(f) for name, f in files.items() if name.endswith(_TABLE)}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise self._damaged(index, "is no index of tensors") from error
            if len(found) != 1:
                raise self._damaged(index, f"names {len(found)} files with …{_TABLE}, expected 1")
            (file,) = found
        if not (folder / file).is_file():
            folder = _fetch(self.engine, self.model, self.revision, (file,))
        path = folder / file
        if Path(file).name != file or not path.is_file():
            raise self._damaged(path, "is not there, but this engine takes the token embeddings")
        return EmbeddingTable.of(self, path)

    def _damaged(self, path: Path, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.engine}: '{path}' {what}",
            cure="give a whole checkpoint in the safetensors format",
        )


@dataclass(frozen=True)
class EmbeddingTable:
    """The token embeddings of an LLM, on the disk.

    Attributes:
        raw: [V, L], as stored; bfloat16 as uint16.
    """

    raw: npt.NDArray[Any]

    @classmethod
    def of(cls, checkpoint: TextCheckpoint, path: Path) -> EmbeddingTable:
        """Map the table of a safetensors file, whose format `vzip.runtime.tokens.file` describes.

        Not by the package safetensors, which gives numpy no bfloat16 and reads a tensor whole.

        Raises:
            CheckpointError: The file is damaged, or its table has another shape or dtype.
        """
        dtypes = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length) if length < _LONGEST_HEADER else b"")
            ((_, entry),) = (each for each in header.items() if each[0].endswith(_TABLE))
            dtype, (rows, width) = dtypes[entry["dtype"]], entry["shape"]
            raw = np.memmap(
                path, dtype, "r", 8 + length + entry["data_offsets"][0], (int(rows), int(width))
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise checkpoint._damaged(
                path, f"holds no readable table of token embeddings ({_first_line(error)})"
            ) from error
        if width != checkpoint.hidden_size:
            raise checkpoint._damaged(
                path, f"holds token embeddings of width {width}, expected {checkpoint.hidden_size}"
            )
        return cls(raw)

    def rows(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the embeddings of some tokens, float32 [m, L]."""
        found = np.asarray(self.raw[np.asarray(ids, np.int64)])
        if found.dtype == np.uint16:  # bfloat16 is the upper half of a float32
            return (found.astype(np.uint32) << 16).view(np.float32)
        return found.astype(np.float32)


def own_checkpoint(
    engine: str, model: str, tokens: ImageTokens, revision: str | None
) -> TextCheckpoint:
    """Open the checkpoint that a bundle was exported from.

    Raises:
        CheckpointError: It is not there any more, or not one that `TextCheckpoint.open` takes.
    """
    try:
        locate(model)
    except CheckpointError as error:
        raise CheckpointError(
            f"{engine}: needs the tokenizer and token embeddings of the checkpoint that the "
            f"bundle was exported from, {model!r}, which is not here any more ({error})",
            cure="put it there again, or export the bundle from where it is now",
        ) from error
    return TextCheckpoint.open(engine, model, tokens=tokens, revision=revision)


def _fetch(engine: str, model: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """Return the local folder of a checkpoint, downloading what of it is not there yet."""
    location = locate(model)
    if location.folder is not None:
        return location.folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise missing("huggingface_hub", needed_for="a hub model", extra="export") from error
    assert location.hub_id is not None
    try:
        return Path(
            snapshot_download(location.hub_id, revision=revision, allow_patterns=list(patterns))
        )
    except Exception as error:  # its HTTP library's classes change between versions
        raise CheckpointError(
            f"{engine}: {location.hub_id} is neither in the local cache nor to be had from the "
            f"hub ({_first_line(error)})",
            cure="connect to the network, or fetch it before",
        ) from error


def _ends(folder: Path) -> list[int]:
    """Return the ids that generation_config.json says end an answer."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return [
        int(each) for each in (ends if isinstance(ends, list) else [] if ends is None else [ends])
    ]


def _named(engine: str, error: VzipError) -> str:
    """Return an error's words with the engine's name in place of the template reader's."""
    return f"{engine}: {str(error).partition(': ')[2]}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
