"""The command `vzip serve`: a bundle, and an LLM where one is wanted, for many who ask."""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from vzip.runtime.cli.options import Parser, add_bundle, add_encoder
from vzip.runtime.console import say
from vzip.runtime.errors import InvalidInputError, require
from vzip.runtime.llm.opening import RUNNERS, own, parse
from vzip.runtime.machine import process

if TYPE_CHECKING:
    from vzip.runtime.bundle.reader import Bundle
    from vzip.runtime.service.answering import Answering
    from vzip.runtime.service.figures import PrometheusFigures
    from vzip.runtime.service.settings import ServiceSettings

KEY_VARIABLE: Final = "VZIP_API_KEY"
NO_LLM: Final = "none"
_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
_SHORTEST_KEY: Final = 16


def main(argv: Sequence[str], *, prog: str) -> int:
    """Run ``vzip serve``: serve until SIGTERM or SIGINT, and then to the end of what was begun."""
    arguments = _parser(prog).read(argv)
    key = _key(arguments)
    _check_address(arguments, key)
    require(
        "fastapi", "uvicorn", "httptools", "prometheus_client",
        needed_for="the service", extra="serve",
    )  # fmt: skip
    settings = _settings(arguments)
    choice = None if arguments.llm in (None, NO_LLM) else parse(arguments.llm)

    from vzip.runtime.bundle.reader import read_bundle
    from vzip.runtime.service.adapters import server
    from vzip.runtime.service.adapters.web import Web, WebSettings
    from vzip.runtime.service.encoding import EncodingService
    from vzip.runtime.service.figures import PrometheusFigures

    bundle = read_bundle(arguments.bundle, verify=False)  # backends verify what they run
    name = arguments.name or arguments.bundle.resolve().name
    figures = PrometheusFigures()
    with EncodingService(bundle, settings, figures) as service:
        service.warm_up()
        answering = None
        if arguments.llm != NO_LLM:
            answering = _answering(choice or own(bundle), bundle, settings, figures)
        admission = service.admission
        figures.gauge("requests_in_hand", "Requests in hand", lambda: admission.inside)
        figures.gauge("body_bytes", "Bytes of their bodies", lambda: admission.held_bytes)
        figures.gauge("cache_bytes", "Tokens in memory", lambda: service.remembered.bytes)
        if answering is not None:
            kept = answering
            figures.gauge("conversations", "KV caches kept", lambda: kept.kept)
        local = arguments.host in _LOOPBACK and arguments.proxy is None
        web = Web(
            service,
            WebSettings(
                name=name,
                api_key=key,
                local_only=local,
                hosts=frozenset(each.lower() for each in arguments.allow_host),
                upload_seconds=arguments.upload_timeout,
            ),
            answering,
        )

        def started(host: str, port: int) -> None:
            at = f"[{host}]" if ":" in host else host
            say(f"serving {name} at http://{at}:{port}")

        uvicorn_server = server.make_server(
            web,
            host=arguments.host,
            port=arguments.port,
            proxy=arguments.proxy,
            drain_seconds=arguments.drain,
            access_log=arguments.verbose > 0,
            started=started,
        )
        server.run(uvicorn_server)
        left = service.admission.inside
        if answering is not None:
            answering.close()
    say("all requests were answered" if not left else f"{left} requests were cut short")
    return 0


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Serve a bundle over HTTP: its tokens (Open Inference Protocol, /v1/encode), answers about "
        "pictures (OpenAI's chat protocol), and a page to try it, at /.",
        epilog=f"The API key may stand in the environment variable {KEY_VARIABLE} instead, where "
        "no list of processes shows it. TLS is the business of a proxy in front: docs/serving.md.",
    )
    add_bundle(parser)
    parser.add_argument(
        "--llm",
        metavar="LLM",
        help=f"the LLM that answers, as for 'vzip ask'; {NO_LLM} to serve tokens alone; or one of "
        + ", ".join(f"{name}:{runner.where}" for name, runner in RUNNERS.items())
        + " (default: the bundle's own, or that of the checkpoint it was exported from)",
    )
    add_encoder(parser)
    add = parser.add_argument
    add("--name", metavar="NAME", help="the model's name (default: the bundle folder's)")
    add("--host", default="127.0.0.1", metavar="ADDRESS",
        help="the address to listen at (default: %(default)s)")  # fmt: skip
    add("--port", type=int, default=8080, metavar="N",
        help="the port; 0 for any that is free (default: %(default)s)")  # fmt: skip
    add("--api-key", metavar="KEY", help="what clients must send (Authorization: Bearer KEY)")
    add("--insecure", action="store_true",
        help="serve other machines without a key: whoever reaches the port may ask")  # fmt: skip
    add("--proxy", metavar="ADDRESS",
        help="a proxy in front, whose X-Forwarded-For says who the client is")  # fmt: skip
    add("--allow-host", action="append", default=[], metavar="HOST",
        help="fetch pictures from URLs of this host (default: from none)")  # fmt: skip
    _add_limits(parser)
    return parser


