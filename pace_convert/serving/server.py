"""Start to end: the model, the engine, the socket, the shutdown."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CallError, PaceError
from .options import ServeOptions

if TYPE_CHECKING:
    from .engine import Engine
    from .served import Served

GRACE = 30  # seconds that open answers have at the end
KEEP_ALIVE = 75  # seconds: closed earlier, a connection goes while a client's pool uses it again


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

    with _listener(options) as listener, contextlib.ExitStack() as ending:
        served = load_served(
            folder,
            options,
            window=window,
            generates=options.engine == "transformers" and options.engine_url is None,
            trust_remote_code=trust_remote_code,
        )
        where = _where(listener)
        engine = _engine(folder, served, options, where, ending)

        def listening() -> None:
            _say(f"{served.name} is served at {where}")

        config = uvicorn.Config(
            Service(served, engine, options, listening).app(),
            log_level="warning",
            timeout_graceful_shutdown=GRACE,
            timeout_keep_alive=KEEP_ALIVE,
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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _where(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def _engine(
    folder: Path,
    served: Served,
    options: ServeOptions,
    where: str,
    ending: contextlib.ExitStack,
) -> Engine:
    """What generates; what reads, where that is vLLM, is told to the model. where: the server
    listens; ending: stops what is started.
    """
    url = options.engine_url
    if "vllm" in (options.engine, options.reader):
        url = _vllm(folder, served, options, where, ending) or url
    if url is None:
        from .embedded import Embedded

        return Embedded(served, options.max_tokens)
    from .upstream import Upstream, check_engine

    check_engine(url, options.engine_api_key)
    return Upstream(served, url, options.engine_api_key)


def _vllm(
    folder: Path,
    served: Served,
    options: ServeOptions,
    where: str,
    ending: contextlib.ExitStack,
) -> str | None:
    """vLLM's processes, side by side until both answer. Returns the URL of the one that generates,
    if one does.
    """
    from ..converted.opened import open_converted
    from .views import engine_view, left_out, reader_view
    from .vllm_keys import MODEL, VllmKeys
    from .vllm_process import VllmProcess, vllm_arguments

    converted, settings = open_converted(folder), served.model.window_settings
    place = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="pace-vllm-")))
    logs = Path(tempfile.gettempdir(), f"pace-vllm-{os.getpid()}")
    _say(f"{served.name} will be served at {where}; vLLM is starting, it writes to {logs}-*.log")

    def started(view: Path, name: str, more: Sequence[str] = ()) -> VllmProcess:
        arguments = [*more, *vllm_arguments(name, options.engine_args)]
        process = VllmProcess(view, Path(f"{logs}-{view.name}.log"), arguments)
        ending.callback(process.stop)
        return process

    engine = reader = None
    if options.engine == "vllm":
        if without := left_out(converted):
            _say(f"vLLM answers without {' and '.join(without)}, which it does not have")
        engine = started(engine_view(converted, place / "engine"), served.name)
    if options.reader == "vllm":
        view = reader_view(converted, place / "reader", settings.layer, settings.key_size)
        longest = str(settings.block + settings.overlap + 2)
        reader = started(view, MODEL, ["--runner", "pooling", "--max-model-len", longest])
    for process in (engine, reader):
        if process is not None:
            process.wait()
    if reader is not None:
        served.kept.reader = VllmKeys(
            reader.url, settings.block, settings.key_size, served.model.dtype
        )
    return engine.url if engine else None


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
