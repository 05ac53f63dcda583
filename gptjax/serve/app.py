"""The app: routes behind the guard, and the thread that computes while it lives."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from gptjax.serve import errors
from gptjax.serve.guard import Guard
from gptjax.serve.metrics import Metrics
from gptjax.serve.options import Options
from gptjax.serve.routes import Served, routes
from gptjax.serve.worker import Worker

if TYPE_CHECKING:
    from gptjax.api import Model


def create_app(model: "Model", options: Options) -> FastAPI:
    """A model as an app; its lifespan starts and ends the engine's thread. `app.state.worker` is the worker,
    `app.state.served` says how it is. Raises UserError for options that cannot be."""
    worker = Worker(model, options.max_queue)
    metrics = Metrics(worker)
    served = Served(model, options, worker, metrics, int(time.time()))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        warming = asyncio.create_task(_warm(served))
        yield
        warming.cancel()
        await worker.stop()

    app = FastAPI(title="gptjax", lifespan=lifespan, docs_url=None, redoc_url=None, responses=errors.DOCUMENTED)
    app.state.served, app.state.worker = served, worker
    app.include_router(routes(served))
    # Pages: app.include_router(pages(served))
    errors.install(app)
    app.add_middleware(Guard, options=options, metrics=metrics)
    if options.allow_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=options.allow_origin, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


async def _warm(served: Served) -> None:
    """Ready when every program that a request may need is there."""
    try:
        await served.worker.warm()
        served.warm = True
    except Exception as error:
        served.failure = error
