"""A projector tuned on compressed tokens: `vzip.calibration.tune`, and `vzip tune`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vzip.calibration.tuning.data import (
    DEMO,
    DEMO_SCENES,
    DemoData,
    InstructionData,
    choose,
)
from vzip.export.algorithm import selections
from vzip.export.algorithm.budget import Merge
from vzip.runtime import console
from vzip.runtime.errors import BudgetError, InvalidInputError, require
from vzip.runtime.files import outputs
from vzip.runtime.guard import door, guarded

if TYPE_CHECKING:
    import torch

    from vzip.calibration.tuning.data import Data
    from vzip.calibration.tuning.trainer import Dtype

SUFFIX: Final = ".safetensors"


@door(InvalidInputError, "the projector of '{model}' can't be tuned", reads=False)
def tune(
    model: str,
    data: str,
    output: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    count: int | None = None,
    tokens: int | None = None,
    dominant: int | None = None,
    contextual: int | None = None,
    merge: Merge = "average",
    cls_token: bool = True,
    selection: str = selections.DEFAULT,
    selection_options: Mapping[str, float | str] | None = None,
    num_train_epochs: int = 1,
    per_device_train_batch_size: int = 16,
    gradient_accumulation_steps: int = 1,
    learning_rate: float = 2e-5,
    warmup_ratio: float = 0.03,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    dtype: Dtype | None = None,
    device: str = "auto",
    features: str | os.PathLike[str] | None = None,
    save_steps: int = 100,
    resume: bool = False,
    revision: str | None = None,
    say: Callable[[str], None] = console.say,
) -> Path | None:
    """Train a model's projector alone on compressed tokens; the tower and the LLM are frozen.

    Args:
        model: An alias, a hub id, or a local folder.
        data: A file with LLaVA's instruction JSON, or ``demo`` for the demo's scenes.
        output: The projector to write, ``….safetensors``; `vzip.export.export` takes it.
        images: The folder that the JSON's images are relative to; None for the demo.
        count: Take so many records, drawn by the seed; None for all, of the demo 4000 scenes.
        tokens: Budget of an image, split 27:5 as in the paper; or `dominant` and `contextual`. Give
            what the export will have.
        dominant: Tokens kept as they are.
        contextual: Tokens merged from the rest.
        merge: How contextual tokens are formed.
        cls_token: Whether the CLS token is kept, where the tower has one.
        selection: A name of `vzip.export.algorithm.selections`.
        selection_options: Name → value of the selection's options, as for `vzip.export.export`.
        num_train_epochs: How often every record is seen.
        per_device_train_batch_size: Records that a process runs at once.
        gradient_accumulation_steps: Batches that make a step.
        learning_rate: The highest.
        warmup_ratio: Share of the steps in which the rate rises to it.
        weight_decay: AdamW's, of matrices.
        max_grad_norm: Largest norm of a step's gradient.
        seed: Of the records and their order.
        dtype: Of the LLM; None for bf16 on a GPU that has it, else fp32.
        device: PyTorch's name of one; ``auto`` for a GPU where there is one.
        features: A folder that keeps the tower's features, for other runs too; None for the run's.
        save_steps: Steps between two states on disk.
        resume: Continue the run of this output.
        revision: Commit, branch or tag of a hub id.
        say: Told, in lines, what goes on.

    Returns:
        The projector's path; None in all but the first of several processes (torchrun).

    Raises:
        InvalidInputError: An option, the data or the output can't be used.
        BudgetError: The budget doesn't fit the tower, or none was given.
        CheckpointError: The model can't be found, or its LLM's words have no place for an image.
        BackendError: A step failed.
        MissingDependencyError: The extra ``export`` is not installed.
    """
    projector = outputs.check_file(output, SUFFIX)
    if tokens is None and dominant is None and contextual is None:
        raise BudgetError(
            "no budget was given",
            expected="the one that the export will have",
            cure="give --tokens, or --dominant and --contextual",
        )
    _check_data(data, images, count=count, save_steps=save_steps)
    if features is not None:
        outputs.check_folder(features)
    needed = ("torch", "transformers", "safetensors", "tokenizers", "jinja2")
    require(*needed, needed_for="'vzip tune'", extra="export")
    from vzip.calibration.tuning.features import FrozenTower, check_tunable
    from vzip.calibration.tuning.job import Job, run_of, tune_projector
    from vzip.calibration.tuning.session import Session, check_begun
    from vzip.calibration.tuning.trainer import TuningRecipe
    from vzip.calibration.tuning.workers import Workers
    from vzip.export.pipeline import WeightSource
    from vzip.runtime.llm.local.transformers import TransformersLLM

    workers = Workers.of_environment()
    if workers.first:
        check_begun(projector, resume=resume)
    place = _device(device, workers.local)
    recipe = TuningRecipe(
        num_train_epochs=num_train_epochs,
        per_device_train_batch_size=per_device_train_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=learning_rate,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        seed=seed,
        dtype=dtype or _dtype(place),
    )
    source = WeightSource(model, revision)
    config = source.config()
    check_tunable(config, model)
    budget = selections.budget_of(
        config,
        tokens=tokens,
        dominant=dominant,
        contextual=contextual,
        merge=merge,
        cls_token=cls_token,
        selection=selection,
        options=selection_options,
    )
    records: Data
    if data == DEMO:
        records = DemoData(count or DEMO_SCENES, seed, config.tower.image_size)
    else:
        records = InstructionData(Path(data), Path(images or ""))
    taken = None if data == DEMO else count
    choose(records, taken, seed)  # says now what it would say behind the weights
    weights, named = source.load()
    job = Job(
        model=named,
        weights=weights,
        budget=budget,
        data=records,
        count=taken,
        recipe=recipe,
        features=None if features is None else Path(features),
        save_steps=save_steps,
    )
    with workers.joined(place):
        tower = FrozenTower(weights, job.budget, place)
        run = run_of(job, tower, workers)
        with Session(projector, run, resume=resume, workers=workers) as session:
            llm = TransformersLLM.open(
                model,
                revision=revision,
                device=str(place),
                dtype={"fp32": "float32", "bf16": "bfloat16"}[recipe.dtype],
            )
            tune_projector(job, tower, llm, session=session, workers=workers, say=say)
    return projector if workers.first else None


def _check_data(
    data: str, images: str | os.PathLike[str] | None, *, count: int | None, save_steps: int
) -> None:
    """Refuse options that contradict each other, before anything is read."""
    if (data == DEMO) != (images is None):
        raise InvalidInputError(
            f"got --data {data} with --images {images}",
            expected=f"a folder for a JSON file and none for '{DEMO}'",
            cure="leave it out" if images is not None else "give --images FOLDER",
        )
    for option, value in (("--count", count), ("--save-steps", save_steps)):
        if value is not None and value < 1:
            raise InvalidInputError(f"got {option} {value}", expected="at least 1")


def _device(name: str, local: int) -> torch.device:
    """Return where everything runs; of several processes on one machine each has a GPU."""
    import torch

    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(automatic if name == "auto" else name)
    except RuntimeError as error:
        raise InvalidInputError(
            f"got --device {name}", expected="torch's name of one, such as cpu or cuda"
        ) from error
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local)
    with guarded(
        InvalidInputError, f"--device {name} can't be used here", cure="name one that is there"
    ):
        torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    return device


def _dtype(device: torch.device) -> Dtype:
    """Return what the LLM runs in where nothing was said."""
    import torch

    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast else "fp32"
