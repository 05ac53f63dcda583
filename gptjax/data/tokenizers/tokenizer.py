"""What every tokenizer is, whatever library is behind it."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from gptjax.files import write_whole

SPECIALS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
"""Our reserved tokens: end of text where the tokenizer has no own, the three chat roles, end of turn."""
INFILL = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
"""Reserved beside them where a model learns to fill in the middle of a text."""
MARKS = {"sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
"""What encoders need, by role, in the order in which `transformers` gives ids to roles that are new to it."""
MODES = ("[R]", "[S]", "[X]")
"""Before a text that is to be restored: from short spans, from its beginning, from long or many spans (UL2)."""
TEMPLATE = "chat_template.jinja"  # among the files of a tokenizer, by the name that `transformers` reads


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Ids 0..vocab_size-1; load one with `load_tokenizer`."""

    pieces: list[bytes]
    """The UTF-8 bytes of each id; a reserved id has its name. Empty for an id without a token and for the unknown."""
    special: dict[str, int]
    """Every reserved token, its own and ours: what no text yields."""
    eot: int
    """The id that ends a document, one of the reserved."""
    encode: Callable[[str], np.ndarray]
    """Text to ids, int32 [N], never a reserved one, even where the text spells its name. Raises
    UnicodeEncodeError for lone surrogates, which have no UTF-8 form."""
    spec: str
    """What loads this tokenizer again, with {} for the folder of its files."""
    files: dict[str, bytes]
    """The files that `save` writes."""
    own_size: int = 0
    """Ids of a directory's own tokens, those that it reserves included; ours come after."""
    begin: tuple[int, ...] = ()
    """What its publisher puts before a text that a model is to continue."""
    changes: str = ""
    """What becomes of a text that does not come back as it was; empty where all do."""
    blank_first: bool = False
    """Whether `encode` puts a blank before a text, which `decode` takes off again."""
    join: Callable[[list[int]], str] | None = None
    """Ids to text, where joining the pieces is not the way."""
    inner: Callable[[str], np.ndarray] | None = None
    """`encode` of a text after a reserved token, where that is another."""
    beyond: dict[str, int] = field(default_factory=dict)
    """Those of SPECIALS that the model has no row for, with the ids that they would have."""

    roles: dict[str, int] = field(default_factory=dict)
    """Those of MARKS that it has, its publisher's or ours."""
    between: tuple[int, ...] = ()
    """What its publisher puts between two texts."""
    types: bool = False
    """Whether its publisher tells the tokens of the second text from those of the first."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what text becomes by it, for keys of what was made so."""
        whole = hashlib.sha256()
        for part in (*self.pieces, *self.files.values()):
            whole.update(hashlib.sha256(part).digest())
        return whole.hexdigest()

    @property
    def vocab_size(self) -> int:
        """Number of ids, the reserved ones and those without a token included."""
        return len(self.pieces)

    @property
    def absent(self) -> tuple[str, ...]:
        """Those of SPECIALS that the model has no row for."""
        return tuple(self.beyond)

    @property
    def lossless(self) -> bool:
        """Whether every text comes back as it was."""
        return not self.changes

    @property
    def infills(self) -> bool:
        """Whether it is of a model that learns to fill in the middle of a text."""
        return self.special.keys() >= set(INFILL)

    @cached_property
    def possible(self) -> np.ndarray:
        """bool [vocab_size]: the ids that stand for something. No other is ever sampled."""
        return np.array([bool(piece) for piece in self.pieces])

    @property
    def least_vocab_size(self) -> int:
        """What a model must have, for every id that a text, its beginning or its end can yield."""
        unmet = set(self.special.values()) - {self.eot, *self.begin}
        return 1 + max(i for i in range(self.vocab_size) if i not in unmet)

    @property
    def chat_vocab_size(self) -> int:
        """What a model must have, for the chat tokens as well."""
        ids = self.special | self.beyond
        return max(self.least_vocab_size, *(1 + ids[name] for name in SPECIALS[1:]))

    @property
    def notes(self) -> list[str]:
        """What its user should know, a clause each."""
        changes = [f"it changes text: {self.changes}"] * (not self.lossless)
        return changes + [f"the model has no room for {' '.join(self.absent)}"] * bool(self.absent)

    def prompt(self, text: str) -> np.ndarray:
        """Ids of a text that a model is to continue, int32 [N]."""
        return np.concatenate([np.array(self.begin, np.int32), self.encode(text)])

    def encode_inside(self, text: str) -> np.ndarray:
        """`encode` of a text that stands after a reserved token: without the blank that some put before a whole text
        alone."""
        return (self.inner or self.encode)(text)

    def decode(self, ids: Iterable[int], *, inside: bool = False) -> str:
        """Ids to text; reserved ids show their names, ids without a token nothing, bytes that are not UTF-8 U+FFFD.

        `inside` says that the ids go on from others. Raises IndexError for an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        if any(not 0 <= i < self.vocab_size for i in ids):
            raise IndexError(f"token ids {min(ids)} to {max(ids)}: outside 0 to {self.vocab_size - 1}")
        if self.join is not None:
            return self.join(ids)
        text = b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.blank_first and not inside else text

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes behind each id, int32 [vocab_size]; 0 for reserved ids. For bits per byte, which then counts the
        text that the targets stand for: of a tokenizer that changes text, the changed one."""
        lengths = np.array([len(piece) for piece in self.pieces], np.int32)
        lengths[list(self.special.values())] = 0
        return lengths

    def fit(self, vocab_size: int) -> "Tokenizer":
        """The same for a model of `vocab_size` ids: those beyond the tokenizer's stand for nothing, and reserved tokens
        that the model has no row for are absent.

        Raises ValueError below `least_vocab_size`.
        """
        if vocab_size < self.least_vocab_size:
            raise ValueError(f"{vocab_size} ids are too few for a tokenizer that yields {self.least_vocab_size}")
        special = {name: i for name, i in self.special.items() if i < vocab_size}
        roles = {role: i for role, i in self.roles.items() if i < vocab_size}
        beyond = {name: i for name in SPECIALS[1:] if (i := self.special.get(name, 0)) >= vocab_size}
        pieces = [*self.pieces[:vocab_size], *[b""] * (vocab_size - self.vocab_size)]
        return replace(self, pieces=pieces, special=special, roles=roles, beyond=self.beyond | beyond)

    def with_infill(self) -> "Tokenizer":
        """The same with the tokens of INFILL, after its last id."""
        return self._with(INFILL, "fim:")

    def with_marks(self) -> "Tokenizer":
        """The same with the tokens of MARKS for the roles that it has no token for, after its last id. Where its
        publisher ends texts with a separator, that is the end of text, too."""
        if "sep" in self.roles and self.own_size and self.eot >= self.own_size:
            return replace(self, eot=self.roles["sep"]).with_marks()
        missing = {role: name for role, name in MARKS.items() if role not in self.roles}
        if not missing:
            return self
        wanted = self._with(tuple(missing.values()), "marks:")
        return replace(wanted, roles=self.roles | {role: wanted.special[name] for role, name in missing.items()})

    def with_sentinels(self, count: int) -> "Tokenizer":
        """The same with <extra_id_0> to <extra_id_(count - 1)>, those that it lacks after its last id."""
        return self._with(tuple(f"<extra_id_{number}>" for number in range(count)), f"sentinels:{count}:")

    def with_modes(self) -> "Tokenizer":
        """The same with the tokens of MODES."""
        return self._with(MODES, "modes:")

    def _with(self, names: tuple[str, ...], prefix: str) -> "Tokenizer":
        if self.special.keys() >= set(names):
            return self
        pieces, special = reserve(self.pieces, self.special, names)
        return replace(self, pieces=pieces, special=special, spec=f"{prefix}{self.spec}")

    def with_template(self, text: str) -> "Tokenizer":
        """The same with a chat template among its files."""
        spec = f"{self.spec}:{{}}" if self.spec.rpartition(":")[2] == "bytes" else self.spec
        return replace(self, spec=spec, files=self.files | {TEMPLATE: text.encode()})

    def save(self, folder: Path) -> str:
        """Write the tokenizer's files into `folder`; return the spec that loads it from there."""
        for name, data in self.files.items():
            write_whole(folder / name, data)
        return self.spec.format(folder)


def bytes_tokenizer() -> Tokenizer:
    """A token for each byte."""
    pieces, special = reserve([bytes([b]) for b in range(256)], {}, SPECIALS)

    def encode(text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    return Tokenizer(pieces, special, special["<|endoftext|>"], encode, "bytes", {})


def reserve(pieces: list[bytes], special: dict[str, int], names: tuple[str, ...]) -> tuple[list[bytes], dict[str, int]]:
    """Give each name that is not reserved yet the next id after the vocabulary, and every reserved id its name."""
    pieces, special = list(pieces), dict(special)
    for name in names:
        if name not in special:
            special[name] = len(pieces)
            pieces.append(b"")
    for name, i in special.items():
        pieces[i] = name.encode()
    return pieces, special
