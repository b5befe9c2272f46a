"""One run of tuning from its data to the projector that an export takes."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

from vzip.calibration.tuning.data import Data, SkippedRecord, TuningRecord, choose, digest_of
from vzip.calibration.tuning.features import FeatureStore, FrozenTower
from vzip.calibration.tuning.session import FEATURES, Session
from vzip.calibration.tuning.text import Example, Wording
from vzip.calibration.tuning.trainer import Schedule, Tuner, TuningRecipe
from vzip.calibration.tuning.workers import Workers
from vzip.export.algorithm.budget import Budget
from vzip.export.checkpoint.weights import VisionWeights
from vzip.export.parity.reference import projector as untouched_projector
from vzip.runtime.bundle.origin import Model
from vzip.runtime.console import progress
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.files import codec
from vzip.runtime.llm.local.transformers import TransformersLLM
from vzip.runtime.machine.process import peak_bytes
from vzip.runtime.wording import counted

NAMED: Final = 10
"""Records left out that are named while a run begins; its report names all of them."""

_PACKAGES: Final = ("vzip", "torch", "transformers", "numpy")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What is tuned, how and on what.

    Attributes:
        model: The model, as the manifest of a bundle names it.
        weights: Its tower and projector.
        budget: Which tokens leave the tower; that of the export which the projector is for.
        data: Conversations about images.
        count: How many of its records are taken, by the recipe's seed; None for all.
        recipe: How.
        features: A folder that keeps the tower's features; None for the run's own.
        save_steps: Steps between two states on disk.
    """

    model: Model
    weights: VisionWeights
    budget: Budget
    data: Data
    count: int | None
    recipe: TuningRecipe
    features: Path | None
    save_steps: int


@dataclass(frozen=True)
class Prepared:
    """Records whose conversations fit and whose images were encoded, in the order of the data.

    Attributes:
        examples: One a record.
        digests: SHA-256 of each record's image.
        left_out: The other records.
        encoded: Images that the tower was run on now; the rest was on disk.
    """

    examples: list[Example]
    digests: list[str]
    left_out: list[SkippedRecord]
    encoded: int

    @cached_property
    def sha256(self) -> str:
        """Digest of all that is learned from: ids, answers and images."""
        digest = hashlib.sha256()
        for example, image in zip(self.examples, self.digests, strict=True):
            digest.update(image.encode())
            digest.update(len(example.ids).to_bytes(4, "little"))
            digest.update(example.ids.astype("<i4").tobytes() + example.learned.tobytes())
        return digest.hexdigest()


def prepare(
    data: Data,
    records: Sequence[TuningRecord],
    *,
    wording: Wording,
    tower: FrozenTower,
    store: FeatureStore,
    workers: Workers,
) -> Prepared:
    """Put conversations into ids and images into features.

    Args:
        data: For its images and for what it left out.
        records: Those to be used.
        wording: Makes the ids.
        tower: Encodes images that the store lacks; each process encodes its share.
        store: Takes the features.
        workers: The processes.

    Raises:
        InvalidInputError: Nothing is left.
    """
    left_out = list(data.left_out)
    fitting: list[tuple[TuningRecord, Example]] = []
    for record in progress(records, desc="conversations", unit="record"):
        try:
            fitting.append((record, wording.example(record.turns)))
        except InvalidInputError as error:  # noqa: PERF203  one record's fault stops no other
            left_out.append(SkippedRecord(record.name, str(error)))
    images = list(dict.fromkeys(record.image for record, _ in fitting))
    share = images[workers.rank :: workers.count]
    digests: dict[str, str] = {}  # image → SHA-256
    broken: dict[str, str] = {}  # image → why
    encoded = 0
    for found, failed, count in workers.gathered(_encode(data, share, tower, store)):
        digests |= found
        broken |= failed
        encoded += count
    left_out += [SkippedRecord(r.name, broken[r.image]) for r, _ in fitting if r.image in broken]
    usable = [(record, example) for record, example in fitting if record.image in digests]
    if not usable:
        raise InvalidInputError(
            f"none of {counted(len(records), 'record')} of {data.source} can be used",
            expected="at least one",
            cause=f"the first: {left_out[0].name} {left_out[0].reason}",
        )
    return Prepared(
        [example for _, example in usable],
        [digests[record.image] for record, _ in usable],
        left_out,
        encoded,
    )


def run_of(job: Job, tower: FrozenTower, workers: Workers) -> dict[str, Any]:
    """Return what a run that resumes must have in common with the one that it continues."""
    return {
        "model": dataclasses.asdict(job.model),
        "features": tower.fingerprint,
        "recipe": dataclasses.asdict(job.recipe),
        "data": job.data.source,
        "count": job.count,
        "processes": workers.count,
        "torch": metadata.version("torch"),
    }


