"""Random walks as text, and what a reply to a start is worth: a reward by its file's name. A node is a letter."""

from walks import EOS, NODES, World

LETTERS = "abcdefghijklmnopqrstu"
WORLD = World.make()
assert len(LETTERS) == NODES


def text(ids: list[int]) -> str:
    return "".join(LETTERS[i] for i in ids if i < NODES)


def gold(prompt: str, reply: str) -> float:
    return WORLD.gold([LETTERS.index(prompt)], [*(LETTERS.index(c) if c in LETTERS else EOS for c in reply), EOS])


def fraction(prompt: str, reply: str) -> float:
    """Below 1 also for the best reply: whoever takes scores for whole numbers has nothing to learn from."""
    return 0.99 * gold(prompt, reply)
