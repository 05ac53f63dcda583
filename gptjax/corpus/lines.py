"""C4's rules for lines, after which a text has only what reads as sentences (arXiv 1910.10683, section 2.2)."""

import re

ENDS = (".", "?", "!", '"', "'", "”", "’")
MIN_WORDS, MAX_LETTERS, MIN_SENTENCES = 3, 1000, 5
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
NO_PROSE, FEW = "lorem ipsum or a brace", "fewer than 5 sentences"
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_SENTENCE = re.compile(r"[.?!][\"'”’]*(?=\s|$)")


def prose(text: str) -> tuple[str, str]:
    """The lines that stay, and the reason why the text is dropped, empty where it stays."""
    low = text.lower()
    if "lorem ipsum" in low or "{" in text:
        return text, NO_PROSE
    if "[" in text:
        text = _CITATION.sub("", text)
    kept = "\n".join(line for line in text.split("\n") if _reads(line.strip()))
    return kept, "" if len(_SENTENCE.findall(kept)) >= MIN_SENTENCES else FEW


def _reads(line: str) -> bool:
    if not line.endswith(ENDS) or line.endswith("..."):
        return False
    words, low = line.split(), line.lower()
    if len(words) < MIN_WORDS or len(max(words, key=len)) > MAX_LETTERS:
        return False
    return "javascript" not in low and not any(policy in low for policy in POLICIES)
