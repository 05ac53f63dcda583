"""`gptjax serve PATH`."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from gptjax.commands.arguments import Positional, Repeated
from gptjax.config.fields import Count, Positive, frozen
from gptjax.errors import UserError

EXTRA = "gptjax serve: needs the extra serve: pip install 'gptjax[serve]'"
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@frozen
class Command:
    """Serve a trained model by OpenAI's API.

    It says where, and goes on until SIGTERM or Ctrl-C, after which it ends what it has begun; a second one ends at
    once."""

    folder: Annotated[str, Positional("PATH")] = ""
    """A run folder or a Hugging Face directory."""
    host: str = "127.0.0.1"
    """Address to listen on; one that others can reach asks for keys, or for --public."""
    port: Annotated[int, Field(ge=0, lt=2**16)] = 8000
    """Its port; 0 takes a free one."""
    name: str = ""
    """What clients call the model; the folder's name unless given."""
    api_key_file: str = ""
    """Who may ask: a line NAME:SHA256[:REQUESTS-PER-MINUTE] each, as --new-key prints it."""
    new_key: str = ""
    """Make a key for NAME, print it and its line for --api-key-file, and serve nothing."""
    public: bool = False
    """Let anybody who reaches the address ask, without a key."""
    max_queue: Count = 64
    """Replies that may wait for a slot; beyond, requests are refused with 429."""
    slots: Positive = 16
    """Replies in progress at once."""
    request_timeout: Seconds = 600.0
    """Seconds that a request may take, waiting included."""
    idle_timeout: Seconds = 60.0
    """Seconds within which a client must have sent its request, and read what waits for it."""
    max_body: Positive = 2_000_000
    """Bytes of a request at most."""
    audit_file: str = ""
    """Append a line of JSON for each request: time, key's name, route, tokens, status."""
    audit_text: bool = False
    """There also what was asked and answered."""
    allow_origin: Annotated[tuple[str, ...], Repeated()] = ()
    """A site, such as https://chat.example.com, whose pages may ask; may be given several times."""
    drain: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    """Seconds that running replies have to end after SIGTERM."""
    weights: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """How parameters are held; auto is the type that the model computes in."""

    def run(self) -> None:
        """Listen and answer."""
        try:
            from gptjax.serve.keys import new_key
            from gptjax.serve.options import Options
            from gptjax.serve.server import serve
        except ModuleNotFoundError as error:
            raise UserError(f"{EXTRA} (no module {error.name})") from None
        if self.new_key:
            print("\n".join(new_key(self.new_key)))
            return
        if not self.folder:
            raise UserError("gptjax serve: PATH is missing: a run folder or a Hugging Face directory")
        options = Options(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Options)})
        options.require()
        from gptjax import api

        serve(api.load(self.folder, weights=self.weights, slots=self.slots), options)
