"""Conversations to ids and masks, against `apply_chat_template` of transformers on what is exported. Run: pytest
tests/test_chat.py"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax.config import Config
from gptjax.convert.tokenizer import tokenizer_spec, write_tokenizer
from gptjax.data.chat import ROLES, Message, Rendered, chat_format, flaw, is_chat, require_no_other, with_chat
from gptjax.data.tokenizers import SPECIALS, Tokenizer, load_tokenizer, train_sentencepiece
from gptjax.errors import UserError
from gptjax.train.run import fill_run, saved_tokenizer

CHAT = SPECIALS[1:]
TEXT = "The quick brown fox jumps over the lazy dog; def f(x):\n    return {'a': x}\n  naïve Größe 東京 😀 we've\n"
TEXTS = [TEXT] * 30


def messages(*contents: str, system: str | None = None) -> list[Message]:
    first = [] if system is None else [Message("system", system)]
    return first + [Message(ROLES[1 + i % 2], content) for i, content in enumerate(contents)]


TALKS = {
    "one turn": messages("hello", "The quick fox"),
    "a system turn": messages("hello", "hi", system="Be brief."),
    "several turns": messages("a", "b", "the dog", "def f(x):\n    return x", "b", "the end"),
    "blanks": messages("  a ", "  b  ", " c", " d", system=" \n e\t"),
    "newlines": messages("\n\na\n", "\nb\n\n", "\r\nc", "\n\n\nd\r\n", system="\ne\n"),
    "unicode": messages("東京, Größe", "naïve 😀", "e\u0301 ½", "привет\u2028\u3000x\ufeff", system="œuvre"),
    "jinja": messages("{{ 1 + 1 }} {% endfor %}", "{# none #} {%- if a -%}", system="{{- messages -}}"),
    "marks": messages("<i> [INST] <|user", "</i> <|end", system="|end|> < <| <|"),
}


def folder_of(folder: Path, library: Any, **config: Any) -> Path:
    folder.mkdir(parents=True)
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config))
    return folder


def byte_level(specials: list[str], **how: Any) -> Any:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | how))
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = {"vocab_size": 420, "initial_alphabet": alphabet, "special_tokens": specials, "show_progress": False}
    library.train_from_iterator(TEXTS, trainers.BpeTrainer(**how))
    return library


def plain(folder: Path) -> Path:
    """A directory with a template of its own in its config."""
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    library = byte_level(["</s>", "<|im_start|>", "<|im_end|>"])
    return folder_of(folder, library, eos_token="</s>", chat_template=template)


def begun(folder: Path) -> Path:
    """What comes before every text is in its rules."""
    from tokenizers import processors

    library = byte_level(["<｜begin\u2581of|>", "</s>"])
    begin = ("<｜begin\u2581of|>", 0)
    library.post_processor = processors.TemplateProcessing(f"{begin[0]} $A", None, [begin])
    return folder_of(folder, library, eos_token="</s>", bos_token=begin[0])


def trimmed(folder: Path) -> Path:
    """As GPT-2's and Llama 3's: where a token is in a text is said without the blank before it."""
    from tokenizers import processors

    library = byte_level(["</s>"])
    library.post_processor = processors.ByteLevel(trim_offsets=True)
    return folder_of(folder, library, eos_token="</s>")


def unnamed(folder: Path) -> Path:
    """The chat tokens are in the vocabulary, and no file says that they are tokens."""
    folder.mkdir(parents=True)
    byte_level([]).model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    names = (*CHAT[2:], *CHAT[:2], "<|endoftext|>")
    (folder / "vocab.json").write_text(json.dumps(vocab | {name: len(vocab) + i for i, name in enumerate(names)}))
    return folder


def taking(folder: Path) -> Path:
    """As Phi-3: the chat tokens are the publisher's own, take the blanks after them, and one is not called special."""
    from tokenizers import AddedToken

    library = byte_level(["</s>"])
    library.add_special_tokens([AddedToken(name, rstrip=True) for name in ("<|end|>", "<|user|>", "<|assistant|>")])
    library.add_tokens([AddedToken("<|system|>", special=False)])
    return folder_of(folder, library, eos_token="</s>")


def prefixed(folder: Path) -> Path:
    """A blank before every text, in the middle of a conversation too."""
    return folder_of(folder, byte_level(["</s>"], add_prefix_space=True), eos_token="</s>")


