"""Converts Hugging Face's tokenizers: WordPiece (BERT) and byte-level BPE (GPT-2, RoBERTa).

A setting that is not supported is an error that names the field. An absent field has the default of
transformers 5.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from handler.caption_tokenizer import Task
from handler.errors import UserError

FAST, WORD_PIECES, PAIRS = "tokenizer.json", "vocab.txt", ("vocab.json", "merges.txt")
TOKENIZER_FILES = (FAST, WORD_PIECES, *PAIRS)
GPT2_SPECIAL = ("<|endoftext|>",)
BERT_SPECIAL = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
ROBERTA_SPECIAL = ("<s>", "</s>", "<unk>", "<pad>", "<mask>")
SPECIAL_FIELDS = (
    "bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token",
)  # fmt: skip
# Replacements in a decoded text if `clean_up_tokenization_spaces` is true, as in transformers.
CLEANED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
    (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip
CLEAN_UP = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


def import_tokenizer(folder: Path, settings: Mapping[str, Any], vocab_size: int) -> Tokenizer:
    """Reads a tokenizer from `tokenizer.json`, from `vocab.txt` (WordPiece), or from `vocab.json`
    and `merges.txt` (byte-level BPE).

    `settings` contains the fields of `tokenizer_config.json` and `special_tokens_map.json`, and the
    content of `added_tokens.json` as `added_tokens`. Raises UserError naming the file that is
    missing or has another kind of tokenizer.
    """
    if settings.get(CLEAN_UP):
        raise UserError(
            f"{folder}: the tokenizer's field {CLEAN_UP!r} is true, which is not supported"
        )
    if (folder / FAST).exists():
        tokenizer = _read_fast(folder / FAST)
    elif (folder / WORD_PIECES).exists():
        tokenizer = _read_word_pieces(folder / WORD_PIECES, settings)
    else:
        tokenizer = _read_pairs(folder, settings)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    word_pieces = isinstance(tokenizer.model, models.WordPiece)
    # transformers ignores the field for byte-level BPE.
    if word_pieces and settings.get("clean_up_tokenization_spaces", False):
        cleaned = [decoders.Replace(*pair) for pair in CLEANED]
        tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Fuse(), *cleaned])
    defaults = BERT_SPECIAL if word_pieces else GPT2_SPECIAL
    kind = str(settings.get("tokenizer_class")).lower()
    if "roberta" in kind or "bart" in kind:
        defaults = ROBERTA_SPECIAL
    special = [*defaults, *(settings.get(field) for field in SPECIAL_FIELDS)]
    for field in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(field, [])
        special += more.values() if isinstance(more, dict) else more
    texts = {token.get("content") if isinstance(token, dict) else token for token in special}
    known = [t for t in texts if isinstance(t, str) and tokenizer.token_to_id(t) is not None]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in sorted(known)])
    if tokenizer.get_vocab_size() > vocab_size:
        tokenizer = _without_unseen(tokenizer, vocab_size)
    if tokenizer.get_vocab_size() > vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.get_vocab_size()} entries, but config.json's "
            f"field 'decoder.vocab_size' is {vocab_size}; give the tokenizer of this model"
        )
    return tokenizer


def import_tasks(
    folder: Path, tokenizer: Tokenizer, settings: Mapping[str, Any], tasks: Mapping[str, str]
) -> dict[str, Task]:
    """The words of each task and their ids, between the tokenizer's begin and end token as in the
    model's processor. Raises UserError if there are tasks and the tokenizer has no such token."""
    if not tasks:
        return {}
    begin, end = _text(settings.get("bos_token", "<s>")), _text(settings.get("eos_token", "</s>"))
    for token in (begin, end):
        if tokenizer.token_to_id(token) is None:
            raise UserError(f"{folder}: the tokenizer has no token {token!r}, which prompts need")
    return {
        name: {"words": words, "ids": tokenizer.encode(begin + words + end, None, False, False).ids}
        for name, words in tasks.items()
    }


def _read_fast(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path}: cannot be read as a tokenizer ({error})") from error
    known = ((models.BPE, decoders.ByteLevel), (models.WordPiece, decoders.WordPiece))
    if not any(
        isinstance(tokenizer.model, model) and isinstance(tokenizer.decoder, decoder)
        for model, decoder in known
    ):
        kind, decoder = type(tokenizer.model).__name__, type(tokenizer.decoder).__name__
        raise UserError(
            f"{path}: model {kind} with decoder {decoder}; only byte-level BPE (GPT-2) and "
            "WordPiece (BERT) can be imported"
        )
    return tokenizer


def _read_word_pieces(path: Path, settings: Mapping[str, Any]) -> Tokenizer:
    unknown = _text(settings.get("unk_token", "[UNK]"))
    try:
        # WordPiece.from_file has no parameter for another unknown token than [UNK].
        lines = path.read_text(encoding="utf-8").split("\n")
        vocabulary = {line.rstrip("\r"): number for number, line in enumerate(lines) if line}
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    except Exception as error:
        raise UserError(f"{path}: not readable ({error})") from error
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
        strip_accents=settings.get("strip_accents"),
        lowercase=bool(settings.get("do_lower_case", True)),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return _with_added_tokens(tokenizer, path, settings)


def _text(token: Any) -> str:
    return str(token.get("content") if isinstance(token, dict) else token)


def _read_pairs(folder: Path, settings: Mapping[str, Any]) -> Tokenizer:
    slow = [folder / name for name in PAIRS]
    for path in slow:
        if not path.exists():
            raise UserError(
                f"{path}: missing, and so are {FAST} and {WORD_PIECES}; save the tokenizer there"
            )
    try:
        tokenizer = Tokenizer(models.BPE.from_file(*map(str, slow)))
    except Exception as error:
        raise UserError(f"{slow[0]} and {slow[1].name}: not readable ({error})") from error
    prefix_space = bool(settings.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_added_tokens(tokenizer, slow[0], settings)


def _with_added_tokens(tokenizer: Tokenizer, path: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """Adds the tokens in `settings`, which must get the ids that are stored there."""
    added = {token: {"id": i} for token, i in settings.get("added_tokens", {}).items()}
    for i, token in settings.get("added_tokens_decoder", {}).items():
        added[token["content"]] = {**token, "id": int(i)}
    for text, token in sorted(added.items(), key=lambda item: item[1]["id"]):
        add = tokenizer.add_special_tokens if token.get("special") else tokenizer.add_tokens
        add([AddedToken(text, normalized=False)])
        if tokenizer.token_to_id(text) != token["id"]:
            raise UserError(
                f"{path}: the added token {text!r} has the id {token['id']}, but would get "
                f"{tokenizer.token_to_id(text)}; give a tokenizer.json instead"
            )
    return tokenizer


def _without_unseen(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """Removes tokens that were added to the tokenizer but not to the model, such as a padding
    token. The model can never generate them."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < vocab_size]
    return Tokenizer.from_str(json.dumps(content))
