"""Compressed tokens into the LLaVAs of transformers, each with the class of its family.

A conversation puts the tokens in by ``inputs_embeds`` (any version of transformers): the prompt's
token embeddings, with the rows of as many placeholders overwritten. The prompt is never expanded by
the family's processor, which always writes one placeholder per patch. Whoever wants transformers'
own ``generate``, with its sampling, beams and batches, gets what it takes from `generation_inputs`:
in that form, or as ``mm_encoder_outputs`` (transformers 5.18 and newer).

An image has one placeholder in the chat template. A video has one of its own where the LLM knows
videos; where it doesn't, its frames are images that follow each other, each with its placeholder.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vzip.runtime.console import loading_quietly
from vzip.runtime.errors import (
    BackendError,
    CheckpointError,
    InvalidInputError,
    MissingDependencyError,
    first_line,
    missing,
)
from vzip.runtime.guard import door
from vzip.runtime.llm.contract import DEFAULT_MAX_NEW_TOKENS
from vzip.runtime.llm.conversation import (
    GreedyLLM,
    beyond,
    check_context,
    check_max_new_tokens,
    check_question,
)
from vzip.runtime.llm.shown import TokenSpec, check_batch, say_consecutive
from vzip.runtime.llm.text_side import (
    TEXT_FILES,
    TextFiles,
    fetch,
    listed_ids,
    placeholder_ids,
    side_of,
)
from vzip.runtime.machine import process
from vzip.runtime.tokens.positions import along
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from vzip.runtime.bundle.reader import Bundle
    from vzip.runtime.llm.prompts import Kind
    from vzip.runtime.llm.shown import Embeds, Given, Shown
    from vzip.runtime.tokens.positions import Positions

NAME = "transformers"

CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "llava": "LlavaForConditionalGeneration",
        "vipllava": "VipLlavaForConditionalGeneration",
        "llava_next": "LlavaNextForConditionalGeneration",
        "video_llava": "VideoLlavaForConditionalGeneration",
        "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    }
)
"""A configuration's ``model_type`` → the class of transformers that runs it."""

# What a class takes as encoder outputs in a list [K, L] each; all others in one tensor [n, K, L].
# Read in transformers 5.23's forward methods, which concatenate the former themselves.
_LISTED = {("llava", "image"), ("llava_next", "image"), ("llava_onevision", "image")}

# Modules that are the bundle's business, and may be absent.
_VISION = ("vision_tower", "image_tower", "video_tower", "multi_modal_projector", "image_newline")


