from dataclasses import dataclass
import numpy as np
NAMES=("[PAD]","[CLS]","[SEP]","[MASK]")
@dataclass(frozen=True)
class Marks:
    cls:int; sep:int; mask:int; pad:int
    double_sep: bool=False
    types: bool=True
def marks(t):
    return Marks(*(t.special[n] for n in ("[CLS]","[SEP]","[MASK]","[PAD]")))
def word_starts(t):
    space=np.array([p[:1]==b" " or p[:1]==b"\n" for p in t.pieces])
    def f(ids):
        s=space[ids]; 
        return np.append(True,s[:-1]) if len(ids) and t.vocab_size<400 else s
    return f
def sentence_ends(t):
    e=np.array([p.strip()[-1:] in (b".",b"!",b"?") or b"\n" in p for p in t.pieces])
    return lambda ids: e[ids]
def sentinels(t): return np.array([t.special[f"<extra_id_{i}>"] for i in range(100)],np.int32)
def modes(t): return None
