"""Hugging Face directories of every make: ids and text as `transformers` and `tokenizers` have them. Nothing is
downloaded: the small vocabularies are trained here. Run: pytest tests/test_tokenizer_directories.py"""

import json
import random
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptjax import cli
from gptjax.convert.tokenizer import tokenizer_spec, write_tokenizer
from gptjax.data.tokenizers import SPECIALS, load_tokenizer
from gptjax.data.tokenizers.byte_level import byte_names, fast_encoder
from gptjax.errors import UserError

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers", reason="needs the peers extra")
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

TEXTS = [
    "def f(x, y=12):\n    return {'a': [x for _ in range(y)]}  # naïve\r\n\t\tpass\n\n",
    "The quick brown fox jumps over the lazy dog; 3.14159 is not 2,71828. Größe, œuvre, 東京, привет 😀! we've\n",
] * 20
PARTS = ["the ", "quick", " fox", "hello", "othello", "12345", "3.14", "    ", "  ", " ", "\n", "\n\n", "\r\n", "\t"]
PARTS += [
    "'ll",
    "we've",
    "é",
    "e\u0301",
    "\u212b",
    "東京",
    "привет",
    "😀",
    "ß",
    "\0",
    "\u3000",
    "\u00a0",
    "ﬁ",
    "½",
    "İ",
]
PARTS += ["[PAD]", "<code>", "<l>", "<r>", "word", "<|endoftext|>", "<|system|>", "<|end_of_text|>", "_", "!?", "{}"]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def strings(count: int, parts: Iterable[str] = PARTS) -> list[str]:
    rng = random.Random(0)
    letters = [*map(chr, range(32, 0x180))]
    each = [*parts, *[None] * 8]
    return [
        "".join(rng.choice(each) or "".join(rng.choices(letters, k=3)) for _ in range(rng.randrange(1, 20)))
        for _ in range(count)
    ]


def save(folder: Path, library: Any = None, **config: Any) -> Path:
    """tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    if library is not None:
        library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return folder


def byte_level(specials: list[str], size: int = 420, **split: Any) -> Any:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | split))
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=specials, show_progress=False)
    library.train_from_iterator(TEXTS, how)
    return library


def gpt2(folder: Path) -> Path:
    """vocab.json and merges.txt alone."""
    folder.mkdir(parents=True)
    byte_level([]).model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocab | {"<|endoftext|>": len(vocab)}))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return folder


def extended(folder: Path) -> Path:
    """GPT-2's, with tokens that the config alone knows: of every flag, and one that is a word of the vocabulary."""
    first = len(json.loads((gpt2(folder) / "vocab.json").read_text()))
    flags = [
        ("[PAD]", {"special": True}),
        ("<code>", {}),
        ("    ", {"normalized": False}),
        ("<l>", {"lstrip": True}),
        ("<r>", {"rstrip": True}),
        ("word", {"single_word": True}),
        ("hello", {}),
    ]
    table = {str(first + i): {"content": name, **how} for i, (name, how) in enumerate(flags)}
    table[str(first - 1)] = {"content": "<|endoftext|>", "special": True}
    return save(folder, None, tokenizer_class="GPT2Tokenizer", pad_token="[PAD]", added_tokens_decoder=table)


def split_rule(folder: Path) -> Path:
    """As Llama 3 and Qwen: a rule of its own for words, whole words before merges, composed letters; beside it the
    files of GPT-2's form, as they are published."""
    library = byte_level(["<|begin|>", "<|end_of_text|>"], 500)
    library.model.ignore_merges = True
    rule = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([rule, plain])
    library.normalizer = normalizers.NFC()
    library.post_processor = processors.TemplateProcessing("<|begin|> $A", None, [("<|begin|>", 0)])
    folder.mkdir(parents=True)
    library.model.save(str(folder))
    return save(folder, library, tokenizer_class="PreTrainedTokenizerFast", eos_token="<|end_of_text|>")


