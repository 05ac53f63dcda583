"""A session on a socket, until somebody ends it."""

import socket
from contextlib import suppress

import uvicorn

from gptjax.label.app import create_app
from gptjax.label.session import Session
from gptjax.serve.options import Options
from gptjax.serve.server import listen


class Server(uvicorn.Server):
    """Says where it is."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket) -> None:
        super().__init__(config)
        self.listener = listener

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.listener.getsockname()[:2]
        print(f"rank replies at http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.ending.set()  # type: ignore[union-attr]  # an app of `create_app`
        await super().shutdown(sockets)


def serve(session: Session, host: str, port: int) -> None:
    """Answer until Ctrl-C or SIGTERM, and say what has come of it. Raises UserError for an address that cannot be
    had."""
    app, listener = create_app(session, host), listen(Options(host=host, port=port))
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
    with suppress(KeyboardInterrupt):
        Server(config, listener).run(sockets=[listener])
    for line in session.summary():
        print(line)
