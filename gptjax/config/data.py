"""Where records come from, which of their fields are read, and how they become rows."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from gptjax.config.fields import FREE, SAME_CONTENT, Count, Positive, Seed, frozen


def _conversation(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(names) > 3:
        raise ValueError("give one field of messages or a transcript, or prompt,reply, or instruction,input,reply")
    return names


def _pair(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(names) not in (0, 2):
        raise ValueError("give two fields, source,target")
    return names


def _labelled(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(names) not in (0, 2, 3):
        raise ValueError("give text,label, or first,second,label")
    return names


@frozen
class SourceConfig:
    """Where records come from, whatever they hold."""

    source: Annotated[str, Field(min_length=1), SAME_CONTENT]
    """tfds:NAME, or files, folders and globs with commas between: .jsonl .ndjson .json .csv .tsv .parquet .arrow, each
    also .gz .zst .xz .bz2."""
    format: Annotated[
        Literal["auto", "text", "html", "warc", "jsonl", "json", "csv", "tsv", "parquet", "arrow"], SAME_CONTENT
    ] = "auto"
    """How files are read; auto goes by their endings."""
    train_split: Annotated[str, Field(min_length=1)] = "train[:95%]"
    """Part to train on, such as train[:95%]; tfds:NAME has other splits, too."""
    eval_split: Annotated[str, Field(min_length=1)] = "train[95%:]"
    """Part to evaluate on."""
    cache_dir: Annotated[str, Field(min_length=1), FREE] = "~/.cache/gptjax"
    """Where built datasets live."""
    tokenizer: Annotated[str, Field(min_length=1), SAME_CONTENT] = "bytes"
    """bytes; sentencepiece:N, a vocabulary of N made of the training text and kept in cache_dir; DIR or gpt2:DIR, a
    folder with a Hugging Face tokenizer (tokenizer.json, or GPT-2's vocab.json and merges.txt, or encoder.json and
    vocab.bpe) or with tokenizer.model alone; or a SentencePiece .model file."""
    seed: Seed = 0
    """Seed of the global shuffle."""
    threads: Annotated[Positive, FREE] = 1
    """Reading and tokenising threads per process; more where the log's data_wait says that steps wait for text."""

    @property
    def made_pieces(self) -> int:
        """N of a tokenizer sentencepiece:N; 0 for one that is there already."""
        kind, _, size = self.tokenizer.partition(":")
        return int(size) if kind == "sentencepiece" else 0


