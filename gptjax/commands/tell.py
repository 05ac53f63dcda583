"""`gptjax tell PATH`."""

import json
from typing import Annotated

from gptjax.commands.arguments import Positional, Repeated
from gptjax.config.fields import Positive, frozen
from gptjax.errors import UserError


@frozen
class Command:
    """Say what an encoder makes of texts: their class or number, or the words that are hidden in them."""

    folder: Annotated[str, Positional("PATH")]
    """A run folder or a Hugging Face directory."""
    text: Annotated[tuple[str, ...], Repeated()]
    """A text; may be given several times. Of an encoder that has not learned classes, with [MASK] (or what its
    tokenizer has in that place) where a word is asked for."""
    second: Annotated[tuple[str, ...], Repeated()] = ()
    """The second text of each pair, where pairs were learned."""
    count: Positive = 5
    """Words that are named for each that is hidden."""

    def run(self) -> None:
        """Print a line of JSON for each text."""
        if self.second and len(self.second) != len(self.text):
            raise UserError(f"--second: {len(self.second)} for {len(self.text)} texts; give one for each, or none")
        from gptjax import api
        from gptjax.stages import Classify

        model = api.load_any(self.folder)
        if not isinstance(model, api.Encoder):
            raise UserError(f"{self.folder}: no encoder; gptjax sample takes it")
        if not isinstance(model.stage, Classify):
            if self.second:
                raise UserError("--second: for what has learned pairs; leave it out")
            for text in self.text:
                words = [dict(each) for each in model.fill(text, self.count)]
                print(json.dumps({"text": text, "words": words}, ensure_ascii=False))
            return
        pairs = [*zip(self.text, self.second, strict=True)] if self.second else [*self.text]
        for each, told in zip(pairs, model.tell(pairs), strict=True):
            print(json.dumps({"text": each, "told": told}, ensure_ascii=False))