def first(folder: Path) -> Path:
    """As newer Llamas and Mistrals: a blank before a whole text alone."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE(unk_token="<unk>", byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    library.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=names, show_progress=False))
    rules = json.loads(library.to_str())
    rules["added_tokens"] = rules["added_tokens"][:3]
    return folder_of(folder, Library.from_str(json.dumps(rules)), eos_token="</s>", bos_token="<s>")


def sentencepiece(folder: Path) -> Path:
    train_sentencepiece(TEXTS, 400, folder / "tokenizer.model")
    return folder


MAKES: list[Callable[[Path], Path] | str] = [
    "bytes",
    "gpt2",
    sentencepiece,
    plain,
    begun,
    trimmed,
    unnamed,
    taking,
    prefixed,
    first,
]


@pytest.fixture(scope="module", params=MAKES, ids=lambda make: make if isinstance(make, str) else make.__name__)
def tokenizer(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "bytes":
        return load_tokenizer("bytes")
    if request.param == "gpt2":
        return load_tokenizer(f"gpt2:{request.getfixturevalue('shared') / 'gpt2-bpe'}")
    return load_tokenizer(str(request.param(tmp_path_factory.mktemp("tokenizer") / "of a publisher")))


@pytest.fixture(scope="module")
def peer(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer of what we export."""
    transformers = pytest.importorskip("transformers", reason="needs the peers extra")
    folder = tmp_path_factory.mktemp("exported")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    write_tokenizer(with_chat(tokenizer), folder, tokenizer.vocab_size, 64)
    again = load_tokenizer(tokenizer_spec(folder))
    assert is_chat(again)
    assert [again.special[name] for name in CHAT] == [tokenizer.special[name] for name in CHAT]
    return transformers.AutoTokenizer.from_pretrained(folder)


def as_dicts(talk: list[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in talk]


@pytest.mark.parametrize("name", TALKS)
def test_ids_and_mask_are_those_of_transformers(tokenizer: Tokenizer, peer: Any, name: str) -> None:
    talk, chat = TALKS[name], chat_format(tokenizer)
    ours = chat.render(talk)
    theirs = peer.apply_chat_template(as_dicts(talk), return_dict=True, return_assistant_tokens_mask=True)
    assert ours.ids.dtype == np.int32 and ours.trained.dtype == np.bool_
    assert ours.ids.tolist() == theirs["input_ids"]
    assert ours.trained.astype(int).tolist() == theirs["assistant_masks"]
    asked = peer.apply_chat_template(as_dicts(talk[:-1]), add_generation_prompt=True, return_dict=False)
    assert chat.prompt(talk[:-1]).tolist() == asked == ours.ids.tolist()[: len(asked)]
    assert chat.prompt(talk[:-1]).dtype == np.int32


def test_the_chat_tokens_are_special_in_transformers(tokenizer: Tokenizer, peer: Any) -> None:
    assert [peer.convert_tokens_to_ids(name) for name in CHAT] == [tokenizer.special[name] for name in CHAT]
    assert {*CHAT} <= {*peer.all_special_tokens}
    ids = chat_format(tokenizer).render(TALKS["one turn"]).ids
    assert peer.decode(ids, skip_special_tokens=True).replace(" ", "") == "helloThequickfox"


WRONG: dict[str, tuple[list[Message], bool, str]] = {
    "none": ([], True, "no message"),
    "none to answer": ([], False, "no message"),
    "user twice": ([*messages("a"), *messages("b")], True, "roles out of order: user after user"),
    "assistant first": ([Message("assistant", "a")], True, "roles out of order: assistant first"),
    "assistant after system": (
        [Message("system", "s"), Message("assistant", "a")],
        True,
        "roles out of order: assistant after system",
    ),
    "system late": ([*messages("a", "b"), Message("system", "s")], True, "roles out of order: system after assistant"),
    "system twice": ([Message("system", "s")] * 2, False, "roles out of order: system after system"),
    "unknown": ([*messages("a"), Message("asistant", "b")], True, "unknown role asistant, nearest assistant"),
    "unknown in two lines": ([Message("a\nb", "b")], True, "unknown role 'a\\nb', nearest "),
    "no role": ([Message("", "b")], True, "unknown role '', nearest "),
    "empty": (messages("a", ""), True, "empty message"),
    "blank": (messages(" \n\t\u3000", "a"), True, "empty message"),
    "half a character": (messages("a\ud800", "b"), True, "half a character"),
    "no assistant": (messages("a", system="s"), True, "no assistant turn"),
    "system alone": ([Message("system", "s")], True, "no assistant turn"),
    "no question": ([Message("system", "s")], False, "ends with system"),
    "no answer": (messages("a", "b", "c"), True, "ends with user"),
    "answered": (messages("a", "b"), False, "ends with assistant"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_conversation_is_said_in_a_line(name: str) -> None:
    talk, reply, message = WRONG[name]
    chat = chat_format(load_tokenizer("bytes"))
    assert (flaw(talk, reply=reply) or "").startswith(message)
    with pytest.raises(UserError) as error:
        (chat.render if reply else chat.prompt)(talk)
    assert str(error.value).startswith(f"messages: {message}") and "\n" not in str(error.value)
    assert flaw(messages("a", "b", "c", "d", system="s")) is None
    assert flaw(messages("a", "b", "c", system="s"), reply=False) is None


@pytest.mark.parametrize("name", [name for name, (talk, *_) in WRONG.items() if talk and name != "half a character"])
def test_the_template_refuses_the_same(name: str, tmp_path: Path) -> None:
    """But for a conversation without an answer, which is half of a prompt."""
    jinja2 = pytest.importorskip("jinja2")
    transformers = pytest.importorskip("transformers", reason="needs the peers extra")
    write_tokenizer(with_chat(load_tokenizer("bytes")), tmp_path, 261, 64)
    talk, reply, message = WRONG[name]
    if reply and message in ("no assistant turn", "ends with user"):
        return
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(jinja2.exceptions.TemplateError):
        peer.apply_chat_template(as_dicts(talk), add_generation_prompt=not reply)


def test_the_template_refuses_parts_in_the_place_of_text(tmp_path: Path) -> None:
    jinja2 = pytest.importorskip("jinja2")
    transformers = pytest.importorskip("transformers", reason="needs the peers extra")
    write_tokenizer(with_chat(load_tokenizer("bytes")), tmp_path, 261, 64)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(jinja2.exceptions.TemplateError, match="not text"):
        peer.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "a"}]}])


