"""Text <-> token ids over a Hugging Face `tokenizers` file.

Two kinds are trained here: `word` (words, by default lower-cased; an unseen word becomes <unk>) and
`bpe` (byte-level byte pairs as in GPT-2, after Sennrich et al. 2016: punctuation and, by default,
case are kept and nothing is ever unseen). Any other `tokenizer.json`, such as GPT-2's own, is read
as it is.
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
# Thai, Lao, Tibetan, Burmese, Khmer, Japanese and Chinese put no spaces between words.
SPACELESS = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
# From this share of captions without spaces on, words are of no use for a dataset.
SPACELESS_SHARE = 0.05


class Task(TypedDict):
    """A prompt that is read beside the photo: its words, and the ids that they are read as."""

    words: str
    ids: list[int]


class CaptionTokenizer:
    """`begin_id` starts every caption, `end_id` closes it, `pad_id` fills a batch; they may be one
    and the same, as they are in GPT-2. `suppressed_ids` are never part of a caption: if not given,
    padding, begin and <unk>, unless one of them is also the end token. `first_id` and `forces_end`
    are those of `SpecialIds`.

    `tasks` are the prompts of a model that reads them beside the photo: the words of each by its
    name, such as `<CAPTION>`, and the ids that it is read as. The first is the default.
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
        # None where every text can be spelled.
        self.unknown_id: int | None = tokenizer.token_to_id(UNKNOWN)
        if suppressed_ids is None:
            unknown = [] if self.unknown_id is None else [self.unknown_id]
            suppressed_ids = [pad_id, begin_id, *unknown]
            suppressed_ids = sorted(set(suppressed_ids) - {end_id})
        self.suppressed_ids = list(suppressed_ids)
        # What stands for a word that cannot be spelled: <unk>, or [UNK] in BERT's vocabularies.
        names = {UNKNOWN, getattr(tokenizer.model, "unk_token", None) or UNKNOWN}
        self._unknown = {tokenizer.token_to_id(name) for name in names} - {None} - self._special
        # A word-level vocabulary has no decoder: its words are joined by spaces.
        self.is_word_level = tokenizer.decoder is None

    @classmethod
    def load(cls, path: Path, *settings: Any, **named: Any) -> "CaptionTokenizer":
        """Reads a `tokenizer.json`; the settings are those of the class. Raises UserError naming
        the file when it cannot be read."""
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{path}: no readable tokenizer ({error})") from error
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
        """Fits a vocabulary of at most `vocab_size` entries, special tokens included, on the
        captions of the training split; words (or pairs) rarer than `min_count` stay out.
        `lowercase` None lowers the letters of words and keeps those of byte pairs."""
        lowered = (
            [normalizers.Lowercase()] if lowercase or (lowercase is None and kind == "word") else []
        )
        if kind == "word":
            tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
            tokenizer.normalizer = normalizers.Sequence(
                [
                    normalizers.NFKC(),
                    *lowered,
                    # Curly apostrophes are the same word; other punctuation is not scored by the
                    # metrics and not missed in a caption.
                    normalizers.Replace("\u2019", "'"),
                    normalizers.Replace(Regex(r"[^\p{L}\p{N}\p{M}'&-]+|(?<!\S)['&-]+(?!\S)"), " "),
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
        """The same vocabulary of words with those of `captions` that it lacks and that stand there
        at least `min_count` times: the most frequent first, behind all other ids. Raises UserError
        for a vocabulary of pieces."""
        content = json.loads(self._tokenizer.to_str())
        if content["model"]["type"] != "WordLevel":
            raise UserError("pieces of words spell every word already; add no words")
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
        """What the class takes beside the file: a section of a checkpoint's `config.json`."""
        names = ("begin_id", "end_id", "pad_id", "suppressed_ids", "first_id", "forces_end")
        return {name: getattr(self, name) for name in (*names, "tasks")}

    @property
    def special(self) -> SpecialIds:
        """What a search has to know."""
        return SpecialIds(
            self.begin_id, self.end_id, self.suppressed_ids, self.first_id, self.forces_end
        )

    @property
    def opening(self) -> list[int]:
        """What a caption begins with that has no prompt of its own."""
        return [self.begin_id] if self.first_id is None else [self.begin_id, self.first_id]

    def save(self, path: Path) -> None:
        """Writes a `tokenizer.json`, whole or not at all."""
        write_atomic(path, self._tokenizer.to_str(pretty=True))

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of every entry."""
        return self._tokenizer.get_vocab()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin and end token. Where the text spells one of the special
        tokens, that token is left out: a caption cannot end itself."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [i for i in ids if i not in self._special]

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that the vocabulary lacks, as they stand in it."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        return [text[start:end] for i, (start, end) in spans if i in self._unknown]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; begin, end, padding and what the file marks as special are left out."""
        ids = [i for i in ids if i not in self._special]
        return self._tokenizer.decode(ids, skip_special_tokens=True).strip()

    def pieces(self, ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
        """One piece of text a token, behind the tokens `before`. A byte-pair piece keeps its
        leading space, and a character that is spread over several tokens belongs to the last of
        them."""
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
        """The end of `whole` in one piece a token, where a later token changes what came before: a
        tokenizer of WordPiece may make "it's" of "it", "'" and "s"."""
        ends = [0]
        for count in range(len(ids)):
            text = self.text_of([*before, *ids[:count]])
            ends.append(max(ends[-1], len(os.path.commonprefix([text, whole]))))
        return [whole[start:end] for start, end in pairwise([*ends[1:], len(whole)])]

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of ids, spaces at its ends included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class PieceStream:
    """The piece of text that each token adds to the tokens `before`, one token at a time and in
    constant time: only the last tokens are decoded again, from where a piece began."""

    def __init__(self, tokenizer: CaptionTokenizer, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = list(before)
        # Text up to `done` has been given; what is decoded again begins one piece earlier.
        self.start, self.done = 0, len(before)

    def add(self, token_id: int) -> str:
        """The text of the next token; empty where it is part of a character that a later token
        completes, which then gives all of it."""
        if self.tokenizer.is_word_level:
            return self.tokenizer.pieces([token_id])[0]
        self.ids.append(token_id)
        text = self.tokenizer.text_of(self.ids[self.start :])
        # A character has at most four bytes: what is not whole by then is none.
        if text.endswith("\ufffd") and len(self.ids) - self.done < 4:
            return ""
        return self._take(text)

    def rest(self) -> str:
        """What is left of a character that nothing completed."""
        if self.done == len(self.ids):
            return ""
        return self._take(self.tokenizer.text_of(self.ids[self.start :]))

    def _take(self, text: str) -> str:
        piece = text[len(self.tokenizer.text_of(self.ids[self.start : self.done])) :]
        # A token without text, such as a special one, does not tell whether the next has a space.
        if piece:
            self.start = self.done
        self.done = len(self.ids)
        return piece


def is_written_without_spaces(caption: str) -> bool:
    """Whether most letters of a caption are of scripts that do not separate words."""
    letters = sum(character.isalpha() for character in caption)
    return len(SPACELESS.findall(caption)) > letters / 2
