"""Start to end: the model, the engine, the socket, the shutdown."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CallError, PaceError
from .options import ServeOptions

if TYPE_CHECKING:
    from .engine import Engine
    from .served import Served

GRACE = 30  # seconds that open answers have at the end


def serve(
    folder: Path,
    options: ServeOptions,
    *,
    window: int | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Serve the model of a folder that pace-convert wrote, until SIGTERM or Ctrl-C.

    Raises CallError and PaceError for what can't be, before anybody is served.
    """
    uvicorn = _uvicorn()
    from .app import Service
    from .served import load_served

    with _listener(options) as listener:
        served = load_served(
            folder,
            options,
            window=window,
            generates=options.engine_url is None,
            trust_remote_code=trust_remote_code,
        )
        engine = _engine(served, options)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host

        def listening() -> None:
            line = f"{served.name} is served at http://{shown}:{port}/v1"
            print(line, file=sys.stderr, flush=True)

        config = uvicorn.Config(
            Service(served, engine, options, listening).app(),
            log_level="warning",
            timeout_graceful_shutdown=GRACE,
            server_header=False,
        )
        server = uvicorn.Server(config)
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            if not server.started:
                raise
        if not server.started:
            raise PaceError("the server did not start", "see above")


def _engine(served: Served, options: ServeOptions) -> Engine:
    if options.engine_url is None:
        from .embedded import Embedded

        return Embedded(served, options.max_tokens)
    from .upstream import Upstream, check_engine

    check_engine(options.engine_url, options.engine_api_key)
    return Upstream(served, options.engine_url, options.engine_api_key)


def _uvicorn() -> Any:
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise PaceError(
            f"serving needs the package {error.name}", "pip install 'pace-convert[serve]'"
        ) from error
    return uvicorn


def _listener(options: ServeOptions) -> socket.socket:
    """The socket, bound at once: a port that is taken is told before a model is loaded."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM
        )[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        where = f"{options.host}:{options.port}"
        raise CallError(
            f"can't listen at {where}: {error.strerror or error}", "give another --port or --host"
        ) from error
    return listener
