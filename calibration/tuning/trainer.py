"""Efficient tuning: the projector alone learns to tell the LLM of compressed tokens.

Tower and LLM are frozen. The tower's features are made once (`features.py`), so a step is the
projector, the LLM, and the way back through both. Nothing in it is random but the order of the
records, and that follows from the seed and the number of the step; so a run that was interrupted
and resumed gives the same projector as one that was not, bit for bit on a CPU.

Source of the idea: VisionZip (arXiv 2412.04467), "Efficient Tuning".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vzip.calibration.tuning.workers import Workers
from vzip.runtime.errors import BackendError, InvalidInputError
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vzip.calibration.tuning.text import Example, Wording
    from vzip.runtime.llm.local.transformers import TransformersLLM

Dtype = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class TuningRecipe:
    """How a projector is tuned.

    Attributes:
        num_train_epochs: How often every record is seen; the last batch of all is dropped if it
            isn't full.
        per_device_train_batch_size: Records that a process runs at once.
        gradient_accumulation_steps: Batches of a process that make a step.
        learning_rate: Peak learning rate.
        warmup_ratio: Share of the steps in which the rate rises to it; then it falls as a cosine to
            0.
        weight_decay: AdamW's weight decay, of matrices.
        max_grad_norm: Largest norm of a step's gradient.
        seed: Of the order of the records, and of which are taken.
        dtype: Of the LLM. The projector and its optimiser are FP32 in either.

    Raises:
        InvalidInputError: A number that makes no sense.
    """

    num_train_epochs: int = 1
    per_device_train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-5
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    dtype: Dtype = "fp32"

    def __post_init__(self) -> None:
        for name in (
            "num_train_epochs",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
        ):
            if getattr(self, name) < 1:
                raise InvalidInputError(
                    f"{name} is {getattr(self, name)}",
                    expected="at least 1",
                )
        if self.seed < 0:
            raise InvalidInputError(
                f"seed is {self.seed}",
                expected="0 or above",
            )
        for name, most in (("learning_rate", 1.0), ("max_grad_norm", math.inf)):
            value = getattr(self, name)
            if not 0 < value <= most:  # false for NaN too
                raise InvalidInputError(
                    f"{name} is {value}",
                    expected=f"above 0, at most {most}",
                )
        for name in ("warmup_ratio", "weight_decay"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise InvalidInputError(
                    f"{name} is {value}",
                    expected="from 0 to below 1",
                )


class Schedule:
    """Which records a step takes, and its learning rate.

    Attributes:
        steps: How many there are.

    Args:
        recipe: The recipe.
        records: How many records there are.
        processes: How many processes share a step.

    Raises:
        InvalidInputError: The records don't fill a single step.
    """

    def __init__(self, recipe: TuningRecipe, records: int, processes: int) -> None:
        self._recipe, self._records, self._processes = recipe, records, processes
        self._size = (
            recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps * processes
        )
        self.steps = recipe.num_train_epochs * records // self._size
        if self.steps == 0:
            raise InvalidInputError(
                f"{recipe.num_train_epochs} × {counted(records, 'record')} fill no step of "
                f"{self._size} (batches of {recipe.per_device_train_batch_size} × "
                f"{recipe.gradient_accumulation_steps} accumulated × {processes} processes)",
                cure="lower --per-device-train-batch-size or --gradient-accumulation-steps, or "
                "raise --num-train-epochs",
            )

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, 0 to `steps` − 1."""
        warm = math.ceil(self._recipe.warmup_ratio * self.steps)
        if step < warm:
            return self._recipe.learning_rate * (step + 1) / warm
        share = (step - warm) / max(1, self.steps - warm)
        return self._recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * share))

    def batches(self, step: int, rank: int) -> Iterator[list[int]]:
        """Yield a process's batches of a step, as places in the list of records.

        However many processes share a step, the same batches are made for it.
        """
        start, batch = step * self._size, self._recipe.per_device_train_batch_size
        for number in range(self._recipe.gradient_accumulation_steps):
            first = start + (number * self._processes + rank) * batch
            yield [self._record(place) for place in range(first, first + batch)]

    def _record(self, place: int) -> int:
        epoch, within = divmod(place, self._records)
        return int(self._order(epoch)[within])

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return the order of an epoch; the last one asked for is remembered."""
        if getattr(self, "_made", None) != epoch:
            rng = np.random.default_rng([self._recipe.seed, epoch])
            self._shuffled: NDArray[np.int64] = rng.permutation(self._records)
            self._made = epoch
        return self._shuffled


class Tuner:
    """A projector, its optimiser, and the frozen LLM that says in which direction to go.

    Args:
        llm: The LLM; its parameters are frozen here.
        projector: FP32, float32 [.., F] → [.., L]; trained in place.
        wording: Makes batches of examples.
        recipe: The recipe.
        schedule: Of the same recipe.
        workers: The processes that share the steps.
    """

    def __init__(
        self,
        llm: TransformersLLM,
        projector: nn.Module,
        wording: Wording,
        *,
        recipe: TuningRecipe,
        schedule: Schedule,
        workers: Workers,
    ) -> None:
        self._model = llm.model.requires_grad_(False)
        self._placeholder = llm.text.prompts.placeholders["image"]
        self._device, self._dtype = llm.device, llm.dtype
        self._projector = projector.float().to(llm.device).requires_grad_(True)
        self._wording, self._recipe = wording, recipe
        self._schedule, self._workers = schedule, workers
        parameters = list(self._projector.parameters())
        matrices = [parameter for parameter in parameters if parameter.ndim > 1]
        vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
        self._parameters = [*matrices, *vectors]
        self._optimiser = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
        )

    def step(
        self,
        number: int,
        examples: Sequence[Example],
        features: Callable[[int], NDArray[np.float16]],
    ) -> float:
        """Take a step.

        Args:
            number: Which, from 0.
            examples: All of them, in the order of the records.
            features: Gives the features [K, F] of a record's image.

        Returns:
            The loss before the step: cross-entropy per token of the answers, in nats.

        Raises:
            BackendError: The loss or its gradient is not finite, or memory ran out.
        """
        try:
            total, learned = self._gradients(number, examples, features)
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"tuning: out of memory on {self._device} with batches of "
                f"{self._recipe.per_device_train_batch_size}",
                cure="lower --per-device-train-batch-size and raise "
                "--gradient-accumulation-steps by as much, or take --dtype bf16",
            ) from error
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        sums = torch.stack([total, learned])
        self._workers.add([*gradients, sums])
        for gradient in gradients:
            gradient.div_(sums[1])
        norm = nn.utils.clip_grad_norm_(self._parameters, self._recipe.max_grad_norm)
        loss = float(sums[0] / sums[1])
        if not math.isfinite(loss) or not math.isfinite(float(norm)):
            raise BackendError(
                f"tuning: at step {number} the loss is {loss} and its gradient's norm "
                f"{float(norm)}",
                expected="finite numbers",
                cure="lower --learning-rate, or take --dtype fp32",
            )
        for group in self._optimiser.param_groups:
            group["lr"] = self._schedule.rate(number)
        self._optimiser.step()
        self._optimiser.zero_grad()
        return loss

    def state(self) -> dict[str, Any]:
        """Return everything that later steps depend on, for `torch.save`."""
        return {
            "projector": self._projector.state_dict(),
            "optimiser": self._optimiser.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        self._projector.load_state_dict(state["projector"])
        self._optimiser.load_state_dict(state["optimiser"])

    def _gradients(
        self,
        number: int,
        examples: Sequence[Example],
        features: Callable[[int], NDArray[np.float16]],
    ) -> tuple[Tensor, Tensor]:
        """Add up this process's gradients of a step; return its summed loss and its tokens."""
        total = torch.zeros((), device=self._device)
        learned = torch.zeros((), device=self._device)
        for places in self._schedule.batches(number, self._workers.rank):
            rows = torch.from_numpy(np.stack([features(place) for place in places]))
            loss, tokens = self._loss([examples[place] for place in places], rows)
            torch.autograd.backward(loss)
            total += loss.detach()
            learned += tokens
        return total, learned

    def _loss(self, examples: Sequence[Example], features: Tensor) -> tuple[Tensor, int]:
        """Return the summed cross-entropy of a batch's answers, and how many tokens they have.

        Args:
            examples: B of them.
            features: float16 [B, K, F].
        """
        batch = self._wording.batch(examples)
        ids = torch.from_numpy(batch.ids).to(self._device)  # [B, T]
        embeds = self._projector(features.to(self._device).float())  # [B, K, L]
        places = ids == self._placeholder
        # A placeholder need not have a row of its own in the LLM's embeddings.
        words = self._model.get_input_embeddings()(ids.masked_fill(places, 0))  # [B, T, L]
        words = words.masked_scatter(places.unsqueeze(-1), embeds.to(self._dtype))
        hidden = self._model.get_decoder()(
            inputs_embeds=words,
            attention_mask=torch.from_numpy(batch.mask).to(self._device),
            use_cache=False,
        ).last_hidden_state
        # A token is predicted where the one before it stands; only answers are, so that the
        # logits of everything else are never made.
        learned = torch.from_numpy(batch.learned).to(self._device)[:, 1:]
        logits = self._model.get_output_embeddings()(hidden[:, :-1][learned])  # [P, vocabulary]
        loss = functional.cross_entropy(logits.float(), ids[:, 1:][learned], reduction="sum")
        return loss, len(logits)
