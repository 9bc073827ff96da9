"""Runs a server: opens the models, listens, and stops when it has answered what it has taken."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator, Sequence

from compress.common.errors import UserError
from compress.models.source import find
from compress.serve.settings import ServeOptions, named_models

try:
    import uvicorn

    from compress.serve.app import Service, make_app
    from compress.serve.connection import bounded
    from compress.serve.model import ServedModel
    from compress.serve.telemetry import Telemetry, Watched
except ImportError as error:
    raise UserError(
        f"`compress serve` needs a package that is not installed: {error.name}", "pip install 'compress-embedders[serve]'"
    ) from error

KEEP_ALIVE_SECONDS = 75
"""How long an idle connection stays open: longer than proxies keep theirs, so that it is they who close it."""
CHECK_SECONDS = 0.02
"""How often a server that is stopping looks whether all is answered."""


class Stoppable(uvicorn.Server):
    """uvicorn's server; a signal ends it in order, and is then done with."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        """Serve a service."""
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop in order on the first signal, at once on the second."""
        loop = asyncio.get_running_loop()

        def stop(*_: object) -> None:
            if self._service.stopping:
                self.force_exit = self.should_exit = True
            self._service.stopping = True
            loop.call_soon_threadsafe(self._finish)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _finish(self) -> None:
        """End once everything that was taken is answered; until then, new requests are told that the server is stopping."""
        if self._service.open_requests:
            asyncio.get_running_loop().call_later(CHECK_SECONDS, self._finish)
        else:
            self.should_exit = True


def serve(models: Sequence[str], options: ServeOptions) -> None:
    """Serve models until a signal asks to stop.

    Args:
        models: for each a built-in name, folder, run or hub name, or `NAME=` before one.
        options: how they are served.

    Raises:
        UserError: a model cannot be opened, two have one name, the address is taken or public without a key.
    """
    options.check()
    key = options.key()
    telemetry = Telemetry()
    served: dict[str, ServedModel] = {}
    for given, model in named_models(models):
        folder = find(model)
        name = given or folder.name
        if name in served:
            raise UserError(f"two models are called {name!r}", "give one of them another name: NAME=MODEL")
        served[name] = ServedModel(name, folder, options, Watched(telemetry, name))
    service = Service(served, options.limits, key, telemetry)
    with _listening(options.host, options.port) as listener:
        asyncio.run(_serve(service, listener, options))


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Open the server's socket.

    Raises:
        UserError: the address is taken, or is none of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"{host}:{port}: cannot be listened on ({getattr(error, 'strerror', None) or error})", "--port, --host"
        ) from error
    with listener:
        yield listener


async def _serve(service: Service, listener: socket.socket, options: ServeOptions) -> None:
    """Answer from now on; models are opened meanwhile, and a model that cannot be ends the server."""
    config = uvicorn.Config(
        make_app(service),
        loop="asyncio",
        http=bounded(options.limits.read_seconds),
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="error",
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
    )
    server = Stoppable(config, service)
    instances = [instance for model in service.models.values() for instance in model.instances]
    running = [asyncio.create_task(instance.run()) for instance in instances]
    answering = asyncio.create_task(server.serve(sockets=[listener]))
    saying = asyncio.create_task(_say_ready(service, listener, options.host))
    try:
        done, _ = await asyncio.wait([answering, *running], return_when=asyncio.FIRST_COMPLETED)
        if answering not in done and not service.stopping:  # an instance ends by itself only where it cannot open its model
            server.should_exit = server.force_exit = service.stopping = True
            await answering
            for task in done:
                task.result()
        await answering
    finally:
        saying.cancel()
        for instance in instances:
            await instance.stop()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _say_ready(service: Service, listener: socket.socket, host: str) -> None:
    """Say where the server is, and when it is ready."""
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}/v1"
    print(f"{address}: opening {', '.join(service.models)}", file=sys.stderr, flush=True)
    for model in service.models.values():
        await asyncio.gather(*(instance.ready.wait() for instance in model.instances))
    print(f"{address}: ready", file=sys.stderr, flush=True)
