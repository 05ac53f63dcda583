"""The same pieces of work by Apache Beam (extra `beam`): on this machine, or on a cluster by Beam's own options.

Every pass is a pipeline of its own, from pieces to nothing: what a piece makes is a file in a folder that all workers
see. A piece that is run twice writes the same file twice.
"""

import pickle
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gptjax.data.pool import Work
from gptjax.errors import UserError

LOCAL = "--runner=FnApiRunner"  # Beam's own choice fetches a program from the network first


def by_beam(options: str, folder: Path) -> Callable[[Sequence[Work], Callable[[int], None]], None]:
    """What does pieces of work by Beam. options: as Beam's command line has them, such as `--runner=FlinkRunner
    --flink_master=HOST:PORT`; without a runner it is this machine. folder: where a piece that fails says why.

    Raises UserError without the extra, and for options that Beam does not take.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError("--beam: needs the extra beam: pip install 'gptjax[beam]'") from None
    words = shlex.split(options)
    words += [] if any(word.split("=")[0] == "--runner" for word in words) else [LOCAL]

    def do(pieces: Sequence[Work], heard: Callable[[int], None]) -> None:
        try:
            with beam.Pipeline(options=PipelineOptions(words)) as pipeline:
                _ = pipeline | beam.Create([*pieces]) | beam.Reshuffle() | beam.Map(_run, str(folder))
        except SystemExit:
            raise UserError(f"--beam {options}: Beam does not take these options; see its documentation") from None
        for piece in pieces:
            if (said := _said(folder, piece)).exists():
                error: Exception = pickle.loads(said.read_bytes())
                said.unlink()
                raise error
            heard(piece.size)

    return do


def _said(folder: Path, piece: Work) -> Path:
    return folder / f"failed-{type(piece).__name__}-{piece.number:05}"


def _run(piece: Any, folder: str) -> None:
    """A user's mistake is said by the one who started it: to Beam it would be a fault of the worker, to be tried
    again."""
    try:
        piece.run(lambda size: None)
    except UserError as error:
        _said(Path(folder), piece).write_bytes(pickle.dumps(error))