class TransformersLLM(GreedyLLM):
    """A LLaVA of transformers that answers questions about compressed tokens.

    Attributes:
        model: The model, of one of `CLASSES`.
        tokenizer: Its tokenizer, as given.
        template: Its chat template, as given.
        device: Where it is.
        dtype: torch's dtype of its embeddings.
    """

    name = NAME
    unable = None

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        template: str | None,
        template_home: str = "",
        tokens: TokenSpec | None = None,
    ) -> None:
        """Take a model that is already in memory; `open` is for those that are not.

        Args:
            model: A model of one of `CLASSES`.
            tokenizer: Its tokenizer.
            template: Its chat template, or ``None`` for LLaVA-1.5's prompt.
            template_home: The file that it stands in, for messages.
            tokens: What the bundle says about its tokens; ``None`` to take any number.

        Raises:
            InvalidInputError: The bundle's tokens are not made for this LLM.
            CheckpointError: The tokenizer does not belong to a LLaVA.
        """
        import torch

        config = model.config
        if tokens is not None:
            tokens.check_llm(
                NAME,
                model=str(config.name_or_path or "given"),
                hidden_size=int(config.get_text_config().hidden_size),
                placeholders=placeholder_ids(config),
            )
        ends = listed_ids(model.generation_config.eos_token_id)
        self.text = side_of(
            NAME,
            config,
            tokenizer,
            template=template,
            template_home=template_home,
            ends=ends,
            tokens=tokens,
        )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.template = template
        self.dtype = model.get_input_embeddings().weight.dtype
        self.device = model.device
        self.largest = float(torch.finfo(self.dtype).max)
        self.trained = self.text.context

    @classmethod
    @door(
        CheckpointError,
        "{model}: its LLM can't be loaded",
        cure="give a whole llava-hf checkpoint with its tokenizer",
    )
    def open(
        cls,
        model: str | Path,
        *,
        tokens: TokenSpec | None = None,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        threads: int | None = None,
    ) -> TransformersLLM:
        """Load the LLM of a checkpoint.

        Configuration and tokenizer are read and compared with the bundle before any weight is.

        Args:
            model: An alias (``demo``), a hub id or a local folder, as for ``vzip export --model``.
            tokens: What the bundle says about its tokens, from `TokenSpec.of`.
            revision: Commit on the hub.
            device: torch's name of a device; ``auto`` is CUDA where there is a GPU, else the CPU.
            dtype: torch's name of a dtype; ``auto`` is the checkpoint's, except that float16
                becomes float32 on a CPU, where half precision is slow and rounds more.
            threads: As for `vzip.runtime.llm.open_llm`; None for those of `process.limit_threads`,
                or else PyTorch's own number.

        Raises:
            MissingDependencyError: torch or transformers is not installed.
            CheckpointError: The checkpoint was not found, is incomplete, is no LLaVA of
                transformers, or lacks the chat template that its family needs.
            InvalidInputError: The bundle's tokens are not made for this LLM.
        """
        try:
            import torch
            import transformers
        except ImportError as error:
            package = error.name or "transformers"
            raise missing(package, needed_for="answering questions", extra="export") from error
        if (number := threads or process.thread_limit()) is not None:
            torch.set_num_threads(number)
        files = TextFiles.read(NAME, model, revision)
        _check_architecture(files.config, files.model)
        files.side(tokens)  # before weights are read
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = fetch(NAME, model, revision, (*TEXT_FILES, "*.safetensors"))
        made = getattr(transformers, CLASSES[files.config.model_type])
        try:
            with loading_quietly():
                llava, report = made.from_pretrained(
                    folder,
                    dtype="auto" if dtype == "auto" else getattr(torch, dtype),
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                    trust_remote_code=False,
                )
        except Exception as error:  # of a damaged file the libraries raise anything
            raise CheckpointError(
                f"{NAME}: the LLM {files.model!r} can't be loaded ({first_line(error)})",
                cure="give a whole llava-hf checkpoint (--llm)",
            ) from error
        # Tower and projector are the bundle's business; a hole in the LLM would be filled with
        # random numbers.
        lost = sorted(
            key for key in report["missing_keys"] if not any(part in key for part in _VISION)
        )
        if lost:
            raise CheckpointError(
                f"{NAME}: the checkpoint {str(model)!r} lacks {counted(len(lost), 'tensor')} of "
                f"its LLM, such as {lost[0]}",
                cause="shards are missing or it is of another layout",
                cure="give a whole llava-hf checkpoint (--llm)",
            )
        # What is quantised as it is loaded is where it belongs, and in its dtype.
        if getattr(llava, "is_quantized", False):
            device = str(llava.device)
        elif dtype == "auto" and device == "cpu" and llava.dtype == torch.float16:
            llava = llava.float()
        return cls(
            llava.to(device),
            files.tokenizer,
            template=files.template,
            template_home=files.template_home,
            tokens=tokens,
        )

    def new_cache(self) -> Any:
        """Return an empty KV cache."""
        from transformers import DynamicCache

        return DynamicCache()

    def step(
        self,
        ids: list[int],
        cache: Any,
        rows: Embeds | None,
        positions: NDArray[np.int64] | None = None,
    ) -> int:
        """Run the LLM over new tokens; see `GreedyLLM.step`."""
        import torch

        with torch.inference_mode(), self._memory(lambda: cache.get_seq_length() + len(ids)):
            best, token = self.logits(ids, cache, rows, positions).max(dim=-1)
            if not best.isfinite():  # NaN anywhere in the row is what max returns
                raise BackendError(
                    f"{NAME}: the LLM's output is not finite in {self.dtype}",
                    cure="open it with dtype='float32'",
                )
        return int(token)

    def logits(
        self,
        ids: list[int],
        cache: Any,
        rows: Embeds | None,
        positions: NDArray[np.int64] | None = None,
    ) -> torch.Tensor:
        """Run the LLM over new tokens; see `GreedyLLM.step`.

        Returns:
            The logits behind the last of them, float32 [V].
        """
        import torch

        new = torch.tensor([ids], device=self.device)  # [1, m]
        length = cache.get_seq_length() + len(ids)
        given: dict[str, Any] = {cache_argument(self.model): cache}
        # Without a mask transformers takes jumps in positions for several packed sequences, and
        # hides them from each other.
        given["attention_mask"] = torch.ones(1, length, dtype=torch.int64, device=self.device)
        if positions is not None:
            given["position_ids"] = torch.from_numpy(positions)[None].to(self.device)
        result = self.model(
            inputs_embeds=self._embeddings(new, rows), **given, use_cache=True, logits_to_keep=1
        )
        last: torch.Tensor = result.logits[0, -1].float()
        return last

    def generation_inputs(
        self,
        embeds: Sequence[Given | Sequence[Given]],
        questions: Sequence[str],
        *,
        frames: int | None = None,
        positions: Positions | None = None,
        form: Literal["inputs_embeds", "mm_encoder_outputs"] = "inputs_embeds",
    ) -> dict[str, Any]:
        """Return what ``model.generate`` takes for a batch of questions, each with its images.

        Prompts are padded on the left. With ``inputs_embeds`` generate returns the new ids alone,
        with ``mm_encoder_outputs`` the prompt's in front of them. Beam search changes the object
        that the latter holds: make the inputs anew for every call.

        Args:
            embeds: For each question what `conversation` takes: an image's tokens or a list of
                several images'; of videos, which all have as many frames.
            questions: As many, without any prompt around them.
            frames: Frames of each video; ``None`` for images.
            positions: As for `conversation`. They go in as ``position_ids``, which never may
                without the mask.
            form: How the tokens go in; ``mm_encoder_outputs`` needs transformers 5.18.

        Returns:
            ``attention_mask`` int64 [B, m] and ``inputs_embeds`` [B, m, L] in the LLM's dtype; or
            ``input_ids`` int64 [B, m], ``attention_mask`` and ``mm_encoder_outputs``. With original
            positions also ``position_ids`` int64 [B, m].

        Raises:
            InvalidInputError: Not as many questions as embeds, none at all, or one of them is
                wrong; the first that is, is named.
            MissingDependencyError: This transformers does not know ``mm_encoder_outputs``.
        """
        import torch

        check_batch(NAME, embeds, questions)
        if form == "mm_encoder_outputs":
            self._check_encoder_outputs()
        all_shown, prompts = [], []
        for number, (each, question) in enumerate(zip(embeds, questions, strict=True)):
            where = f"{NAME}: question {number}" if len(questions) > 1 else NAME
            check_question(where, question)
            shown = self.text.shown(
                each,
                frames,
                largest=self.largest,
                where=where,
                positions=positions,
                unable=self._generate_unable(),
            )
            all_shown.append(shown)
            prompts.append(self.text.first(shown, question))
        longest = max(map(len, prompts))
        pads = [longest - len(ids) for ids in prompts]
        # Under the mask nothing is read, so any ordinary token pads.
        input_ids = torch.tensor(
            [
                [self.text.prompts.eos_id] * pad + ids
                for pad, ids in zip(pads, prompts, strict=True)
            ],
            device=self.device,
        )
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=self.device)
        parts = [part for shown in all_shown for part in shown.parts]
        given: dict[str, Any] = {"attention_mask": mask}
        if any(shown.where is not None for shown in all_shown):
            found = zip(all_shown, prompts, pads, strict=True)
            every = [[0] * pad + self._positions(shown, ids) for shown, ids, pad in found]
            given["position_ids"] = torch.tensor(every, device=self.device)
        if form == "inputs_embeds":
            with torch.no_grad(), self._memory(mask.numel):
                made = self._embeddings(input_ids, np.concatenate(parts))
            return {"inputs_embeds": made, **given}
        outputs = self._encoder_outputs(all_shown[0].kind, parts)
        return {"input_ids": input_ids, "mm_encoder_outputs": outputs, **given}

    def _generate_unable(self) -> str | None:
        """Say why ``generate`` gives tokens no positions of their own; None where it does.

        Older ones give each new token the position of the prompt's last.
        """
        import torch
        from transformers.modeling_outputs import CausalLMOutputWithPast

        before = {"position_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 1)}
        made = self.model._update_model_kwargs_for_generation(CausalLMOutputWithPast(), before)
        if made["position_ids"].tolist() == [[7, 8]]:
            return None
        return "this version of transformers' generate doesn't count them on"

    def _positions(self, shown: Shown, ids: list[int]) -> list[int]:
        """Return the positions of a first prompt's ids."""
        if shown.where is None:
            return list(range(len(ids)))
        placeholder = self.text.prompts.placeholders[shown.kind]
        return [int(each) for each in along(ids, placeholder, shown.where)]

    def ask_batch(
        self,
        embeds: Sequence[Given | Sequence[Given]],
        questions: Sequence[str],
        *,
        frames: int | None = None,
        positions: Positions | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    ) -> list[str]:
        """Answer questions about as many images in one batch, greedily.

        Rounding differs from that of one question alone, as in any batch.

        Args:
            embeds: As for `generation_inputs`.
            questions: As many.
            frames: Frames of each video; ``None`` for images.
            positions: As for `conversation`; one question whose positions pass the context makes
                those of all consecutive.
            max_new_tokens: Longest answer, in tokens.

        Returns:
            The answers, without white space around them.

        Raises:
            InvalidInputError: As for `generation_inputs`; or a prompt and its answer don't fit into
                the LLM's context.
            BackendError: Out of memory.
        """
        import torch

        check_max_new_tokens(NAME, max_new_tokens)
        inputs = self.generation_inputs(embeds, questions, frames=frames, positions=positions)
        if "position_ids" in inputs and self.trained is not None:
            reached = int(inputs["position_ids"].max()) + 1 + max_new_tokens
            if reached > self.trained:
                say_consecutive(beyond(NAME, max_new_tokens, reached, self.trained))
                inputs = self.generation_inputs(
                    embeds, questions, frames=frames, positions="consecutive"
                )
        batch, longest = inputs["attention_mask"].shape
        check_context(
            NAME, earlier=0, new=longest, max_new_tokens=max_new_tokens, context=self.text.context
        )
        with torch.inference_mode(), self._memory(lambda: batch * (longest + max_new_tokens)):
            made = self.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                eos_token_id=sorted(self.text.eos_ids),
                pad_token_id=self.text.prompts.eos_id,
            )
        return [self.text.prompts.decode(self.text.spoken(ids)) for ids in made.tolist()]

    def _embeddings(self, ids: torch.Tensor, rows: Embeds | None) -> torch.Tensor:
        """Return [B, m, L] of ids [B, m], in which the placeholders' are `rows` [n, L]."""
        import torch

        embed = self.model.get_input_embeddings()
        if rows is None:
            return embed(ids)  # type: ignore[no-any-return]
        places = torch.isin(ids, ids.new_tensor(list(self.text.prompts.placeholders.values())))
        # A placeholder need not have a row of its own in the LLM's embeddings.
        made: torch.Tensor = embed(ids.masked_fill(places, 0))
        made[places] = torch.from_numpy(rows).to(self.device, self.dtype)
        return made

    def _encoder_outputs(self, kind: Kind, parts: Sequence[Embeds]) -> dict[Kind, Any]:
        """Return ``mm_encoder_outputs`` of images or videos, [K, L] each."""
        import torch
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        features = [torch.tensor(part).to(self.device, self.dtype) for part in parts]
        if (self.model.config.model_type, kind) in _LISTED:
            return {kind: BaseModelOutputWithPooling(pooler_output=features)}
        counts = [len(part) for part in parts]
        if len(set(counts)) > 1:
            raise InvalidInputError(
                f"{NAME}: got {kind}s of {counts} tokens",
                expected="as many of each, which the mm_encoder_outputs of "
                f"{type(self.model).__name__} take",
                cure="use form='inputs_embeds'",
            )
        return {kind: BaseModelOutputWithPooling(pooler_output=torch.stack(features))}

    def _check_encoder_outputs(self) -> None:
        """Refuse a transformers that doesn't know them."""
        if "mm_encoder_outputs" not in inspect.signature(self.model.forward).parameters:
            import transformers

            raise MissingDependencyError(
                f"{NAME}: transformers {transformers.__version__} doesn't take "
                f"mm_encoder_outputs for {type(self.model).__name__}",
                expected="5.18 or newer",
                cure="upgrade it, or use form='inputs_embeds'",
            )

    @contextlib.contextmanager
    def _memory(self, tokens: Callable[[], int]) -> Iterator[None]:
        """Say in one line that memory ran out."""
        import torch

        try:
            yield
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"{NAME}: out of memory on {self.device} at {counted(tokens(), 'token')}",
                cure=(
                    "begin a new conversation, free memory, or use a bundle with fewer tokens per "
                    "image"
                ),
            ) from error


def open_for(
    where: str, bundle: Bundle, *, revision: str | None = None, threads: int | None = None
) -> TransformersLLM:
    """Open the LLM of a checkpoint for a bundle's tokens; see `vzip.runtime.llm.opening`."""
    tokens = TokenSpec.of(bundle.manifest)
    return TransformersLLM.open(where, tokens=tokens, revision=revision, threads=threads)


def cache_argument(model: Any) -> str:
    """Return what a model of transformers calls its KV cache: another name since 5.24.

    The older name gives a warning with 5.24, and is gone in 5.40.
    """
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def _check_architecture(config: Any, model: str) -> None:
    """Refuse what is not a LLaVA in transformers' layout."""
    known = CLASSES.get(config.model_type)
    architectures = config.architectures or [known]  # some configurations name none
    if known not in architectures or known is None:
        named = ", ".join(map(str, architectures))
        raise CheckpointError(
            f"{NAME}: {model!r} is a {config.model_type!r} model ({named})",
            expected=f"one of {', '.join(CLASSES.values())}",
            cure="for a checkpoint in the original LLaVA layout give its llava-hf twin, such as "
            "--llm llava-1.5-7b",
        )