def tune_projector(
    job: Job,
    tower: FrozenTower,
    llm: TransformersLLM,
    *,
    session: Session,
    workers: Workers,
    say: Say,
) -> None:
    """Tune a projector, from the session's last state if it has one.

    Args:
        job: What is to be done.
        tower: Of its weights and budget.
        llm: The LLM, in the recipe's dtype.
        session: Takes the states, and the projector in the end.
        workers: The processes that share the steps.
        say: Told what goes on; called by the first process alone.

    Raises:
        InvalidInputError: The data can't be used, or the folder is of another run.
        CheckpointError: The LLM's words have no place for an image.
        BackendError: A step failed.
    """
    started = time.monotonic()
    projector = untouched_projector(job.weights)
    wording = Wording(llm, job.budget.tokens)
    store = FeatureStore(job.features or session.folder / FEATURES, tower)
    records = choose(job.data, job.count, job.recipe.seed)
    ready = prepare(job.data, records, wording=wording, tower=tower, store=store, workers=workers)
    tower.leave_device()
    schedule = Schedule(job.recipe, len(ready.examples), workers.count)
    tuner = Tuner(llm, projector, wording, recipe=job.recipe, schedule=schedule, workers=workers)
    if workers.first:
        _tell(ready, schedule, say)

    state = session.load(ready.sha256, llm.device)
    losses: list[float] = []
    before = 0.0
    if state is not None:
        tuner.restore(state)
        losses, before = list(state["losses"]), float(state["seconds"])
        if workers.first:
            say(f"resumed after step {len(losses)} of {schedule.steps}")

    def seconds() -> float:
        return before + time.monotonic() - started

    def report() -> dict[str, Any]:
        return _report(job, llm, ready, losses, workers=workers, seconds=seconds())

    if workers.first:
        session.check(report())  # a report that can't be written is known before the training
    for number in progress(range(len(losses), schedule.steps), desc="steps", unit="step"):
        losses.append(tuner.step(number, ready.examples, lambda i: _features(store, ready, i)))
        done = number + 1
        # The last one too: whatever ends what follows, nothing is trained again.
        if workers.first and (done % job.save_steps == 0 or done == schedule.steps):
            session.save(
                {
                    **tuner.state(),
                    "losses": losses,
                    "seconds": seconds(),
                    "records": ready.sha256,
                }
            )
        if workers.first and done % job.save_steps == 0:
            recent = losses[-job.save_steps :]
            say(f"step {done} of {schedule.steps}: loss {sum(recent) / len(recent):.4f}")
    if workers.first:
        session.finish(projector.state_dict(), report())


def _encode(
    data: Data, images: Sequence[str], tower: FrozenTower, store: FeatureStore
) -> tuple[dict[str, str], dict[str, str], int]:
    """Make features of images: image → SHA-256, image → why not, and how often the tower ran."""
    digests: dict[str, str] = {}
    broken: dict[str, str] = {}
    encoded = 0
    for image in progress(images, desc="tower", unit="image"):
        try:
            content = data.read(image)
            digest = digest_of(content)
            features = None if store.get(digest) is not None else tower.encode(content)
        except InvalidInputError as error:
            broken[image] = str(error)
            continue
        if features is not None:
            store.put(digest, features)
            encoded += 1
        digests[image] = digest
    return digests, broken, encoded


def _features(store: FeatureStore, ready: Prepared, place: int) -> Any:
    features = store.get(ready.digests[place])
    if features is None:
        raise InvalidInputError(
            f"the features of image {ready.digests[place][:12]}… were removed or damaged while "
            "the run went on",
            expected="them to stay",
            cure="continue with --resume, which makes them again",
        )
    return features


def _tell(ready: Prepared, schedule: Schedule, say: Say) -> None:
    """Say what is learned from, and name what is not."""
    images = len(set(ready.digests))
    say(
        f"{counted(len(ready.examples), 'record')} about {counted(images, 'image')} "
        f"({ready.encoded} encoded now), {len(ready.left_out)} left out; "
        f"{counted(schedule.steps, 'step')}"
    )
    for record in ready.left_out[:NAMED]:
        say(f"left out: {record.name} {record.reason}")
    if len(ready.left_out) > NAMED:
        say(f"… and {len(ready.left_out) - NAMED} more, which the report names")


def _report(
    job: Job,
    llm: TransformersLLM,
    ready: Prepared,
    losses: Sequence[float],
    *,
    workers: Workers,
    seconds: float,
) -> dict[str, Any]:
    return {
        "model": dataclasses.asdict(job.model),
        "budget": codec.write(job.budget),
        "recipe": dataclasses.asdict(job.recipe),
        "data": {
            "source": job.data.source,
            "records": len(ready.examples),
            "images": len(set(ready.digests)),
            "sha256": ready.sha256,
            "left_out": [dataclasses.asdict(record) for record in ready.left_out],
        },
        "processes": workers.count,
        "device": str(llm.device),
        "steps": len(losses),
        "losses": [round(loss, 6) for loss in losses],
        "seconds": round(seconds, 1),
        "peak_mib": _peak_mib(llm.device),
        "versions": {
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in _PACKAGES},
        },
    }


def _peak_mib(device: torch.device) -> dict[str, int]:
    """Return the most memory that this process has had, since it began."""
    peak = {"host": peak_bytes() // 2**20}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device) // 2**20
    return peak
