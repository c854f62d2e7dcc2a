"""Converts captions to token ids and back, with a Hugging Face `tokenizers` file.

Two kinds can be trained: `word` (words, lower-cased by default; an unknown word becomes <unk>) and
`bpe` (byte-level BPE as in GPT-2, after Sennrich et al. 2016: punctuation and, by default, case are
kept, and every text can be encoded). Any other `tokenizer.json`, such as GPT-2's, can be loaded.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from handler.beam_search import SpecialIds
from handler.errors import UserError
from handler.files import write_atomic

PAD, BEGIN, END, UNKNOWN = SPECIAL_TOKENS = ("<pad>", "<begin>", "<end>", "<unk>")
KINDS = ("word", "bpe")
# Scripts without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, Japanese, Chinese.
SPACELESS = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
# The share of captions without spaces from which a dataset needs another tokenizer than `word`.
SPACELESS_SHARE = 0.05


class Task(TypedDict):
    """A prompt for the prompt encoder: its words, and their token ids."""

    words: str
    ids: list[int]


# What is between words: also apostrophes, ampersands and hyphens alone, and joiners (ZWNJ, ZWJ)
# that are not between two letters, which they are in Persian or Hindi words.
NO_WORD = (
    r"[^\p{L}\p{N}\p{M}'&\x{200c}\x{200d}-]+|(?<!\S)['&-]+(?!\S)"
    r"|(?<![\p{L}\p{M}])[\x{200c}\x{200d}]+|[\x{200c}\x{200d}]+(?![\p{L}\p{M}])"
)


class CaptionTokenizer:
    """`begin_id` starts every caption, `end_id` ends it, and `pad_id` fills a batch; they may be
    equal, as in GPT-2. `suppressed_ids` are never generated; the default is padding, begin and
    <unk>, unless one of them is also the end token. `first_id` and `forces_end` are those of
    `SpecialIds`.

    `tasks` contains the prompts of a model with a prompt encoder by name, such as `<CAPTION>`. The
    first is the default.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        begin_id: int,
        end_id: int,
        pad_id: int,
        suppressed_ids: Sequence[int] | None = None,
        first_id: int | None = None,
        forces_end: bool = False,
        tasks: Mapping[str, Task] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.begin_id, self.end_id, self.pad_id = begin_id, end_id, pad_id
        self.first_id, self.forces_end = first_id, forces_end
        self.tasks = dict(tasks or {})
        self._special = {begin_id, end_id, pad_id, *self.opening}
        # None if every text can be encoded.
        self.unknown_id: int | None = tokenizer.token_to_id(UNKNOWN)
        if suppressed_ids is None:
            unknown = [] if self.unknown_id is None else [self.unknown_id]
            suppressed_ids = [pad_id, begin_id, *unknown]
            suppressed_ids = sorted(set(suppressed_ids) - {end_id})
        self.suppressed_ids = list(suppressed_ids)
        # The tokens for an unknown word: <unk>, or [UNK] in BERT's vocabularies.
        names = {UNKNOWN, getattr(tokenizer.model, "unk_token", None) or UNKNOWN}
        self._unknown = {tokenizer.token_to_id(name) for name in names} - {None} - self._special
        # A word-level tokenizer has no decoder: words are joined by spaces.
        self.is_word_level = tokenizer.decoder is None

    @classmethod
    def load(cls, path: Path, *settings: Any, **named: Any) -> "CaptionTokenizer":
        """Reads a `tokenizer.json`; the settings are the arguments of the class. Raises UserError
        naming the file if it cannot be read."""
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{path}: cannot be read as a tokenizer ({error})") from error
        return cls(tokenizer, *settings, **named)

    @classmethod
    def train(
        cls,
        captions: Iterable[str],
        kind: str,
        vocab_size: int,
        min_count: int,
        lowercase: bool | None = None,
    ) -> "CaptionTokenizer":
        """Trains a vocabulary of at most `vocab_size` entries, including special tokens, on the
        captions of the training split. Words (or byte pairs) that occur less than `min_count` times
        are left out. `lowercase` None means true for `word` and false for `bpe`."""
        lowered = (
            [normalizers.Lowercase()] if lowercase or (lowercase is None and kind == "word") else []
        )
        if kind == "word":
            tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
            tokenizer.normalizer = normalizers.Sequence(
                [
                    normalizers.NFKC(),
                    *lowered,
                    # A curly apostrophe makes no other word. Other punctuation is removed: metrics
                    # ignore it.
                    normalizers.Replace("\u2019", "'"),
                    normalizers.Replace(Regex(NO_WORD), " "),
                ]
            )
            tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            trainer: trainers.Trainer = trainers.WordLevelTrainer(
                vocab_size=vocab_size,
                min_frequency=min_count,
                special_tokens=list(SPECIAL_TOKENS),
                show_progress=False,
            )
        else:
            tokenizer = Tokenizer(models.BPE())
            tokenizer.normalizer = normalizers.Sequence(
                [normalizers.NFC(), *lowered, normalizers.Strip()]
            )
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
            tokenizer.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=vocab_size,
                min_frequency=min_count,
                special_tokens=list(SPECIAL_TOKENS),
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
        tokenizer.train_from_iterator(captions, trainer)
        begin_id, end_id, pad_id = (
            tokenizer.token_to_id(token) or 0 for token in (BEGIN, END, PAD)
        )
        return cls(tokenizer, begin_id, end_id, pad_id)

    def with_words_of(self, captions: Iterable[str], min_count: int) -> "CaptionTokenizer":
        """Adds the words of `captions` that the vocabulary does not contain and that occur at least
        `min_count` times. They get the next ids, the most frequent word first. Raises UserError
        unless the vocabulary is one of words."""
        content = json.loads(self._tokenizer.to_str())
        if content["model"]["type"] != "WordLevel":
            raise UserError("only a vocabulary of words can be extended; this one has subwords")
        normalize = self._tokenizer.normalizer.normalize_str
        split = self._tokenizer.pre_tokenizer.pre_tokenize_str
        vocabulary = content["model"]["vocab"]
        counts = Counter(word for text in captions for word, _ in split(normalize(text)))
        new = [w for w, count in counts.items() if count >= min_count and w not in vocabulary]
        first = max(vocabulary.values()) + 1
        for number, word in enumerate(sorted(new, key=lambda word: (-counts[word], word))):
            vocabulary[word] = first + number
        return CaptionTokenizer(Tokenizer.from_str(json.dumps(content)), **self.settings)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the class, apart from the file: a section of a checkpoint's
        `config.json`."""
        names = ("begin_id", "end_id", "pad_id", "suppressed_ids", "first_id", "forces_end")
        return {name: getattr(self, name) for name in (*names, "tasks")}

    @property
    def special(self) -> SpecialIds:
        """The special ids of a search."""
        return SpecialIds(
            self.begin_id, self.end_id, self.suppressed_ids, self.first_id, self.forces_end
        )

    @property
    def opening(self) -> list[int]:
        """The ids that a caption without a prompt begins with."""
        return [self.begin_id] if self.first_id is None else [self.begin_id, self.first_id]

    def save(self, path: Path) -> None:
        """Writes a `tokenizer.json` atomically."""
        write_atomic(path, self._tokenizer.to_str(pretty=True))

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of every entry."""
        return self._tokenizer.get_vocab()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without begin and end token. Special tokens that are written in the
        text are left out, so that a text cannot end a caption."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [i for i in ids if i not in self._special]

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that are not in the vocabulary, as they are written in the text."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        return [text[start:end] for i, (start, end) in spans if i in self._unknown]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. Begin, end, padding and the file's special tokens are left out."""
        ids = [i for i in ids if i not in self._special]
        return self._tokenizer.decode(ids, skip_special_tokens=True).strip()

    def pieces(self, ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
        """One piece of text per token, for tokens that follow the tokens `before`. Pieces of BPE
        keep their leading space. A character that consists of several tokens belongs to the last
        of them."""
        if self.is_word_level:
            return [self._tokenizer.id_to_token(i) or "" for i in ids]
        stream = PieceStream(self, before)
        pieces = [stream.add(token_id) for token_id in ids]
        if pieces:
            pieces[-1] += stream.rest()
        whole = self.text_of([*before, *ids])
        if self.text_of(before) + "".join(pieces) == whole:
            return pieces
        return self._cut(ids, before, whole)

    def _cut(self, ids: Sequence[int], before: Sequence[int], whole: str) -> list[str]:
        """Splits the end of `whole` into one piece per token, for tokenizers in which a token may
        change the text before it: WordPiece may join "it", "'" and "s" to "it's"."""
        ends = [0]
        for count in range(len(ids)):
            text = self.text_of([*before, *ids[:count]])
            ends.append(max(ends[-1], len(os.path.commonprefix([text, whole]))))
        return [whole[start:end] for start, end in pairwise([*ends[1:], len(whole)])]

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of ids, including spaces at its ends."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class PieceStream:
    """Finds the piece of text that each token adds, starting after the tokens `before`. This takes
    constant time per token, because only the tokens since the start of the last piece are decoded
    again."""

    def __init__(self, tokenizer: CaptionTokenizer, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = list(before)
        # The text of ids[:done] has been returned; decoding starts one piece before that.
        self.start, self.done = 0, len(before)

    def add(self, token_id: int) -> str:
        """The text of the next token. It is empty if the token is part of a character, which a
        later token completes."""
        if self.tokenizer.is_word_level:
            return self.tokenizer.pieces([token_id])[0]
        self.ids.append(token_id)
        text = self.tokenizer.text_of(self.ids[self.start :])
        # A character has at most four bytes: after four tokens, the bytes are not a character.
        if text.endswith("\ufffd") and len(self.ids) - self.done < 4:
            return ""
        return self._take(text)

    def rest(self) -> str:
        """The text of an incomplete character at the end."""
        if self.done == len(self.ids):
            return ""
        return self._take(self.tokenizer.text_of(self.ids[self.start :]))

    def _take(self, text: str) -> str:
        piece = text[len(self.tokenizer.text_of(self.ids[self.start : self.done])) :]
        # Decoding must not start at a token without text, such as a special token: it would drop
        # the leading space of the next one.
        if piece:
            self.start = self.done
        self.done = len(self.ids)
        return piece


def is_written_without_spaces(caption: str) -> bool:
    """Whether most letters of a caption belong to scripts without spaces between words."""
    letters = sum(character.isalpha() for character in caption)
    return len(SPACELESS.findall(caption)) > letters / 2
