"""`gptjax label PATH`."""

import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from gptjax.commands.arguments import Positional, Repeated
from gptjax.config.fields import Positive, frozen
from gptjax.errors import UserError

if TYPE_CHECKING:
    from gptjax.api import Model
    from gptjax.data.prompted import Prompt
    from gptjax.label.session import Session


@frozen
class Command:
    """Show a person prompts with several replies of a model, to be ranked in a browser.

    What it writes trains a reward model (configs/reward.py). Every answer is on the disk before the next prompt is
    shown; started again, it goes on where it stopped. Ctrl-C ends it."""

    folder: Annotated[str, Positional("PATH")]
    """A run folder or a Hugging Face directory."""
    prompts: str = ""
    """Prompts, in a form that PPO reads (data.source)."""
    replies: Annotated[int, Field(ge=2, le=9)] = 4
    """Replies to each prompt."""
    out: str = "rankings.jsonl"
    """Rankings are added to this file; beside it, OUT.aside has what teaches nothing: what was skipped or all tied."""
    labeller: str = ""
    """Who ranks; the name of the user unless given."""
    beside: Annotated[tuple[str, ...], Repeated()] = ()
    """Rankings of others to compare with, that are not in --out; may be given several times."""
    host: str = "127.0.0.1"
    """Address to listen on, of this machine alone: nobody is asked for a key."""
    port: Annotated[int, Field(ge=0, lt=2**16)] = 8001
    """Its port; 0 takes a free one."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.8
    """Divides the logits of a reply."""
    top_k: Annotated[int, Field(ge=-1)] = 0
    """Keep the k likeliest tokens; 0 or -1 keeps all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep the likeliest tokens up to this probability."""
    tokens: Positive = 256
    """Length of a reply; at most half of the context."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """The same seed gives every labeller the same replies, and each an order of their own."""
    cache_dir: str = "~/.cache/gptjax"
    """Where the prompts are built."""
    weights: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """How parameters are held; auto is the type that the model computes in."""

    def run(self) -> None:
        """Listen until Ctrl-C; at the end say how much is done and how far labellers agree."""
        if not self.prompts:
            raise UserError("gptjax label: --prompts is missing: a file of prompts, a line of JSON each")
        if not _is_loopback(self.host):
            raise UserError(
                f"--host {self.host}: others could reach it, and it asks nobody for a key; "
                "take 127.0.0.1, and a tunnel (ssh -L) from elsewhere"
            )
        try:
            from gptjax.label.server import serve
        except ModuleNotFoundError as error:
            raise UserError(
                f"gptjax label: needs the extra serve: pip install 'gptjax[serve]' (no module {error.name})"
            ) from None
        from gptjax import api

        model = api.load(self.folder, weights=self.weights, slots=self.replies)
        if not model.chats:
            raise UserError(f"{self.folder}: has not learned conversations; rank the replies of a run of the stage sft")
        with self.session(model) as session:
            serve(session, self.host, self.port)

    def session(self, model: "Model") -> "Session":
        """What is to be ranked, by whom, and where it is kept. Raises UserError for files that cannot be used."""
        from getpass import getuser

        from gptjax.label.answers import Record, answers, read
        from gptjax.label.drawn import Drawn, How
        from gptjax.label.session import Session

        length = min(self.tokens, model.context // 2)
        prompts = self._prompts(model, model.context - length)
        others = [answer for name in self.beside for answer in answers(list(read(Path(name))), name)]
        record = Record(Path(self.out))
        how = How(self.replies, self.seed, length, self.temperature, self.top_k, self.top_p)
        return Session(prompts, Drawn(model, how), record, self.labeller or getuser(), self.seed, others)

    def _prompts(self, model: "Model", room: int) -> "Sequence[Prompt]":
        """In the order of the file, each once; those that leave a reply no room are left out, and it is said."""
        from gptjax.config import PromptConfig
        from gptjax.data.prompted import open_prompts
        from gptjax.data.sources import ALL, build
        from gptjax.label.answers import key_of
        from gptjax.stages import SFT

        assert isinstance(model.stage, SFT)
        config = PromptConfig(source=self.prompts, cache_dir=self.cache_dir, max_prompt_tokens=room)
        source = build(config).split(ALL, config.split_by)
        found = open_prompts(config, source, model.stage.chat, model.context)
        for reason, count in found.left_out.items():
            print(f"{count:,} prompts left out: {reason}")
        every = [found[number] for number in range(len(found))]
        return list({key_of(prompt.messages): prompt for prompt in every}.values())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