@frozen
class DataConfig(SourceConfig):
    """Where text comes from and how it becomes rows of tokens."""

    source: Annotated[str, Field(min_length=1), SAME_CONTENT] = "stdlib"
    """stdlib (Python's own source), tfds:NAME, or files, folders and globs with commas between: .txt .md .jsonl .ndjson
    .json .csv .tsv .parquet .arrow .html, and .warc .wet of web crawls (extra clean), each also .gz .zst .xz .bz2.
    Files of gs://BUCKET/ (extra bucket) are copied to cache_dir once.
    In pretraining several with weights, such as a.txt:0.6,tfds:NAME:0.4, are mixed by shares of the tokens; gpt3:DIR is
    GPT-3's mixture of the folders common_crawl, webtext2, books1, books2 and wikipedia in DIR."""
    later_weights: str = ""
    """Other weights of a mixture from about so many tokens of training on, in the order of source: such as
    1e9:0.2,0.8;2e9:0,1."""
    max_epochs: Annotated[float, Field(ge=0), FREE] = 0.0
    """A training that would read a source more often than this is refused; 0 is no bound."""
    cache_tokens: Annotated[bool, FREE] = False
    """Tokenise all of the text once, before the first step, and keep its ids in cache_dir: 2 bytes a token, 4 of a
    vocabulary above 65,536. For hosts whose log says that steps wait for text (data_wait), whatever the threads."""
    text_field: Annotated[str, Field(min_length=1), SAME_CONTENT] = "text"
    """Field that holds the text in records; a dotted one, such as meta.body, reaches into nested records."""
    max_chars: Positive = 65536
    """Longer documents are stored as consecutive records of this many characters."""
    split_by: Literal["document", "position"] = "document"
    """What those parts hold: whole documents, by a hash of each one's text, or a stretch of every document by position,
    for a text of one document or a few."""
    lanes: Positive = 1
    """Independent packed streams that fill a batch side by side; divides the micro-batch. A
    process reads only the lanes of its rows."""
    fim_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of documents that are learned with their middle last, half of them in each of the orders PSM and SPM, so
    that the model can fill in between two texts (arXiv 2207.14255); three more ids of model.vocab_size. 0 is none."""


@frozen
class WindowConfig(DataConfig):
    """Text that is read in stretches, each of them as one."""

    tokenizer: Annotated[str, SAME_CONTENT] = ""
    """bytes; sentencepiece:N, a vocabulary of N made of the training text and kept in cache_dir; DIR or gpt2:DIR, a
    folder with a Hugging Face tokenizer; a SentencePiece .model file; empty is that of the weights that a run starts
    from."""
    max_chars: Positive = 4096
    """Longer documents are stored as consecutive records of this many characters, each of which is tokenised whole for
    every stretch of it."""


@frozen
class DialogueConfig(SourceConfig):
    """Where conversations come from, which fields of a record hold them, and how they become rows of tokens."""

    split_by: ClassVar[str] = "document"
    lanes: ClassVar[int] = 1

    format: Annotated[Literal["auto", "jsonl", "json", "csv", "tsv", "parquet", "arrow"], SAME_CONTENT] = "auto"
    """How files are read; auto goes by their endings."""
    tokenizer: Annotated[str, SAME_CONTENT] = ""
    """bytes; DIR or gpt2:DIR, a folder with a Hugging Face tokenizer; or a SentencePiece .model file; empty is that of
    init_from."""
    fields: Annotated[tuple[str, ...], AfterValidator(_conversation), SAME_CONTENT] = ()
    """Fields that hold the conversation: one of messages or of a transcript; prompt,reply; or instruction,input,reply.
    A dotted one, such as instances.0.output, reaches into nested records and lists. Empty takes the first form found:
    messages; conversations; instruction,input,output; prompt,completion; prompt,response; question,answer; chosen."""
    too_long: Literal["cut", "drop"] = "cut"
    """What becomes of a conversation that is longer than the context: its beginning is cut off, or it is left out."""
    packing: bool = True
    """Several conversations to a row, of which none sees another; else one a row, and the rest of it empty."""
    invalid: Literal["refuse", "drop"] = "refuse"
    """What becomes of a record that is no conversation to learn from: the build ends with its place and the reason, or
    the record is left out and counted by reason."""


@frozen
class RankingConfig(DialogueConfig):
    """Where ranked replies come from: prompt, replies, ranks (1 is best, equal ranks are ties), or chosen, rejected and
    perhaps a prompt of their own."""

    max_replies: Annotated[int, Field(ge=2, le=9)] = 2
    """Replies K that a prompt has at most; each of them takes a sequence of the batch, whether it is there or not."""
    too_long: Literal["cut", "drop"] = "cut"
    """What becomes of a prompt with a reply that together are longer than the context: the beginning is cut off, or the
    prompt is left out."""
    invalid: Literal["refuse", "drop"] = "drop"
    """What becomes of a record that is no ranking to learn from: the build ends with its place and the reason, or the
    record is left out and counted by reason."""


@frozen
class PromptConfig(DialogueConfig):
    """Where prompts come from that a policy is to answer, perhaps with an answer to compare its reply with. Of whole
    conversations and of ranked replies the prompt is taken, without what the assistant says at its end."""

    fields: Annotated[tuple[str, ...], AfterValidator(_conversation), SAME_CONTENT] = ()
    """Fields that hold the prompt, as messages, a transcript or text; prompt,answer; or instruction,input,answer. A
    dotted one, such as instances.0.output, reaches into nested records and lists. Empty takes the first form found that
    is not null: messages; conversations; instruction,input; prompt; question; chosen; and the field answer beside it,
    if there is one."""
    max_prompt_tokens: Count = 0
    """Tokens that a prompt has at most, those of the chat format included; 0 is half the context. What is left of the
    context is the reply's."""
    too_long: Literal["cut", "drop"] = "drop"
    """What becomes of a prompt that is longer: its beginning is cut off, or it is left out and counted."""
    invalid: Literal["refuse", "drop"] = "drop"
    """What becomes of a record that has no prompt to answer: the build ends with its place and the reason, or the
    record is left out and counted by reason."""


@frozen
class PairConfig(DialogueConfig):
    """Where pairs of texts come from, of which the second is to be written for the first: translations, summaries."""

    fields: Annotated[tuple[str, ...], AfterValidator(_pair), SAME_CONTENT] = ()
    """source,target; a dotted one, such as translation.en, reaches into nested records. Empty takes the first form
    found: source,target; document,summary; article,highlights; input,output; text,summary; prompt,completion."""
    prefix: Annotated[str, SAME_CONTENT] = ""
    """Text before each source, such as `translate English to German: `."""
    too_long: Literal["cut", "drop"] = "cut"
    """What becomes of a text that is longer than its side of the model: its end is cut off, or the pair is left out."""
    invalid: Literal["refuse", "drop"] = "refuse"
    """What becomes of a record that is no pair, such as one with an empty side: the build ends with its place and the
    reason, or the record is left out and counted by reason."""


@frozen
class LabelledConfig(DialogueConfig):
    """Where texts with labels come from, each one sentence or a pair of them."""

    fields: Annotated[tuple[str, ...], AfterValidator(_labelled), SAME_CONTENT] = ()
    """text,label or first,second,label; a dotted one, such as review.body, reaches into nested records. Empty takes the
    first form found: sentence1,sentence2,label; premise,hypothesis,label; question1,question2,label;
    question,sentence,label; text,label; sentence,label. A label is text, a number, or true or false."""
    too_long: Literal["cut", "drop"] = "cut"
    """What becomes of an example that is longer than the context: the end of its longer text is cut off, or it is left
    out."""
    invalid: Literal["refuse", "drop"] = "refuse"
    """What becomes of a record that is no example, such as one with an empty text: the build ends with its place and
    the reason, or the record is left out and counted by reason."""