def _add_limits(parser: Parser) -> None:
    from vzip.runtime.service.settings import ServiceSettings

    default = ServiceSettings()
    add = parser.add_argument
    add("--batch", type=int, metavar="N",
        help="most pictures of a call of the graph (default: as many as it takes)")  # fmt: skip
    add("--delay-ms", type=float, default=default.delay * 1e3, metavar="MS",
        help="how long a picture may wait for others to join (default: %(default)g)")  # fmt: skip
    add("--workers", type=int, metavar="N",
        help="threads that prepare pictures (default: enough for two calls)")  # fmt: skip
    add("--queue", type=int, default=default.queue, metavar="N",
        help="most requests in hand; others get a 429 (default: %(default)s)")  # fmt: skip
    add("--per-client", type=int, default=default.per_client, metavar="N",
        help="most requests in hand of one client (default: %(default)s)")  # fmt: skip
    add("--timeout", type=float, default=default.seconds, metavar="S",
        help="longest time of a request (default: %(default)g)")  # fmt: skip
    add("--upload-timeout", type=float, default=30.0, metavar="S",
        help="longest time of a request's body (default: %(default)g)")  # fmt: skip
    add("--drain", type=float, default=30.0, metavar="S",
        help="longest wait for requests in hand at SIGTERM (default: %(default)g)")  # fmt: skip
    add("--max-body-mb", type=float, default=default.body / 2**20, metavar="MB",
        help="most MiB of a request (default: %(default)g)")  # fmt: skip
    add("--memory-mb", type=float, default=default.memory / 2**20, metavar="MB",
        help="most MiB of all requests in hand (default: %(default)g)")  # fmt: skip
    add("--max-pixels", type=int, default=default.pixels, metavar="N",
        help="most pixels of a picture (default: %(default)s)")  # fmt: skip
    add("--max-pictures", type=int, default=default.pictures, metavar="N",
        help="most pictures of a request (default: %(default)s)")  # fmt: skip
    add("--cache-mb", type=float, default=default.cache_bytes / 2**20, metavar="MB",
        help="tokens of pictures that are remembered, in MiB (default: %(default)g)")  # fmt: skip
    add("--cache", metavar="FOLDER", help="remember them there too, over restarts")
    add("--conversations", type=int, default=default.conversations, metavar="N",
        help="KV caches kept for later turns, of a local LLM (default: %(default)s)")  # fmt: skip
    add("--answers", type=int, default=default.answers, metavar="N",
        help="most answers that a local LLM makes at once (default: %(default)s)")  # fmt: skip


def _settings(arguments: argparse.Namespace) -> ServiceSettings:
    """Return the core's settings; a number that makes no sense is refused there."""
    from vzip.runtime.service.settings import ServiceSettings

    return ServiceSettings(
        backend=arguments.backend,
        engine=arguments.engine,
        precision=arguments.precision,
        threads=arguments.threads,
        batch=arguments.batch,
        delay=arguments.delay_ms / 1e3,
        workers=arguments.workers,
        queue=arguments.queue,
        per_client=arguments.per_client,
        memory=round(arguments.memory_mb * 2**20),
        body=round(arguments.max_body_mb * 2**20),
        pixels=arguments.max_pixels,
        pictures=arguments.max_pictures,
        seconds=arguments.timeout,
        cache_bytes=round(arguments.cache_mb * 2**20),
        cache=arguments.cache,
        conversations=arguments.conversations,
        answers=arguments.answers,
    )


def _answering(
    choice: object, bundle: Bundle, settings: ServiceSettings, figures: PrometheusFigures
) -> Answering:
    """Open the LLM."""
    from vzip.runtime.llm import TokenSpec
    from vzip.runtime.llm.opening import LlmChoice
    from vzip.runtime.service.answering import Answering

    assert isinstance(choice, LlmChoice)
    TokenSpec.of(bundle.manifest)  # of random weights it says so before the LLM is loaded
    return Answering(
        choice.open(bundle),
        local=not RUNNERS[choice.name].server,
        answers=settings.answers,
        kept=settings.conversations,
        figures=figures,
    )


def _key(arguments: argparse.Namespace) -> str | None:
    key: str | None = arguments.api_key
    if key is None:
        key = os.environ.get(KEY_VARIABLE) or None
    if key is not None and (len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable()):
        raise InvalidInputError(
            f"serve: the API key has {len(key)} characters",
            expected=f"{_SHORTEST_KEY} or more, of ASCII and without spaces at its ends",
            cure="make one of random letters and digits",
        )
    return key


def _check_address(arguments: argparse.Namespace, key: str | None) -> None:
    """Refuse to serve other machines without a key, unless that is what was asked for."""
    host = arguments.host
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        raise InvalidInputError(
            f"serve: got --host {host}", expected="an IP address of this machine, or localhost"
        ) from error
    if not 0 <= arguments.port <= 65535:
        raise InvalidInputError(f"serve: got --port {arguments.port}", expected="0 to 65535")
    for name in ("upload_timeout", "drain"):
        if not 0 < getattr(arguments, name) <= 86400:
            option = f"--{name.replace('_', '-')}"
            raise InvalidInputError(
                f"serve: got {option} {getattr(arguments, name):g}", expected="seconds, above 0"
            )
    process.check_threads(arguments.threads or 1)
    if not loopback and key is None and not arguments.insecure:
        raise InvalidInputError(
            f"serve: --host {host} lets other machines ask, and there is no key",
            expected=f"--api-key KEY, or the environment variable {KEY_VARIABLE}",
            cure="give one, or say --insecure if everybody who reaches the port may ask",
        )