def llama(folder: Path) -> Path:
    """As Llama 2: blanks as U+2581, one before every text, bytes for what the vocabulary lacks, no rule for words."""
    library = tokenizers.Tokenizer(models.BPE())
    writes = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    library.normalizer = normalizers.Sequence(writes)
    library.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    library.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learned = json.loads(library.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {name: i for i, name in enumerate([*names, *sorted(learned["vocab"], key=learned["vocab"].get)])}
    how: dict[str, Any] = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    library = tokenizers.Tokenizer(models.BPE(vocab, [tuple(pair) for pair in learned["merges"]], **how))
    library.normalizer = normalizers.Sequence(writes)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(steps)
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return save(folder, library, tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>")


def prefixed(folder: Path) -> Path:
    """A blank before every text, and </s> as the only end; the vocabulary is full to its last id."""
    library = byte_level(["</s>"], add_prefix_space=True)
    return save(folder, library, tokenizer_class="PreTrainedTokenizerFast", eos_token="</s>")


def unigram(folder: Path) -> Path:
    """Pieces by their likelihood, as T5; what it was saved with would cut and fill every text."""
    library = tokenizers.Tokenizer(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    names = ["<pad>", "</s>", "<unk>"]
    how = trainers.UnigramTrainer(vocab_size=150, special_tokens=names, unk_token="<unk>", show_progress=False)
    library.train_from_iterator(TEXTS, how)
    library.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    library.enable_truncation(5)
    library.enable_padding(pad_id=0, pad_token="<pad>", length=9)
    return save(folder, library, tokenizer_class="PreTrainedTokenizerFast", eos_token="</s>", pad_token="<pad>")


def words(folder: Path) -> Path:
    """As BERT: words in small letters, whose parts the library's own decoder joins."""
    library = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    how = trainers.WordPieceTrainer(vocab_size=200, special_tokens=names, show_progress=False)
    library.train_from_iterator(TEXTS, how)
    return save(folder, library, tokenizer_class="PreTrainedTokenizerFast", sep_token="[SEP]", unk_token="[UNK]")


MAKES: list[Callable[[Path], Path]] = [gpt2, extended, split_rule, llama, prefixed, unigram, words]
CHANGES = {
    "gpt2": "",
    "extended": "'<l>' takes the blanks beside it; '<r>' takes the blanks beside it",
    "split_rule": "normalises (NFC)",
    "llama": "takes U+2581 for a blank",
    "prefixed": "puts a blank before it",
    "unigram": "moves or drops blanks; takes U+2581 for a blank; composes letters; loses letters; "
    "takes words for its unknown or its bytes",
    "words": "normalises (BertNormalizer); moves or drops blanks; takes U+2581 for a blank; loses letters; "
    "takes words for its unknown or its bytes",
}


@pytest.fixture(scope="session", params=MAKES, ids=lambda make: make.__name__)
def make(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    name = request.param.__name__
    return name, request.param(tmp_path_factory.mktemp("tokenizers") / name)


def peer_of(folder: Path) -> Callable[[str], list[int]]:
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    return lambda text: peer(text, add_special_tokens=False, split_special_tokens=True, truncation=False,
                             padding=False).input_ids  # fmt: skip


def test_two_thousand_strings_have_the_ids_of_transformers(make: tuple[str, Path]) -> None:
    folder = make[1]
    ours, peer = load_tokenizer(str(folder)), peer_of(folder)
    reserved = set(ours.special.values())
    for text in strings(2000):
        ids = ours.encode(text)
        assert ids.dtype == np.int32 and reserved.isdisjoint(ids.tolist())
        assert ids.tolist() == peer(text), text


def test_text_comes_back(make: tuple[str, Path]) -> None:
    """Exactly, but for what `changes` says; where letters are lost, as `transformers` shows it."""
    name, folder = make
    ours, peer = load_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    assert (ours.changes, ours.lossless) == (CHANGES[name], name == "gpt2")
    for text in strings(500, [part for part in PARTS if part not in ("<l>", "<r>")]):
        ids = ours.encode(text)
        shown = ours.decode(ids)
        if name == "split_rule":
            assert shown == unicodedata.normalize("NFC", text)
        elif name == "prefixed":
            assert shown in (text, " " + text)
        elif name in ("unigram", "words"):
            expected = peer.decode(ids, skip_special_tokens=name == "unigram", clean_up_tokenization_spaces=False)
            assert shown.lstrip(" ") == expected.lstrip(" ")
        else:
            assert shown == text
            assert ours.token_bytes()[ids].sum() == len(text.encode()) + (name == "llama")


def test_half_a_character_joins_its_other_half(make: tuple[str, Path]) -> None:
    name, folder = make
    ours = load_tokenizer(str(folder))
    if name in ("unigram", "words"):
        pytest.skip("knows no bytes")
    ids = ours.encode("a🦊").tolist()
    halves = [ours.decode(ids[:-1]), ours.decode(ids[-1:], inside=True)]
    assert "\ufffd" in halves[0] and "\ufffd" in halves[1] and ours.decode(ids).strip() == "a🦊"


def test_a_blank_that_is_put_first_is_no_part_of_a_continuation(tmp_path: Path) -> None:
    ours = load_tokenizer(str(llama(tmp_path / "a")))
    ids = ours.encode("the quick").tolist()
    assert [ours.pieces[i] for i in ids] == [b" the", b" quick"]
    assert ours.decode(ids) == "the quick" and ours.decode(ids[1:], inside=True) == " quick"


def test_the_same_tokenizer_out_of_a_run(make: tuple[str, Path], tmp_path: Path) -> None:
    ours = load_tokenizer(f"gpt2:{make[1]}")
    again = load_tokenizer(ours.save(tmp_path / "run"))
    assert (again.pieces, again.special, again.eot, again.begin) == (
        ours.pieces,
        ours.special,
        ours.eot,
        ours.begin,
    )
    assert again.files == ours.files and again.changes == ours.changes
    assert all(again.encode(text).tolist() == ours.encode(text).tolist() for text in strings(50))


def test_the_same_tokenizer_out_of_convert(make: tuple[str, Path], tmp_path: Path) -> None:
    """A model without room for the chat tokens has the files as they were; with it, transformers knows them too."""
    folder = make[1]
    ours, peer = load_tokenizer(str(folder)), peer_of(folder)
    for size in (ours.least_vocab_size, ours.vocab_size, ours.vocab_size + 40):
        out = tmp_path / str(size)
        out.mkdir()
        (out / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
        fitted = ours.fit(size)
        assert write_tokenizer(fitted, out, size, 64) == ""
        if size == ours.own_size:  # all but the one that has no end of its own
            assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != "config.json"} == ours.files
        theirs, again = transformers.AutoTokenizer.from_pretrained(out), load_tokenizer(tokenizer_spec(out))
        assert again.fit(size).special == fitted.special and again.eot == ours.eot
        for special, i in fitted.special.items():
            assert theirs.convert_tokens_to_ids(special) == i
        after = peer_of(out)
        for text in strings(100):
            assert again.encode(text).tolist() == ours.encode(text).tolist() == after(text) == peer(text)


def test_added_tokens_are_whole_and_ours_come_after(tmp_path: Path) -> None:
    folder = extended(tmp_path / "a")
    ours, peer = load_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    pad, code, blanks = peer.convert_tokens_to_ids(["[PAD]", "<code>", "    "])
    assert ours.encode("x<code>    y").tolist()[1:3] == [code, blanks] and pad not in ours.encode("[PAD]")
    assert ours.decode([pad, code, blanks]) == "[PAD]<code>    "
    assert ours.own_size == len(peer) and [ours.special[name] for name in SPECIALS[1:]] == [
        *range(len(peer), len(peer) + 4)
    ]
    assert ours.token_bytes()[[pad, code, blanks]].tolist() == [0, 6, 4]


def test_the_rules_of_tokenizer_json_win_over_vocabulary_and_merges(tmp_path: Path) -> None:
    folder = split_rule(tmp_path / "a")
    text = "".join(TEXTS[:2])
    right = load_tokenizer(str(folder)).encode(text)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert len(right) != len(load_tokenizer(str(folder)).encode(text))


def test_a_directory_ends_text_with_its_own_token(tmp_path: Path) -> None:
    ours = load_tokenizer(str(prefixed(tmp_path / "a")))
    assert ours.eot == 0 and "<|endoftext|>" not in ours.special
    fitted = ours.fit(ours.own_size)
    assert fitted.special == {"</s>": 0} and fitted.absent == SPECIALS[1:]
    assert fitted.notes[-1] == "the model has no room for <|system|> <|user|> <|assistant|> <|end|>"
    with pytest.raises(ValueError, match="too few"):
        ours.fit(ours.own_size - 1)


@pytest.mark.parametrize("form", ["string", "object", "map", "model"])
def test_every_file_that_may_name_the_end(tmp_path: Path, form: str) -> None:
    folder = save(tmp_path, byte_level(["<pad>", "</s>", "<|endoftext|>"]), tokenizer_class="PreTrainedTokenizerFast")
    end: Any = {"content": "</s>", "lstrip": False, "__type": "AddedToken"} if form == "object" else "</s>"
    if form in ("string", "object"):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    elif form == "map":
        (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    else:
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "eos_token_id": 1}))
    ours = load_tokenizer(str(folder))
    assert ours.eot == 1 and ours.special["<|endoftext|>"] == 2
    assert load_tokenizer(ours.save(tmp_path / "run")).eot == 1


def test_older_tables_of_added_tokens(tmp_path: Path) -> None:
    folder = gpt2(tmp_path / "a")
    size = len(json.loads((folder / "vocab.json").read_text()))
    (folder / "added_tokens.json").write_text(json.dumps({"<a>": size + 1, "[PAD]": size}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    ours, peer = load_tokenizer(str(folder)), peer_of(folder)
    assert ours.encode("x<a>[PAD]").tolist() == peer("x<a>[PAD]") and ours.special["[PAD]"] == size
    assert size + 1 in ours.encode("x<a>")


@pytest.mark.parametrize("prefix", [True, False])
def test_gpt2s_class_says_whether_a_blank_comes_first(tmp_path: Path, prefix: bool) -> None:
    how = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": prefix}
    folder = save(tmp_path / "a", byte_level(["<|endoftext|>"], add_prefix_space=not prefix), **how)
    pairs = gpt2(tmp_path / "b")
    save(pairs, None, **how)
    for each in (folder, pairs):
        assert load_tokenizer(str(each)).encode("the fox").tolist() == peer_of(each)("the fox")
        assert load_tokenizer(str(each)).lossless != prefix


@pytest.mark.parametrize("make", [split_rule, llama, unigram, gpt2])
def test_what_comes_before_a_prompt(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    folder = make(tmp_path / "a")
    ours, peer = load_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    full = peer("the fox", truncation=False, padding=False).input_ids
    assert ours.prompt("the fox").tolist() == full[: len(full) - (make is unigram)]
    assert ours.prompt("the fox").dtype == np.int32


def test_a_model_that_takes_a_reserved_name_for_a_word(tmp_path: Path) -> None:
    """Likelihoods make </s> of a text that spells it, whatever the library is told; here it is letters."""
    ours = load_tokenizer(str(unigram(tmp_path)))
    ids = ours.encode("the </s> fox</s>")
    assert 1 in peer_of(tmp_path)("the </s> fox</s>") and 1 not in ids and 0 not in ours.encode("<pad>")
    assert ours.decode(ours.encode("the fox")) == "the fox" and len(ids) > len(ours.encode("the  fox"))


def test_ids_with_gaps(tmp_path: Path) -> None:
    folder = gpt2(tmp_path / "a")
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({token: 2 * i for token, i in vocab.items()}))
    ours, peer = load_tokenizer(str(folder)), peer_of(folder)
    text = "def f(the, fox): hello"
    assert ours.encode(text).tolist() == peer(text) and ours.decode(ours.encode(text)) == text
    assert ours.decode([1, 3]) == "" and not ours.possible[[1, 3]].any() and ours.possible[0]
    assert min(ours.special[name] for name in SPECIALS[1:]) > 2 * (len(vocab) - 1)


def test_a_larger_vocabulary_is_never_drawn_and_shows_as_nothing(tmp_path: Path) -> None:
    ours = load_tokenizer(str(gpt2(tmp_path / "a")))
    fitted = ours.fit(ours.vocab_size + 43)
    assert fitted.vocab_size == ours.vocab_size + 43 == len(fitted.token_bytes()) and fitted.absent == ()
    assert fitted.decode([5, ours.vocab_size + 42]) == ours.decode([5])
    assert fitted.possible.sum() == ours.vocab_size
    for wrong in (-1, fitted.vocab_size):
        with pytest.raises(IndexError):
            fitted.decode([wrong])


def test_tiktoken_is_used_only_where_it_is_proved_equal(tmp_path: Path) -> None:
    """Each of these has a text on which tiktoken, given the same files, would differ from the library."""
    names = pre_tokenizers.ByteLevel.alphabet()
    vocab = {name: i for i, name in enumerate(sorted(names))}

    def encoder(merges: list[tuple[str, str]], **more: Any) -> Any:
        ids = vocab | {a + b: 256 + i for i, (a, b) in enumerate(merges)}
        library = tokenizers.Tokenizer(models.BPE(ids, merges, **more))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return fast_encoder(json.loads(library.to_str()), library.model.tokenize)

    assert encoder([("a", "b"), ("ab", "c")]) is not None
    assert encoder([("a", "b"), ("b", "c"), ("a", "bc")]) is None  # abc is never made: ab comes first
    assert encoder([("a", "b")], ignore_merges=True) is None and encoder([("a", "b")], dropout=0.1) is None
    ours = load_tokenizer(str(gpt2(tmp_path / "a")))
    assert ours.lossless


def test_tiktoken_and_the_library_know_the_same_letters_digits_and_blanks(tmp_path: Path) -> None:
    """Every character before a letter, a digit and a mark: the last byte of the character joins what follows if
    GPT-2's rule puts both into one word."""
    names = byte_names()
    merges = [(names[last], then) for then in "a1!" for last in range(0x80, 0xC0)]
    vocab = {token: i for i, token in enumerate([*names, *(a + b for a, b in merges)])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("\n".join(map(" ".join, merges)))
    ours, library = load_tokenizer(str(tmp_path)), tokenizers.Tokenizer(models.BPE(vocab, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert fast_encoder(json.loads(library.to_str()), library.model.tokenize)
    characters = [chr(c) for c in range(0x80, 0x3FFFF) if not 0xD800 <= c < 0xE000]
    for start in range(0, len(characters), 20_000):
        text = "".join(f"{c}a{c}1{c}!" for c in characters[start : start + 20_000])
        assert ours.encode(text).tolist() == library.encode(text).ids


def broken(folder: Path, **texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"tokenizer": "{"}, "tokenizer.json: not what the tokenizers library reads"),
        ({"tokenizer": "[]"}, "tokenizer.json: not what the tokenizers library reads"),
        ({"tokenizer_config": "[]"}, "tokenizer_config.json: not a JSON object"),
        ({"special_tokens_map": "{"}, "special_tokens_map.json: not whole JSON"),
        ({"tokenizer_config": '{"added_tokens_decoder": {"x": {"content": "a"}}}'}, "not the form of added tokens"),
        ({"tokenizer_config": '{"added_tokens_decoder": {"9999": {"content": "[PAD]"}}}'}, "they do not agree"),
        ({"tokenizer_config": '{"tokenizer_class": "Qwen2Tokenizer"}'}, "save its tokenizer.json with transformers"),
        ({"vocab": '{"a": 0, "b": 0}'}, "no token for 25. of the 256 bytes"),
    ],
)
def test_broken_directories_are_refused_in_a_line(tmp_path: Path, texts: dict[str, str], message: str) -> None:
    folder = broken(gpt2(tmp_path / "a"), **texts)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(str(folder))
    assert str(error.value).startswith(f"data.tokenizer = {folder}: ") and "\n" not in str(error.value)


def test_lone_surrogates_are_refused(make: tuple[str, Path]) -> None:
    with pytest.raises(UnicodeEncodeError):
        load_tokenizer(str(make[1])).encode("half a pair \ud800")


CHANGED = "it changes text: puts a blank before it"


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (400, [CHANGED]),
        (383, [CHANGED, "the model has no room for <|system|> <|user|> <|assistant|> <|end|>"]),
        (300, ["WRONG: model.vocab_size = 300: the tokenizer", "needs 383; nearest 383"]),
    ],
)
def test_a_dry_run_says_what_becomes_of_the_tokenizer(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int, said: list[str]
) -> None:
    folder = prefixed(tmp_path / "a")
    cli.run(["train", file, "--dry-run", "--data.tokenizer", str(folder), "--model.vocab_size", str(size)])
    out = capsys.readouterr().out
    assert all(clause in out for clause in said) and ("no room" in out) == (size == 383)