spelled = st.sampled_from([*SPECIALS, "</s>", "<s>", "<|", "|>", " ", "\n", "user", "a"])
contents = st.lists(st.one_of(st.text(max_size=5), spelled), min_size=1).map("".join).filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(talk=st.lists(contents, min_size=1, max_size=2).flatmap(lambda half: st.permutations(half * 2)))
@example(talk=["".join(SPECIALS), "<|end|><|assistant|>"])
@example(talk=["<|user|>", "<|endoftext|>"])
@example(talk=["▁", " ▁ a"])
def test_no_text_becomes_a_token_and_every_turn_comes_back(tokenizer: Tokenizer, talk: list[str]) -> None:
    chat = chat_format(tokenizer)
    turns = messages(*talk)
    made = chat.render(turns)
    reserved, names = {*tokenizer.special.values()}, {tokenizer.special[name] for name in CHAT[:3]}
    ids, at = made.ids.tolist(), len(tokenizer.begin)
    assert ids[:at] == [*tokenizer.begin] and not made.trained[:at].any()
    for turn in turns:
        end = ids.index(chat.end, at)
        assert ids[at] == tokenizer.special[f"<|{turn.role}|>"] and ids[at] in names
        assert reserved.isdisjoint(ids[at + 1 : end])
        text = tokenizer.decode(ids[at + 1 : end], inside=tokenizer.inner is not None)
        # One of them puts a blank before a text that has none, and cannot tell it from the text's.
        assert text.replace("▁", " ") in [before + turn.content.replace("▁", " ") for before in ("", " ")]
        assert tokenizer.lossless <= (text == turn.content)
        assert made.trained[at : end + 1].tolist() == [False] + [turn.role == "assistant"] * (end - at)
        at = end + 1
    assert at == len(ids)


