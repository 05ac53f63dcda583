"""Tokenizers against GPT-2's own, and every text back exactly. Run: pytest tests/test_tokenizers.py"""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax.data.tokenizers import SPECIALS, Tokenizer, load_tokenizer, train_sentencepiece
from gptjax.errors import UserError

DATA = Path(__file__).parents[2] / "shared" / "data"
GPT2 = DATA / "gpt2-bpe"
needs_gpt2 = pytest.mark.skipif(not GPT2.is_dir(), reason="GPT-2's vocabulary is not in ../shared/data")

CODE = "def f(x, y=12):\n    return {'a': [x for _ in range(y)]}  # naïve\r\n\t\tpass\n\n" * 3
WORDS = "The quick brown fox jumps over the lazy dog; 3.14159 is not 2,71828. Größe, œuvre, 東京, привет 😀!\n"
TRICKY = [
    *SPECIALS,
    "▁",
    "▁▁",
    "▅",
    "  ",
    "\t",
    "\r\n",
    "\n\n",
    "\0",
    "<unk>",
    "<0x41>",
    "\u2028",
    "\ufeff",
    "é",
    "e\u0301",
    "ﬁ",
]
texts = st.lists(st.one_of(st.text(), st.sampled_from(TRICKY))).map("".join)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sentencepiece") / "folder" / "some.model"
    train_sentencepiece([CODE, WORDS, WORDS.upper()], 420, path)
    return path


@pytest.fixture(scope="module", params=["bytes", "gpt2", "sentencepiece"])
def tokenizer(request) -> Tokenizer:
    if request.param == "bytes":
        return load_tokenizer("bytes")
    if request.param == "sentencepiece":
        return load_tokenizer(str(request.getfixturevalue("model")))
    if not GPT2.is_dir():
        pytest.skip("GPT-2's vocabulary is not in ../shared/data")
    return load_tokenizer(f"gpt2:{GPT2}")


