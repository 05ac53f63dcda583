"""How a server is to behave."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from gptjax.errors import UserError


@dataclass(frozen=True)
class Options:
    """As the arguments of `gptjax serve`, where each is explained."""

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    api_key_file: str = ""
    public: bool = False
    max_queue: int = 64
    slots: int = 16
    request_timeout: float = 600.0
    idle_timeout: float = 60.0
    max_body: int = 2_000_000
    audit_file: str = ""
    audit_text: bool = False
    allow_origin: tuple[str, ...] = ()
    drain: float = 30.0
    weights: str = "auto"

    @property
    def loopback(self) -> bool:
        """Whether nobody but this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def require(self) -> None:
        """Raises UserError for an address that others can reach without keys, unless that is meant."""
        if not self.loopback and not self.api_key_file and not self.public:
            raise UserError(
                f"--host {self.host}: others can reach it; give --api-key-file with who may ask, or --public for all"
            )

    def called(self, path: str) -> str:
        """The model's name to clients: that of its folder unless it was given one."""
        return self.name or Path(path).resolve().name