@pytest.mark.parametrize("trained", [[False] * 3, [True] * 3, []])
def test_a_mask_that_is_empty_or_full(trained: list[bool]) -> None:
    """A conversation that was cut off before its reply has an empty one."""
    with pytest.raises(UserError, match=rf"^loss mask: {sum(trained)} of {len(trained)} tokens are trained; .*$"):
        Rendered(np.zeros(len(trained), np.int32), np.array(trained, bool))
    made = chat_format(load_tokenizer("bytes")).render(messages("hello", "hi"))
    assert made.trained.sum() == 3
    with pytest.raises(UserError, match="0 of 7 tokens"):
        replace(made, ids=made.ids[:7], trained=made.trained[:7])


def test_a_model_without_room(tokenizer: Tokenizer) -> None:
    least, size = tokenizer.least_vocab_size, tokenizer.chat_vocab_size
    assert size == 1 + max(least - 1, *(tokenizer.special[name] for name in CHAT))
    for room in {least, size - 1}:
        fitted = tokenizer.fit(max(room, least))
        if not fitted.absent:
            continue
        with pytest.raises(UserError) as error:
            chat_format(fitted)
        assert str(error.value) == (
            f"model.vocab_size = {fitted.vocab_size}: no room for the chat tokens {' '.join(fitted.absent)}; make the "
            f"model with --model.vocab_size {size}"
        )
    ids = chat_format(tokenizer.fit(size)).render(TALKS["one turn"]).ids
    assert ids.max() < size and ids.tolist() == chat_format(tokenizer).render(TALKS["one turn"]).ids.tolist()


def test_a_run_folder_keeps_the_format(tokenizer: Tokenizer, tiny: Config, tmp_path: Path) -> None:
    ours = with_chat(tokenizer)
    assert is_chat(ours) and not is_chat(tokenizer) and with_chat(ours).files == ours.files
    fill_run(tmp_path / "run", tiny, ours)
    os.rename(tmp_path / "run", tmp_path / "moved")
    again = saved_tokenizer(tmp_path / "moved")
    assert is_chat(again) and again.files == ours.files and again.spec == ours.spec
    assert again.special == tokenizer.special and again.pieces == tokenizer.pieces
    for talk in TALKS.values():
        assert chat_format(again).render(talk).ids.tolist() == chat_format(tokenizer).render(talk).ids.tolist()
    require_no_other(again)
    fill_run(tmp_path / "plain", tiny, tokenizer)
    assert not is_chat(saved_tokenizer(tmp_path / "plain"))


OTHER = "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"chat_template.jinja": OTHER}, "for other tokens: <|im_start|>, <|im_end|>; fine-tune"),
        ({"tokenizer_config.json": json.dumps({"chat_template": OTHER})}, "tokens: <|im_start|>, <|im_end|>; "),
        (
            {"tokenizer_config.json": json.dumps({"chat_template": [{"name": "default", "template": OTHER}]})},
            "tokens: <|im_start|>, <|im_end|>; ",
        ),
        ({"chat_template.jinja": "{{ messages[0].content }} [INST] [/INST]"}, "tokens: [INST], [/INST]; "),
        ({"chat_template.jinja": "<|user|>\n{{ messages[0].content }}<|end|>\n"}, "for other turns; "),
    ],
)
def test_a_template_for_other_tokens(files: dict[str, str], said: str) -> None:
    tokenizer = load_tokenizer("bytes")
    other = replace(tokenizer, files={name: text.encode() for name, text in files.items()})
    with pytest.raises(UserError) as error:
        require_no_other(other)
    assert str(error.value).startswith("tokenizer: its chat template is written ") and said in str(error.value)
    assert "\n" not in str(error.value) and not is_chat(other)
    ours = with_chat(other)
    assert is_chat(ours) and not any(b"im_start" in data or b"INST" in data for data in ours.files.values())
    require_no_other(ours)
    require_no_other(tokenizer)


def test_our_template_for_another_beginning(tmp_path: Path) -> None:
    begun_one, plain_one = load_tokenizer(str(begun(tmp_path / "a"))), load_tokenizer(str(plain(tmp_path / "b")))
    other = plain_one.with_template(chat_format(begun_one).template)
    assert not is_chat(other)
    with pytest.raises(UserError, match=re.escape("for other tokens: <｜begin▁of|>;")):
        require_no_other(other)


def test_a_broken_template_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data.tokenizer = bytes:.*chat_template.jinja: No such file"):
        load_tokenizer(f"bytes:{tmp_path}")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"^data.tokenizer = bytes:.*chat_template.jinja: not UTF-8"):
        load_tokenizer(f"bytes:{tmp_path}")
