"""Ray Serve: replicas of the encoder and of the LLM, on as many machines as a Ray cluster has.

    serve run vzip.runtime.service.adapters.ray:app bundle=/path/of/bundle max_replicas=4

One deployment encodes (each replica with the core's own batcher), one answers, and one in front
speaks HTTP: ``/v1/encode``, ``/v1/chat/completions`` without streams, ``/v1/models``. A replica
that dies amid a request makes it a 503 with Retry-After; Ray starts another. Ray's dashboard and
proxy have their own doors: docs/serving.md.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

from vzip.runtime.errors import InvalidInputError, VzipError, require
from vzip.runtime.files import codec
from vzip.runtime.files.codec import Count, Index, Must, Record, Text
from vzip.runtime.guard import door
from vzip.runtime.service.adapters import chat_protocol
from vzip.runtime.service.adapters.bodies import media_of, parsed
from vzip.runtime.service.admission import TOO_LARGE, RefusedError
from vzip.runtime.service.answering import Answering, Talk
from vzip.runtime.service.encoding import EncodingService
from vzip.runtime.service.figures import Figures
from vzip.runtime.service.settings import ServiceSettings

Share = Annotated[float, Must(lambda value: 0 <= value <= 1024, "a number of processors")]

_LOST: Final = 1  # seconds after which to try again where a replica was lost
_HEALTH_SECONDS: Final = 5.0


@dataclass(frozen=True, kw_only=True)
class RaySettings(Record):
    """What of the application can be set: ``serve run …:app bundle=… max_replicas=4``.

    Attributes:
        bundle: The bundle's folder, on every machine that runs a replica.
        llm: As for ``vzip serve --llm``; ``none`` for tokens alone.
        name: The model's name.
        min_replicas: Of the encoder.
        max_replicas: Of the encoder; Ray scales between them by the requests in hand.
        llm_replicas: Of the LLM.
        cpus: Of each replica.
        gpus: Of each replica of the encoder.
        requests: In hand of a replica, which Ray holds to; beyond it, it starts another.
        body: Most bytes of a request.
    """

    bundle: Text
    llm: Text = "none"
    name: Text = "vzip"
    min_replicas: Count = 1
    max_replicas: Count = 2
    llm_replicas: Count = 1
    cpus: Share = 1.0
    gpus: Share = 0.0
    requests: Count = 32
    body: Index = 2**26

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_replicas < self.min_replicas:
            raise self.misfit("max_replicas", f"{self.min_replicas}, min_replicas, or more")


class RayEncoder:
    """A replica that encodes pictures.

    Args:
        bundle: The bundle's folder.
        requests: Most requests in hand.
    """

    def __init__(self, bundle: str, requests: int) -> None:
        settings = ServiceSettings(queue=2 * requests, per_client=2 * requests)
        self._service = EncodingService(bundle, settings)
        self._service.warm_up()

    async def encode(self, files: list[bytes]) -> bytes:
        """Return the tokens of a prompt's pictures as a token file."""
        from vzip.runtime.tokens.file import ImageTokens, to_bytes

        with self._service.admission.enter("") as ticket:
            seen = await self._seen(ticket, files)
            images = [
                ImageTokens(str(number), each.digest, *each.encoded)
                for number, each in enumerate(seen)
            ]
            return to_bytes(self._service.origin(several=len(files) > 1), images)

    async def given(self, files: list[bytes]) -> list[Any]:
        """Return what `LLM.conversation` takes of a prompt's pictures."""
        with self._service.admission.enter("") as ticket:
            return [each.encoded for each in await self._seen(ticket, files)]

    async def _seen(self, ticket: Any, files: list[bytes]) -> list[Any]:
        several = len(files) > 1
        futures = [self._service.picture(ticket, each, several=several) for each in files]
        return list(await asyncio.gather(*map(asyncio.wrap_future, futures)))

    def process(self) -> int:
        """Return the replica's process, by which a test kills it."""
        import os

        return os.getpid()


class RayLlm:
    """A replica that answers.

    Args:
        bundle: The bundle's folder.
        llm: As for `open_llm`.
    """

    def __init__(self, bundle: str, llm: str | None) -> None:
        from vzip.runtime.llm.opening import RUNNERS, open_llm

        opened = open_llm(bundle, llm)
        local = not RUNNERS[opened.name].server
        self._answering = Answering(opened, local=local, answers=8, kept=8, figures=Figures())

    async def ask(
        self, embeds: list[Any], talk: Talk, question: str, max_new_tokens: int
    ) -> dict[str, Any]:
        """Return a whole answer in the chat protocol's form, but for the model's name."""
        from vzip.runtime.service.admission import Ticket

        future = self._answering.ask(
            Ticket("", 600.0),
            talk,
            question,
            max_new_tokens=max_new_tokens,
            embeds=lambda: embeds,
            frames=None,
            say=lambda _: None,
        )
        return chat_protocol.Reply("").whole(await asyncio.wrap_future(future), {})


