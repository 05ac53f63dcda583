"""Who may ask, and how often. A server keeps no key, only its hash."""

import hashlib
import hmac
import math
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gptjax.errors import UserError
from gptjax.serve.errors import Refused

LINE = re.compile(r"([\w.@-]{1,64}):([0-9a-f]{64})(?::([1-9][0-9]{0,8}))?")
FORM = "NAME:SHA256[:REQUESTS-PER-MINUTE], as gptjax serve --new-key NAME prints it"


def new_key(name: str) -> tuple[str, str]:
    """A key for someone, and the line that goes into the server's file. Raises UserError for a name that cannot be."""
    key = f"sk-{secrets.token_urlsafe(32)}"
    line = f"{name}:{_hash(key)}"
    if not LINE.fullmatch(line):
        raise UserError(f"--new-key {name!r}: at most 64 letters, digits and . _ @ -")
    return key, line


def _hash(key: str) -> str:
    """Keys are 256 random bits, which no list of words finds: a plain hash will do."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


@dataclass
class Allowance:
    """Requests of a key: so many at once, and as many again each minute."""

    per_minute: int
    left: float
    at: float

    def take(self, now: float) -> float:
        """Seconds to wait; 0 where one may go."""
        self.left = min(self.per_minute, self.left + (now - self.at) * self.per_minute / 60)
        self.at = now
        if self.left < 1:
            return (1 - self.left) * 60 / self.per_minute
        self.left -= 1
        return 0.0


class Keys:
    """The keys of a file. Empty: everybody may ask."""

    def __init__(self, path: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        """Raises UserError for a file that cannot be read, or a line of another form."""
        self._hashes: dict[str, str] = {}
        self._allowances: dict[str, Allowance] = {}
        self._clock = clock
        for number, line in enumerate(_lines(path), 1):
            if not line or line.startswith("#"):
                continue
            found = LINE.fullmatch(line)
            if not found or found[1] in self._hashes:
                why = f"a second key of {found[1]}" if found else "another form"
                raise UserError(f"--api-key-file {path}: line {number} is {why}; a line is {FORM}")
            self._hashes[found[1]] = found[2]
            if found[3]:
                self._allowances[found[1]] = Allowance(int(found[3]), int(found[3]), clock())
        if path and not self._hashes:
            raise UserError(f"--api-key-file {path}: no key in it; a line is {FORM}")

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def name(self, authorization: str) -> str:
        """Whose key a header has. Every one is compared, and each in constant time. Raises Refused where nobody's."""
        scheme, _, key = authorization.partition(" ")
        given, found = _hash(key.strip()), ""
        for name, known in self._hashes.items():
            if hmac.compare_digest(given, known):
                found = name
        if not found or scheme.lower() != "bearer":
            what = "the key is not known here" if authorization else "a key is missing"
            raise Refused(401, f"{what}: send Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"})
        return found

    def take(self, name: str) -> None:
        """Count a request. Raises Refused where a key has had its share."""
        allowance = self._allowances.get(name)
        if allowance and (wait := allowance.take(self._clock())):
            message = f"key {name}: {allowance.per_minute} requests a minute"
            raise Refused(429, message, headers={"Retry-After": str(math.ceil(wait))})


def _lines(path: str) -> list[str]:
    if not path:
        return []
    try:
        return [line.strip() for line in Path(path).read_text().splitlines()]
    except OSError as error:
        raise UserError(f"--api-key-file {path}: {error.strerror}; name a file with a line {FORM}") from None
    except UnicodeDecodeError:
        raise UserError(f"--api-key-file {path}: no text; a line is {FORM}") from None
