"""What a build made, as a person reads it."""

from typing import Any


def summary(manifest: dict[str, Any]) -> str:
    """Lines of a terminal: by origin what was read and kept, and what was dropped by reason."""
    lines = []
    for name, about in manifest["origins"].items():
        read, kept = about["read"], about["kept"]
        lines.append(
            f"{name:20} read {_count(read)}, kept {_count(kept)}"
            + (f" ({kept['bytes'] / read['bytes']:.1%})" if read.get("bytes") else "")
        )
        for reason, gone in sorted(about["dropped"].items(), key=lambda item: -item[1]["documents"]):
            lines.append(f"  {gone['documents']:>10,}  {gone['bytes'] / 1e6:>9,.2f} MB  {reason}")
        lines += [f"  {count:>10,}  replaced: {kind}" for kind, count in about["replaced"].items()]
    return "\n".join([*lines, f"digest {manifest['digest']}"])


def _count(about: dict[str, int]) -> str:
    return f"{about.get('documents', 0):,} documents, {about.get('bytes', 0) / 1e6:,.2f} MB"
