"""From a model to a socket: connections, signals, and the way down."""

import gc
import os
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

import uvicorn

from gptjax.errors import UserError
from gptjax.serve.app import create_app
from gptjax.serve.connection import Connection
from gptjax.serve.options import Options

if TYPE_CHECKING:
    from types import FrameType

    from gptjax.api import Model


CLOSING = 3  # seconds for the last bytes of what was cut off


def serve(model: "Model", options: Options) -> None:
    """Answer until a signal says to stop. Raises UserError for an address that cannot be had."""
    server = made(model, options)
    print("preparing programs: a first start compiles them, later ones read them", file=sys.stderr, flush=True)
    server.run(sockets=[server.listener])


def made(model: "Model", options: Options) -> "Server":
    """A server that is yet to run."""
    app = create_app(model, options)
    listener = listen(options)
    config = uvicorn.Config(
        app,
        http=lambda *args, **how: Connection(options.idle_timeout, *args, **how),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(options.idle_timeout) or 1,
        timeout_graceful_shutdown=CLOSING,
    )
    return Server(config, app.state.served, listener)


def listen(options: Options) -> socket.socket:
    """A socket that listens."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sys.platform == "linux":  # what a client never reads is given up, also after the last write
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * options.idle_timeout))
        listener.bind(address)
        listener.listen(1024)
        return listener
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(
            f"--host {options.host} --port {options.port}: {why}; give others, --port 0 for a free one"
        ) from None


def tidy() -> None:
    """What a start has made stays and is looked at no more, so that what requests leave behind can be looked for often:
    the command's own thresholds, made for a start, let tens of megabytes of it gather."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 5)


class Server(uvicorn.Server):
    """Says when it is ready, and goes down when all is answered."""

    def __init__(self, config: uvicorn.Config, served: Any, listener: socket.socket) -> None:
        super().__init__(config)
        self.served, self.listener = served, listener
        self.said, self.until = False, 0.0

    def handle_exit(self, sig: int, frame: "FrameType | None") -> None:
        """The first signal lets what runs end, a second one ends it."""
        if self.served.draining:
            os._exit(128 + sig)
        self.served.draining = True
        self.until = time.monotonic() + self.served.options.drain

    async def on_tick(self, counter: int) -> bool:
        """Asked ten times a second whether to go down."""
        served = self.served
        if served.failure:
            raise served.failure
        if served.warm and not self.said:
            self.said = True
            tidy()
            host, port = self.listener.getsockname()[:2]
            print(f"serving {served.name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        over = served.draining and (not self.server_state.tasks or time.monotonic() > self.until)
        if over:
            served.worker.cancel_all()
        return over or await super().on_tick(counter)
