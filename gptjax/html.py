"""Pages of one file: parts that several of them share are put in before they are shown, and a policy lets nothing but
their own script run."""

import base64
import hashlib
import re
from importlib import resources

PART = re.compile(r"/\* include ([\w/]+\.(?:css|js)) \*/")
INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def page(name: str) -> str:
    """A page of this package with its parts, `serve/chat.html`."""
    return PART.sub(lambda found: _read(found[1]), _read(name))


def _read(name: str) -> str:
    return resources.files("gptjax").joinpath(name).read_text(encoding="utf-8")


def policy(text: str) -> str:
    """The Content-Security-Policy under which a page runs the scripts and styles that stand in it, by their digests,
    speaks with the server that it is from, and loads nothing else."""
    kinds: dict[str, list[str]] = {"script": [], "style": []}
    for kind, inside in INLINE.findall(text):
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        kinds[kind].append(f"'sha256-{digest}'")
    return "; ".join(
        [
            "default-src 'none'",
            *(f"{kind}-src {' '.join(digests) or chr(39) + 'none' + chr(39)}" for kind, digests in kinds.items()),
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


def headers(text: str) -> dict[str, str]:
    """What a page is served with."""
    return {
        "Content-Security-Policy": policy(text),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
