"""What Orbax writes beside the arrays of a checkpoint: two kinds of JSON files, which have no checksum of their own."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

TREE, SHARDS = "_METADATA", "array_metadatas"


def tree(state: Path) -> dict[str, Any]:
    """What Orbax says of the arrays in a folder."""
    return dict(json.loads((state / TREE).read_bytes()))


def misdescribed(state: Path, names: Iterable[str]) -> str:
    """The first of these files that does not tell of the arrays with these names; empty where all do.

    Orbax trusts them: what it raises of one with a bit changed is whatever comes of it first, such as a KeyError.
    """
    wanted = set(names)
    judged: list[tuple[Path, Callable[[Any, set[str]], bool]]] = [(state / TREE, _is_tree)]
    judged += [(path, _are_shards) for path in sorted((state / SHARDS).glob("*"))]
    return next((str(path.relative_to(state.parent)) for path, right in judged if not _holds(path, right, wanted)), "")


def _holds(path: Path, right: Callable[[Any, set[str]], bool], names: set[str]) -> bool:
    try:
        return right(json.loads(path.read_bytes()), names)
    except (ValueError, LookupError, TypeError, AttributeError):
        return False


def _is_tree(told: Any, names: set[str]) -> bool:
    """Each place in the tree is there twice: as the name of an entry and, part by part, in it."""
    found = set()
    for name, entry in told["tree_metadata"].items():
        parts, value = entry["key_metadata"], entry["value_metadata"]
        if name != str(tuple(part["key"] for part in parts)) or any(part["key_type"] not in (1, 2) for part in parts):
            return False
        if value["value_type"] and not value["skip_deserialize"]:  # what is skipped is an empty place
            found.add("/".join(part["key"] for part in parts))
    return found == names


def _are_shards(told: Any, names: set[str]) -> bool:
    known = {name.replace("/", ".") for name in names}
    each = [entry["array_metadata"] for entry in told["array_metadatas"]]
    return all(
        about["param_name"] in known and all(isinstance(about[shape], list) for shape in ("write_shape", "chunk_shape"))
        for about in each
    )