class RayFront:
    """What speaks HTTP.

    Args:
        settings: The application's, as JSON values.
        encoder: The encoder's handle.
        llm: The LLM's; None without one.
    """

    def __init__(self, settings: Mapping[str, Any], encoder: Any, llm: Any = None) -> None:
        self._settings = codec.read(RaySettings, settings)
        self._encoder, self._llm = encoder, llm

    async def __call__(self, request: Any) -> Any:
        """Answer a request of Starlette's."""
        try:
            return await self._answer(request)
        except Exception as error:  # noqa: BLE001 - of Ray's errors each has a kind of its own
            return _refusal(error)

    async def _answer(self, request: Any) -> Any:
        from starlette.responses import JSONResponse, Response

        route = f"{request.method} {request.url.path}"
        if route == "GET /v1/models":
            model = {"id": self._settings.name, "object": "model", "owned_by": "vzip"}
            return JSONResponse({"object": "list", "data": [{**model, "created": 0}]})
        if route == "POST /v1/encode":
            data = await self._encoder.encode.remote(await self._files(request))
            return Response(data, media_type="application/octet-stream")
        if route == "POST /v1/chat/completions" and self._llm is not None:
            return JSONResponse(await self._chat(request))
        raise RefusedError(f"{route[:200]} is not served here", status=404, code="not_found")

    async def _body(self, request: Any) -> bytes:
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > self._settings.body:
                raise RefusedError(
                    f"the body has more than {self._settings.body} bytes",
                    status=413,
                    code=TOO_LARGE,
                    expected=f"at most {self._settings.body}",
                )
        return bytes(data)

    async def _files(self, request: Any) -> list[bytes]:
        data = await self._body(request)
        if not request.headers.get("content-type", "").startswith("application/json"):
            return [data]
        urls = parsed(data).get("images")
        if not isinstance(urls, list) or not urls:
            raise InvalidInputError("'images' is no list of pictures", expected="data URLs")
        return self._media(urls)

    def _media(self, urls: list[Any]) -> list[bytes]:
        return [
            media_of(url, f"picture {number}", hosts=(), most=self._settings.body)
            for number, url in enumerate(urls)
        ]

    async def _chat(self, request: Any) -> Any:
        asked = chat_protocol.read_chat(parsed(await self._body(request)))
        if asked.model != self._settings.name:
            raise RefusedError(
                f"the model {asked.model[:100]!r} is not served here",
                status=404,
                code="model_not_found",
                expected=self._settings.name,
            )
        if asked.stream or asked.clip is not None:
            raise InvalidInputError(
                "streams and clips are not served here",
                expected="pictures, and whole answers",
                cure="ask 'vzip serve' on one machine",
            )
        files = self._media(list(asked.pictures))
        talk = Talk(_digests(files), asked.turns)
        embeds = await self._encoder.given.remote(files)
        answer = await self._llm.ask.remote(embeds, talk, asked.question, asked.max_new_tokens)
        return {**answer, "model": self._settings.name}


def _digests(files: list[bytes]) -> tuple[str, ...]:
    from hashlib import sha256

    return tuple(sha256(each).hexdigest() for each in files)


def _refusal(error: Exception) -> Any:
    """Return the response of what went wrong; a replica that was lost is asked for again."""
    from starlette.responses import JSONResponse

    cause: Any = getattr(error, "cause", None)  # what a replica raised, within Ray's own error
    known = next((each for each in (error, cause) if isinstance(each, VzipError)), None)
    headers = {}
    if isinstance(known, RefusedError):
        status = known.status
        if known.retry_after is not None:
            headers["Retry-After"] = str(known.retry_after)
    elif isinstance(known, InvalidInputError):
        status = 400
    else:
        status, headers = 503, {"Retry-After": str(_LOST)}
        known = RefusedError(
            "a replica was lost, or is not there yet",
            status=status,
            code="replica_lost",
            retry_after=_LOST,
            cure="ask again after the seconds that Retry-After says",
        )
    return JSONResponse(chat_protocol.error_object(known, status), status, headers)


@door(InvalidInputError, "the application's arguments can't be understood", cure="check them")
def app(args: Mapping[str, Any]) -> Any:
    """Return the application, for ``serve run`` and for a config file's ``import_path``.

    Args:
        args: Fields of `RaySettings`; numbers may be texts, as a command line gives them.

    Raises:
        MissingDependencyError: Ray is not installed.
        InvalidInputError: An argument that there is not, or that makes no sense.
    """
    require("ray", needed_for="Ray Serve", extra="ray")
    from ray import serve

    settings = ray_settings(args)
    scaling = {
        "min_replicas": settings.min_replicas,
        "max_replicas": settings.max_replicas,
        "target_ongoing_requests": max(1, settings.requests // 2),
    }
    encoder = serve.deployment(RayEncoder).options(
        name="Encoder",
        autoscaling_config=scaling,
        max_ongoing_requests=settings.requests,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        health_check_period_s=_HEALTH_SECONDS,
    )
    bound = [encoder.bind(settings.bundle, settings.requests)]
    if settings.llm != "none":
        llm = serve.deployment(RayLlm).options(
            name="Llm",
            num_replicas=settings.llm_replicas,
            max_ongoing_requests=settings.requests,
            ray_actor_options={"num_cpus": settings.cpus},
        )
        bound.append(llm.bind(settings.bundle, None if settings.llm == "own" else settings.llm))
    front = serve.deployment(RayFront).options(
        name="Front", max_ongoing_requests=256, ray_actor_options={"num_cpus": 0.1}
    )
    return front.bind(codec.write(settings), *bound)


def ray_settings(args: Mapping[str, Any]) -> RaySettings:
    """Return the settings that arguments make; see `app`.

    Raises:
        InvalidInputError: There is no such argument, or it makes no sense.
    """
    known = [each.name for each in dataclasses.fields(RaySettings)]
    unknown = sorted(set(args) - set(known))
    if unknown or "bundle" not in args:
        raise InvalidInputError(
            f"got the arguments {', '.join(map(str, args))}",
            expected=f"bundle, and some of {', '.join(known[1:])}",
        )
    return RaySettings(**{name: _number(value) for name, value in args.items()})


def _number(value: Any) -> Any:
    """Return the number that a text is; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value[:1].isdigit() else value
    except ValueError:
        return value
