"""The service over HTTP: routes, and what is the same for all of them.

Each request is let in, bounded and answered by `_Endpoint`, whatever its protocol. A client that
leaves ends its request's work; so does the deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import SplitResult, urlsplit

import numpy as np

from vzip.runtime.bundle.manifest import EMBEDS, KEPT, POSITIONS
from vzip.runtime.errors import BackendError, InvalidInputError, VzipError, require
from vzip.runtime.service.adapters import chat_protocol, inference_protocol
from vzip.runtime.service.adapters.bodies import Within, media_of, parsed, read_body
from vzip.runtime.service.admission import GONE, RefusedError, Ticket
from vzip.runtime.service.answering import Answered, Answering, Talk
from vzip.runtime.service.encoding import EncodingService, SeenClip, SeenPicture
from vzip.runtime.service.figures import PrometheusFigures
from vzip.runtime.tokens.file import ImageTokens, to_bytes

if TYPE_CHECKING:
    Handler = Callable[["Exchange"], Awaitable[Any]]

T = TypeVar("T")

PAGE: Final = "page.html"
PICTURES_SUFFIX: Final = "-pictures"
"""Of the model of the Open Inference Protocol that takes pictures as files."""

_SMALL: Final = 2**16  # bytes of a body that is read in the event loop itself
_LOCAL: Final = frozenset(("localhost", "127.0.0.1", "::1"))
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WebSettings:
    """How a service stands on the web.

    Attributes:
        name: The model's name.
        api_key: What clients must send; None for nothing.
        local_only: Whether requests must name this machine, which other sites' pages can't.
        hosts: Hosts whose pictures are fetched.
        upload_seconds: Longest time that a body may take to come.
    """

    name: str
    api_key: str | None = None
    local_only: bool = True
    hosts: frozenset[str] = frozenset()
    upload_seconds: float = 30.0


class Exchange:
    """One request on its way through.

    Attributes:
        request: Starlette's.
        ticket: The core's.
    """

    def __init__(self, web: Web, request: Any, ticket: Ticket) -> None:
        self.request, self.ticket = request, ticket
        self._web = web
        self._watch: asyncio.Task[None] | None = None

    async def body(self) -> bytes:
        """Return the body; from then on a client that leaves ends the request's work.

        Raises:
            VzipError: As for `read_body`.
        """
        service, web = self._web.service, self._web.settings
        data = await read_body(
            self.request,
            self.ticket,
            service.admission,
            most=service.settings.body,
            seconds=web.upload_seconds,
        )
        task = asyncio.current_task()
        assert task is not None
        self._watch = asyncio.create_task(self._watched(task))
        return data

    async def json(self) -> dict[str, Any]:
        """Return the body's JSON object.

        Raises:
            VzipError: As for `body`, or it is none.
        """
        data = await self.body()
        if len(data) <= _SMALL:
            return parsed(data)
        return await self.wait(self._web.service.later(self.ticket, lambda: parsed(data)))

    async def wait(self, future: Future[T]) -> T:
        """Return what the core gives."""
        return await asyncio.wrap_future(future)

    async def _watched(self, task: asyncio.Task[Any]) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.ticket.cancel()
        task.cancel()

    def close(self) -> None:
        """Stop watching the client."""
        if self._watch is not None:
            self._watch.cancel()


class _Endpoint:
    """A route as an ASGI application.

    Args:
        web: The service on the web.
        route: The route's name in counters.
        handler: Makes the response.
        form: How errors look.
        guarded: Whether a key is asked for.
        admitted: Whether it counts among the requests in hand: what only tells doesn't.
    """

    def __init__(
        self,
        web: Web,
        route: str,
        handler: Handler,
        *,
        form: Callable[[Exception, int], dict[str, Any]],
        guarded: bool = True,
        admitted: bool = True,
    ) -> None:
        self._web, self._route, self._handler, self._form = web, route, handler, form
        self._guarded, self._admitted = guarded, admitted

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import Request

        request = Request(scope, receive)
        begun, status, started = time.monotonic(), 499, False

        async def sending(message: Any) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
            await send(message)

        try:
            try:
                self._web.check(request, guarded=self._guarded)
                with self._entered(request) as ticket:
                    await self._exchange(Exchange(self._web, request, ticket), scope, sending)
            except VzipError as error:
                if getattr(error, "code", None) != GONE and not started:
                    await self._refuse(error)(scope, receive, sending)
            except Exception as error:  # noqa: BLE001 - a bug of ours; the next request is served
                _log.exception("%s failed", self._route)
                if not started:
                    await self._answer_of(error, 500, None)(scope, receive, sending)
        finally:
            self._web.figures.served(self._route, status, time.monotonic() - begun)

    @contextlib.contextmanager
    def _entered(self, request: Any) -> Any:
        admission = self._web.service.admission
        if not self._admitted:
            yield Ticket("", self._web.service.settings.seconds)
            return
        client = request.client
        with admission.enter(client.host if client else "") as ticket:
            yield ticket

    async def _exchange(self, exchange: Exchange, scope: Any, send: Any) -> None:
        """Make the response and send it, within the deadline and while the client is there."""
        ticket = exchange.ticket
        try:
            async with Within(ticket.left):
                response = await self._handler(exchange)
                await response(scope, exchange.request.receive, send)
        except asyncio.TimeoutError:
            raise ticket.expired() from None
        except asyncio.CancelledError:
            if not ticket.gone:
                raise
            ticket.check()
        except _client_left() as error:
            ticket.cancel()
            raise RefusedError("the client went away", status=499, code=GONE) from error
        finally:
            exchange.close()
            ticket.cancel()  # what still runs for it, runs for nobody

    def _refuse(self, error: VzipError) -> Any:
        """Return the response of an error."""
        if isinstance(error, RefusedError):
            return self._answer_of(error, error.status, error.retry_after)
        if isinstance(error, InvalidInputError):
            return self._answer_of(error, 400, None)
        # It may speak of the server's files and addresses: they are for its own log.
        _log.error("%s: %s", self._route, error)
        hidden = BackendError(
            "the encoder or the LLM failed", cause="the server's log says how", cure="ask again"
        )
        return self._answer_of(hidden, 500, None)

    def _answer_of(self, error: Exception, status: int, retry_after: int | None) -> Any:
        from starlette.responses import JSONResponse

        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if status in (408, 413):
            headers["Connection"] = "close"  # the rest of the body is not read
        if not isinstance(error, VzipError):
            error = BackendError("the server failed", cause="its log says how")
        return JSONResponse(self._form(error, status), status, headers)


def _client_left() -> tuple[type[Exception], ...]:
    from starlette.requests import ClientDisconnect

    return (ClientDisconnect,)


def inference_error(error: Exception, _: int) -> dict[str, Any]:
    """Return an error in the form of the Open Inference Protocol."""
    return {"error": str(error)}


class Web:
    """A service's routes.

    Args:
        service: The core.
        settings: How it stands on the web.
        answering: What answers questions; None where only tokens are served.

    Attributes:
        service: As given.
        settings: As given.
        answering: As given.
        figures: The core's.
        app: FastAPI's application.

    Raises:
        MissingDependencyError: FastAPI is not installed.
    """

    def __init__(
        self,
        service: EncodingService,
        settings: WebSettings,
        answering: Answering | None = None,
    ) -> None:
        require("fastapi", needed_for="the service", extra="serve")
        self.service, self.settings, self.answering = service, settings, answering
        self.figures = service.figures
        self._page = (Path(__file__).parent / PAGE).read_bytes()
        self.app = self._application()

    def check(self, request: Any, *, guarded: bool) -> None:
        """Refuse a request that another site's page sent, or that lacks the key.

        Raises:
            RefusedError: It is one.
        """
        host = request.headers.get("host", "")
        name = _parts(f"//{host}").hostname
        if self.settings.local_only and name not in _LOCAL:
            raise RefusedError(
                f"the request is for the host {host[:100]!r}",
                status=403,
                code="foreign_host",
                expected="localhost or 127.0.0.1",
                cause="a page of another site may have sent it",
                cure="start the server with --host and --api-key to serve other machines",
            )
        origin = request.headers.get("origin")
        if origin is not None and _parts(origin).netloc != host:
            raise RefusedError(
                f"the request comes from a page of {origin[:100]!r}",
                status=403,
                code="foreign_origin",
                expected="a page of this server, or no page",
            )
        if not guarded or self.settings.api_key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        right = self.settings.api_key.encode()
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), right):
            raise RefusedError(
                "the request has no key, or another one",
                status=401,
                code="invalid_api_key",
                expected="the header Authorization: Bearer KEY",
                cure="send the key that the server was started with",
            )

    def _application(self) -> Any:
        import fastapi
        from starlette.exceptions import HTTPException
        from starlette.responses import JSONResponse
        from starlette.routing import Route

        # No pages of documentation: they'd load scripts of other sites.
        app = fastapi.FastAPI(title="vzip", docs_url=None, redoc_url=None, openapi_url=None)
        openai, inference = chat_protocol.error_object, inference_error

        def add(
            path: str,
            handler: Handler,
            method: str = "GET",
            *,
            admitted: bool = False,
            guarded: bool = True,
        ) -> None:
            form = inference if path.startswith("/v2") else openai
            route = f"{method} {path}"
            endpoint = _Endpoint(
                self, route, handler, form=form, admitted=admitted, guarded=guarded
            )
            app.router.routes.append(Route(path, endpoint, methods=[method]))

        add("/", self._show_page, guarded=False)
        add("/health", self._health, guarded=False)
        add("/ready", self._ready, guarded=False)
        add("/metrics", self._metrics)
        add("/v1/models", self._models)
        add("/v1/chat/completions", self._chat, "POST", admitted=True)
        add("/v1/encode", self._encode, "POST", admitted=True)
        add("/v1/show", self._show, "POST", admitted=True)
        add("/v2", self._server_metadata, guarded=False)
        add("/v2/health/live", self._health, guarded=False)
        add("/v2/health/ready", self._ready, guarded=False)
        for version in ("", "/versions/{version}"):
            model = "/v2/models/{model}" + version
            add(model, self._model_metadata)
            add(f"{model}/ready", self._model_ready)
            add(f"{model}/infer", self._infer, "POST", admitted=True)

        async def unknown(request: Any, error: Exception) -> Any:
            status = getattr(error, "status_code", 404)
            refused = RefusedError(
                f"{request.method} {request.url.path[:200]} is not served here",
                status=status,
                code="not_found" if status == 404 else "not_allowed",
                expected="what docs/serving.md lists",
            )
            form = inference if request.url.path.startswith("/v2") else openai
            return JSONResponse(form(refused, status), status, getattr(error, "headers", None))

        app.add_exception_handler(HTTPException, unknown)
        return app

    async def _show_page(self, _: Exchange) -> Any:
        from starlette.responses import Response

        policy = (
            "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
            "img-src blob: data:; media-src blob:; connect-src 'self'; form-action 'none'; "
            "frame-ancestors 'none'; base-uri 'none'"
        )
        headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }
        return Response(self._page, media_type="text/html", headers=headers)

    async def _health(self, _: Exchange) -> Any:
        return _json({"status": "ok", "live": True})

    async def _ready(self, _: Exchange) -> Any:
        if self.service.admission.draining:
            raise RefusedError(
                "the server is shutting down", status=503, code="draining", retry_after=5
            )
        return _json({"status": "ready", "ready": True})

    async def _metrics(self, _: Exchange) -> Any:
        from starlette.responses import Response

        if not isinstance(self.figures, PrometheusFigures):
            raise RefusedError("no figures are kept here", status=404, code="not_found")
        text, kind = self.figures.text()
        return Response(text, headers={"content-type": kind})

    async def _models(self, _: Exchange) -> Any:
        model = {
            "id": self.settings.name,
            "object": "model",
            "created": 0,
            "owned_by": "vzip",
            "vzip": self._card(),
        }
        return _json({"object": "list", "data": [model]})

    def _card(self) -> dict[str, Any]:
        """Return what the page needs to know."""
        manifest = self.service.manifest
        tower, prep = manifest.tower, manifest.preprocessing
        return {
            "media": list(manifest.media),
            "answers": self.answering is not None,
            "tokens": manifest.selection.tokens,
            "dominant": manifest.selection.dominant,
            "patches": tower.grid[0] * tower.grid[1],
            "grid": list(tower.grid),
            "cls_token": tower.cls_token,
            "cell": tower.patch_size * tower.pool / tower.image_size,
            "mode": prep.mode,
            "image_size": prep.image_size,
            "shortest_edge": prep.shortest_edge,
            "tiles": manifest.tiling is not None,
            "model": manifest.model.id if manifest.model.id.count("/") == 1 else "",
            "batch": self.service.most,
            **self.service.describe(),
        }

    async def _chat(self, exchange: Exchange) -> Any:
        asked = chat_protocol.read_chat(await exchange.json())
        self._check_model(asked.model, self.settings.name)
        if self.answering is None:
            raise RefusedError(
                "no LLM is served here",
                status=404,
                code="no_llm",
                expected="requests of /v1/encode, /v1/show and /v2",
                cure="start the server with --llm",
            )
        media = [asked.clip] if asked.clip is not None else list(asked.pictures)
        files = await self._media(exchange, media)
        shown: list[SeenPicture | SeenClip] = []
        talk = Talk(await self._digests(exchange, files), asked.turns)
        begun = time.monotonic()
        if not (asked.turns and self.answering.has(talk)):
            shown = await self._shown(exchange, files, clip=asked.clip is not None)
        encoding = time.monotonic() - begun
        return await self._answered(exchange, asked, talk, shown, encoding)

    async def _digests(self, exchange: Exchange, files: list[bytes]) -> tuple[str, ...]:
        from hashlib import sha256

        def work() -> tuple[str, ...]:
            return tuple(sha256(each).hexdigest() for each in files)

        if sum(map(len, files)) <= _SMALL:
            return work()
        return await exchange.wait(self.service.later(exchange.ticket, work))

    async def _shown(
        self, exchange: Exchange, files: list[bytes], *, clip: bool
    ) -> list[SeenPicture | SeenClip]:
        """Encode what is shown; pictures beside each other."""
        service, ticket = self.service, exchange.ticket
        if clip:
            seen: SeenPicture | SeenClip = await exchange.wait(service.clip(ticket, files[0]))
            return [seen]
        several = len(files) > 1
        futures = [service.picture(ticket, each, several=several) for each in files]
        return list(await asyncio.gather(*map(exchange.wait, futures)))

    async def _answered(
        self,
        exchange: Exchange,
        asked: chat_protocol.ChatRequest,
        talk: Talk,
        shown: list[SeenPicture | SeenClip],
        encoding: float,
    ) -> Any:
        from starlette.responses import StreamingResponse

        assert self.answering is not None
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | Future[Answered]] = asyncio.Queue()

        def tell(item: str | Future[Answered]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(pieces.put_nowait, item)

        clip = next((each for each in shown if isinstance(each, SeenClip)), None)
        given = [each.encoded for each in shown if isinstance(each, SeenPicture)]
        future = self.answering.ask(
            exchange.ticket,
            talk,
            asked.question,
            max_new_tokens=asked.max_new_tokens,
            embeds=(lambda: clip.encoded if clip else given) if shown else None,
            frames=None if clip is None else clip.frames,
            say=tell if asked.stream else lambda _: None,
        )
        reply = chat_protocol.Reply(self.settings.name)
        if not asked.stream:
            answered = await exchange.wait(future)
            return _json(reply.whole(answered, self._took(answered, shown, encoding)))
        future.add_done_callback(tell)
        first = await pieces.get()
        if isinstance(first, Future):
            first.result()  # an error before anything was said has a status of its own

        async def events() -> Any:
            item, begins = first, True
            try:
                while not isinstance(item, Future):
                    yield reply.piece(item, first=begins)
                    begins = False
                    item = await pieces.get()
                answered = item.result()
                if begins:
                    yield reply.piece("", first=True)
                yield reply.end(answered, self._took(answered, shown, encoding), usage=asked.usage)
            except VzipError as error:
                _log.error("an answer broke off: %s", error)
                safe = (
                    error
                    if isinstance(error, (RefusedError, InvalidInputError))
                    else (BackendError("the LLM failed", cause="the server's log says how"))
                )
                status = getattr(error, "status", 500)
                yield f"data: {json.dumps(chat_protocol.error_object(safe, status))}\n\n"

        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(events(), media_type="text/event-stream", headers=headers)

    def _took(
        self, answered: Answered, shown: list[SeenPicture | SeenClip], encoding: float
    ) -> dict[str, Any]:
        """Return what an answer took, beyond what the protocol has room for."""
        manifest = self.service.manifest
        patches = manifest.tower.grid[0] * manifest.tower.grid[1]
        tokens = whole = 0
        for each in shown:
            if isinstance(each, SeenPicture):
                tokens += len(each.encoded.embeds)
                whole += len(each.encoded.kept) * patches
            else:
                tokens += len(each.encoded.embeds)
                whole += each.frames * patches
        kv = None if self.answering is None else self.answering.kv_token_bytes
        return {
            "encode_ms": round(encoding * 1e3, 2),
            "prefill_ms": round(answered.first * 1e3, 2),
            "decode_ms": round(answered.rest * 1e3, 2),
            "vision_tokens": tokens,
            "patches": whole,
            "kv_bytes": None if kv is None else kv * tokens,
            "kv_bytes_saved": None if kv is None else kv * max(0, whole - tokens),
            "remembered": bool(shown)
            and all(isinstance(each, SeenPicture) and each.remembered for each in shown),
            "continued": answered.continued,
        }

    async def _media(self, exchange: Exchange, urls: list[str]) -> list[bytes]:
        """Return the files that URLs of a request stand for."""
        settings = self.service.settings
        if len(urls) > settings.pictures:
            raise InvalidInputError(
                f"got {len(urls)} pictures", expected=f"at most {settings.pictures} a request"
            )

        def work() -> list[bytes]:
            return [
                media_of(url, f"picture {number}", hosts=self.settings.hosts, most=settings.body)
                for number, url in enumerate(urls)
            ]

        if sum(map(len, urls)) <= _SMALL and all(each[:5].lower() == "data:" for each in urls):
            return work()
        return await exchange.wait(self.service.later(exchange.ticket, work))

    async def _encode(self, exchange: Exchange) -> Any:
        from starlette.responses import Response

        files, several = await self._files(exchange)
        seen = await self._shown(exchange, files, clip=False)
        images = [
            dataclasses.replace(ImageTokens.of(each.digest, each.encoded), name=str(number))
            for number, each in enumerate(seen)
            if isinstance(each, SeenPicture)
        ]
        data = to_bytes(self.service.origin(several=several), images)
        return Response(data, media_type="application/octet-stream")

    async def _files(self, exchange: Exchange) -> tuple[list[bytes], bool]:
        """Return the pictures of a body, which is one itself or lists several as data URLs."""
        kind = exchange.request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            return [await exchange.body()], False
        body = await exchange.json()
        urls = body.get("images")
        if not isinstance(urls, list) or not urls or not all(isinstance(e, str) for e in urls):
            raise InvalidInputError(
                "'images' is no list of pictures", expected="data URLs, one or more"
            )
        return await self._media(exchange, urls), len(urls) > 1

    async def _show(self, exchange: Exchange) -> Any:
        files, _ = await self._files(exchange)
        if len(files) != 1:
            raise InvalidInputError(f"got {len(files)} pictures", expected="one, to be drawn")
        (seen,) = await self._shown(exchange, files, clip=False)
        assert isinstance(seen, SeenPicture)
        kept = seen.encoded.kept
        first = int(self.service.manifest.tower.cls_token)
        return _json(
            {
                "kept": [int(each) - first for each in kept[0] if each >= first],
                "tiles": len(kept),
                "tokens": len(seen.encoded.embeds),
                "patches": len(kept) * int(np.prod(self.service.manifest.tower.grid)),
                "encode_ms": round(seen.seconds * 1e3, 2),
                "remembered": seen.remembered,
            }
        )

    async def _server_metadata(self, _: Exchange) -> Any:
        from vzip.runtime import __version__

        return _json({"name": "vzip", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def _model_metadata(self, exchange: Exchange) -> Any:
        name, pictures = self._model(exchange)
        manifest = self.service.manifest
        return _json(inference_protocol.model_metadata(name, manifest, pictures=pictures))

    async def _model_ready(self, exchange: Exchange) -> Any:
        self._model(exchange)
        return await self._ready(exchange)

    def _model(self, exchange: Exchange) -> tuple[str, bool]:
        """Return the model that a route names, and whether it takes pictures as files."""
        parameters: Mapping[str, str] = exchange.request.path_params
        name, own = parameters["model"], self.settings.name
        self._check_model(name, own, own + PICTURES_SUFFIX)
        version = parameters.get("version", inference_protocol.VERSION)
        if version != inference_protocol.VERSION:
            raise RefusedError(
                f"the model has no version {version[:40]!r}",
                status=404,
                code="model_not_found",
                expected=inference_protocol.VERSION,
            )
        return name, name != own

    def _check_model(self, name: str, *known: str) -> None:
        if name not in known:
            error = RefusedError(
                f"the model {name[:100]!r} is not served here",
                status=404,
                code="model_not_found",
                expected=" or ".join(known),
            )
            error.parameter = "model"
            raise error

    async def _infer(self, exchange: Exchange) -> Any:
        from starlette.responses import Response

        name, pictures = self._model(exchange)
        body = await exchange.body()
        length = exchange.request.headers.get(inference_protocol.HEADER_LENGTH)
        outputs = [
            each.name
            for each in self.service.manifest.outputs
            if inference_protocol.given(each, pictures=pictures)
        ]
        wanted = inference_protocol.PICTURE if pictures else self.service.manifest.input.name

        def read() -> inference_protocol.Inference:
            return inference_protocol.read_request(body, length, outputs)

        # Numbers in JSON take their time, and nobody else is served meanwhile.
        listed = inference_protocol.header_size(length, len(body))
        inference = (
            read()
            if listed <= _SMALL
            else await exchange.wait(self.service.later(exchange.ticket, read))
        )
        given = inference.inputs.get(wanted)
        if len(inference.inputs) != 1 or given is None:
            raise InvalidInputError(
                f"got the inputs {', '.join(sorted(inference.inputs))[:200]}",
                expected=f"{wanted}, and nothing else",
            )
        if pictures:
            arrays = await self._inferred(exchange, given)
        else:
            if not isinstance(given, np.ndarray):
                raise InvalidInputError(
                    f"the input {wanted!r} is of BYTES", expected=str(self.service.manifest.input)
                )
            tokens = await exchange.wait(self.service.array(exchange.ticket, given))
            arrays = {EMBEDS: tokens.embeds, KEPT: tokens.kept}
            if tokens.positions is not None:
                arrays[POSITIONS] = tokens.positions
        data, headers = inference_protocol.write_response(name, inference, arrays)
        return Response(data, headers=headers)

    async def _inferred(self, exchange: Exchange, given: Any) -> dict[str, Any]:
        """Return the outputs for pictures as files."""
        if not isinstance(given, list) or not 1 <= len(given) <= self.service.settings.pictures:
            raise InvalidInputError(
                f"the input '{inference_protocol.PICTURE}' holds no pictures",
                expected=f"1 to {self.service.settings.pictures} elements of BYTES, each a file",
            )
        if len(given) > 1 and self.service.manifest.tiling is not None:
            raise InvalidInputError(
                f"got {len(given)} pictures",
                expected="one, since the number of its tokens depends on its size",
            )
        seen = [
            each
            for each in await self._shown_alone(exchange, given)
            if isinstance(each, SeenPicture)
        ]
        return {
            EMBEDS: np.stack([each.encoded.embeds for each in seen]),
            KEPT: np.concatenate([each.encoded.kept for each in seen]),
        }

    async def _shown_alone(self, exchange: Exchange, files: list[bytes]) -> list[SeenPicture]:
        """Encode pictures, each as the only one of its prompt."""
        futures = [self.service.picture(exchange.ticket, each) for each in files]
        return list(await asyncio.gather(*map(exchange.wait, futures)))


def _parts(url: str) -> SplitResult:
    """Return the parts of a URL, which are empty where it is none."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _json(value: Any) -> Any:
    from starlette.responses import Response

    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Response(text, media_type="application/json")