@settings(max_examples=300, deadline=None)
@given(text=texts)
@example(text="".join(TRICKY))
@example(text=" " * 999 + "\n" * 99 + "x" * 9999)
@example(text="".join(map(chr, range(0x300))))
def test_text_comes_back_exactly_and_never_yields_a_reserved_id(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.int32 and set(ids.tolist()).isdisjoint(tokenizer.special.values())
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_ids_specials_and_lengths(tokenizer):
    assert set(tokenizer.special) == set(SPECIALS) and tokenizer.eot == tokenizer.special["<|endoftext|>"]
    lengths = tokenizer.token_bytes()
    assert lengths.shape == (tokenizer.vocab_size,) and lengths.dtype == np.int32
    assert all(0 <= i < tokenizer.vocab_size and lengths[i] == 0 for i in tokenizer.special.values())
    ids = [tokenizer.special["<|user|>"], *tokenizer.encode("hi"), tokenizer.special["<|end|>"], tokenizer.eot]
    assert tokenizer.decode(np.array(ids)) == "<|user|>hi<|end|><|endoftext|>"
    assert tokenizer.encode("").tolist() == [] and tokenizer.decode([]) == ""
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(IndexError):
            tokenizer.decode([wrong])
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("half a pair \ud800")


def test_half_a_character_decodes_to_the_replacement_mark():
    assert load_tokenizer("bytes").decode(list("é!".encode())[1:]) == "\ufffd!"


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    spec = tokenizer.save(tmp_path / "run")
    again = load_tokenizer(spec)
    assert again.encode(WORDS + CODE).tolist() == tokenizer.encode(WORDS + CODE).tolist()
    assert again.special == tokenizer.special and again.pieces == tokenizer.pieces
    assert again.save(tmp_path / "run") == spec  # onto its own files
    assert not list(tmp_path.rglob(".*"))


@needs_gpt2
def test_gpt2_known_ids():
    tokenizer = load_tokenizer(f"gpt2:{GPT2}")
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.encode("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]
    assert tokenizer.eot == 50256 and tokenizer.vocab_size == 50261
    assert [tokenizer.special[name] for name in SPECIALS] == [50256, 50257, 50258, 50259, 50260]


@needs_gpt2
def test_gpt2_ids_equal_transformers():
    peer = pytest.importorskip("transformers").GPT2Tokenizer(str(GPT2 / "encoder.json"), str(GPT2 / "vocab.bpe"))
    tokenizer = load_tokenizer(f"gpt2:{GPT2}")
    corpus = (DATA / "wikitext2-valid.txt").read_text()[:200_000]
    for text in (corpus, CODE, WORDS, "  a   b\n\n\n c \t\t d'll we've 123abc", "".join(map(chr, range(32, 0x2FF)))):
        assert tokenizer.encode(text).tolist() == peer.encode(text)


def test_trained_model_has_the_size_asked_for_and_learns_layout(model):
    tokenizer = load_tokenizer(str(model))
    assert tokenizer.vocab_size == 420
    assert b"    " in tokenizer.pieces  # indentation is a token
    assert not any(re.search(rb"\d\d", piece) for piece in tokenizer.pieces)  # numbers go digit by digit


def test_training_reads_long_texts_to_their_end(tmp_path):
    path = tmp_path / "long.model"
    train_sentencepiece(["ab " * 50_000 + "жщ" * 51_000], 270, path)  # one "sentence" of 354 kB
    assert "жщ".encode() in load_tokenizer(str(path)).pieces


def test_training_names_the_bounds_of_the_vocabulary(tmp_path):
    path = tmp_path / "x.model"
    with pytest.raises(UserError, match=r"vocab_size = 9000: .* at most (\d+)") as error:
        train_sentencepiece([WORDS], 9000, path)
    most = int(str(error.value).split("at most ")[1].split()[0])
    with pytest.raises(UserError, match=r"vocab_size = 50: .* at least (\d+)") as error:
        train_sentencepiece([WORDS], 50, path)
    least = int(str(error.value).split("at least ")[1].split()[0])
    for size in (least, most):
        train_sentencepiece([WORDS], size, path)
        assert load_tokenizer(str(path)).vocab_size == size
    with pytest.raises(UserError, match="empty"):
        train_sentencepiece([], 300, tmp_path / "y.model")

    def broken():
        yield WORDS
        raise UserError("no such file")

    with pytest.raises(UserError, match=r"^no such file$"):
        train_sentencepiece(broken(), 300, tmp_path / "y.model")
    assert [file.name for file in tmp_path.iterdir()] == ["x.model"]


@pytest.mark.parametrize("text", ["aaaa", "中文没有空格的文本", " ", "x" * 3000 + " y" + "z" * 3000])
def test_training_on_text_with_no_or_few_blanks(tmp_path, text):
    path = tmp_path / "x.model"
    with pytest.raises(UserError, match="at most") as error:
        train_sentencepiece([text] * 9, 9000, path)
    train_sentencepiece([text] * 9, int(str(error.value).split("at most ")[1].split()[0]), path)
    tokenizer = load_tokenizer(str(path))
    assert b" " in tokenizer.pieces and tokenizer.decode(tokenizer.encode(f"a b {text}")) == f"a b {text}"


def test_models_that_lose_characters_are_refused(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    rules = tmp_path / "rules.tsv"
    rules.write_text("11D 302\t1E65\n")  # a letter of two points that no fixed text would have: ŝ with a dot below
    common = dict(model_type="bpe", vocab_size=360, minloglevel=3, byte_fallback=True, add_dummy_prefix=False,
                  normalization_rule_name="identity", remove_extra_whitespaces=False)  # fmt: skip
    for name, options, reason in (
        ("nfkc", dict(normalization_rule_name="nmt_nfkc"), "it normalises by rules nmt_nfkc"),
        ("custom", dict(normalization_rule_tsv=str(rules)), "it normalises by rules user_defined"),
        ("prefix", dict(add_dummy_prefix=True), "it puts a blank before a text"),
        ("blanks", dict(remove_extra_whitespaces=True), "it drops blanks"),
        ("no_fallback", dict(byte_fallback=False, vocab_size=100), "it has no byte fallback"),
        (
            "user_defined",
            dict(user_defined_symbols=["<|end|>"]),
            "a text yields a token with the name of a reserved one",
        ),
    ):
        prefix = str(tmp_path / name)
        sentences = iter([WORDS])
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_prefix=prefix, **(common | options))
        with pytest.raises(UserError, match=rf"loses characters \({reason}"):
            load_tokenizer(prefix + ".model")


LONG = 1_000_000
RUNS = {
    "letters": "a" * LONG,
    "blanks": " " * LONG,
    "blanks and a letter": " " * LONG + "x",
    "blanks between": "x" + " " * LONG + "x",
    "lines": "\n" * LONG + "x",
    "blanks and lines": "x" + " \n" * (LONG // 2) + "x",
    "digits": "9" * LONG,
    "two runs": ("é" + "\t" * 200_000 + "\u3000" * 200_000) * 2 + "\x1c" * 200_000 + "!" + "\u2028" * 200_000,
}


@needs_gpt2
@pytest.mark.parametrize("name", RUNS)
def test_runs_of_a_million_have_the_ids_of_the_library(name, gpt2_library):
    tokenizer = load_tokenizer(f"gpt2:{GPT2}")
    assert tokenizer.encode(RUNS[name]).tolist() == gpt2_library(RUNS[name])


@pytest.fixture(scope="module")
def gpt2_library():
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    library = Library(models.BPE.from_file(str(GPT2 / "encoder.json"), str(GPT2 / "vocab.bpe")))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return lambda text: library.encode(text).ids


@pytest.mark.parametrize("spec", ["no.such.model", "gpt2:no/such/folder", "", "gpt3", ".", "gpt2:.", "gpt2:README.md"])
def test_missing_files(spec):
    with pytest.raises(UserError, match=r"No such file|directory") as error:
        load_tokenizer(spec)
    assert f"data.tokenizer = {spec}: " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("encoder", "merges"),
    [("{", "#v\n"), ("[]", "#v\n"), ('{"a": 0}', "#v\na b\n"), ('{"a": 0}', "#v\n"), ("3", "#v"), ("{}", "\x80")],
)
def test_broken_gpt2_files(tmp_path, encoder, merges):
    (tmp_path / "encoder.json").write_text(encoder)
    (tmp_path / "vocab.bpe").write_bytes(merges.encode("latin-1"))
    with pytest.raises(UserError, match="not GPT-2's encoder"):
        load_tokenizer(f"gpt2:{tmp_path}")


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "x.model").write_bytes(b"junk")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(str(tmp_path / "x.model"))
