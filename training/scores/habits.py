"""Properties of captions that BLEU and CIDEr do not show: how varied they are, which words are
missing, and how often they repeat words or break off.

Words are those of `training.scores.metrics.plain_words`, without stemming: "dogs" and "dog" are
different words.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from training.scores.metrics import plain_words


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that cannot end a caption. Words that may also be adverbs ("a man looks up", "two dogs run
# around") are not in the list.
DANGLING = _words("""
    a an the and or nor but than as at against among amid atop during for from in into like of on
    onto to toward towards until upon via with within without because if when where while which who
    whom whose is are was were be being am has have had having do does did can could will would
    shall should may might must another every either neither her his its my our these their your
""")
# Words without content.
FUNCTION_WORDS = DANGLING | _words("""
    about above across after along apart around aside away back before behind below beneath beside
    between beyond by down forward here inside near nearby off out outside over past round there
    through together under underneath up all any both each everyone few he herself him himself it
    itself many me mine more most much one ones other others she several some someone something that
    theirs them themselves they this those us we what you yours not no too very also just only so
""")
# A noun phrase begins behind one of these.
DETERMINERS = _words("a an the another every each his her its my our their your")
CONJUNCTIONS = _words("and or")
# A word that people's noun phrases contain so often, of which so few end in it, is no noun.
MODIFIER_COUNT, MODIFIER_ENDS = 10, 0.02
# Lower bounds of the bins of a word's number of occurrences in training.
BINS = (0, 1, 10, 100, 1000)


def describe(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    training: Sequence[str] = (),
) -> dict[str, Any]:
    """Figures on one caption per photo:

    distinct_captions   number of different captions
    vocabulary          number of different words
    mean_length         words per caption
    ending_in_function_word   share of captions that break off ("a dog on a")
    repeated_bigrams    share of captions in which a pair of words occurs twice

    With the captions of the training split, also:

    broken_noun_phrases share of captions in which a noun phrase lacks its noun ("a boy in a black
                        is running"), see `breaks_off`
    copied_captions     share of captions that occur in training, word by word
    recall_by_training_count   share of the content words in a photo's references (in at least two
                        of them, if there are two) that its caption contains, by the word's number
                        of occurrences in training: {"1-9": {"recall": .1, "words": 50}, ...}
    """
    words = {photo: plain_words(text) for photo, text in predictions.items()}
    spoken = list(words.values())
    count = max(1, len(spoken))
    result: dict[str, Any] = {
        "distinct_captions": distinct(list(predictions.values())),
        "vocabulary": len({word for caption in spoken for word in caption}),
        "mean_length": sum(map(len, spoken)) / count,
        "ending_in_function_word": sum(c[-1:] != [] and c[-1] in DANGLING for c in spoken) / count,
        "repeated_bigrams": sum(map(repeats_a_bigram, spoken)) / count,
    }
    if training:
        known = [plain_words(caption) for caption in training]
        modifiers = modifiers_of(known)
        result["broken_noun_phrases"] = sum(breaks_off(c, modifiers) for c in spoken) / count
        result["copied_captions"] = copied(list(predictions.values()), training)
        frequency = Counter(word for caption in known for word in caption)
        result["recall_by_training_count"] = recall_by_count(words, references, frequency)
    return result


def distinct(captions: Sequence[str]) -> int:
    """The number of different captions, ignoring capitals and punctuation."""
    return len({tuple(plain_words(text)) for text in captions})


def copied(captions: Sequence[str], training: Sequence[str]) -> float:
    """The share of captions that occur in training, word by word."""
    known = {tuple(plain_words(caption)) for caption in training}
    return sum(tuple(plain_words(text)) in known for text in captions) / max(1, len(captions))


def repeats_a_bigram(words: Sequence[str]) -> bool:
    pairs = list(pairwise(words))
    return len(set(pairs)) < len(pairs)


def noun_phrases(words: Sequence[str]) -> Iterator[list[str]]:
    """The words behind each determiner, up to the next function word; "and" between two of them
    belongs to the phrase. Left out are a phrase whose noun may stand elsewhere ("a black and a
    white dog", "the red one") and one whose last word is a participle's ("a man wearing red")."""

    def content(place: int) -> bool:
        return place < len(words) and words[place] not in FUNCTION_WORDS

    for first in (n + 1 for n, word in enumerate(words) if word in DETERMINERS):
        end = first
        while content(end) or (content(end + 1) and words[end] in CONJUNCTIONS):
            end += 1
        phrase = [word for word in words[first:end] if word not in CONJUNCTIONS]
        after, following = [*words[end : end + 2], "", ""][:2]
        elsewhere = after in ("one", "ones") or (after in CONJUNCTIONS and following in DETERMINERS)
        if phrase and not elsewhere and not any(word.endswith("ing") for word in phrase[:-1]):
            yield phrase


def modifiers_of(captions: Sequence[Sequence[str]]) -> frozenset[str]:
    """The words, such as colours, that are in many noun phrases of people and end hardly any."""
    uses: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    for phrase in (phrase for words in captions for phrase in noun_phrases(words)):
        uses.update(phrase)
        ends[phrase[-1]] += 1
    return frozenset(
        word
        for word, times in uses.items()
        if times >= MODIFIER_COUNT and ends[word] <= MODIFIER_ENDS * times
    )


def breaks_off(words: Sequence[str], modifiers: frozenset[str]) -> bool:
    """Whether a noun phrase of a caption ends in one of `modifiers`, that is, lacks its noun. A
    verb right behind the gap hides it ("a boy in a red jumps")."""
    return any(phrase[-1] in modifiers for phrase in noun_phrases(words))


def recall_by_count(
    words: Mapping[str, Sequence[str]],
    references: Mapping[str, Sequence[str]],
    frequency: Mapping[str, int],
) -> dict[str, dict[str, float]]:
    """See `describe`; bins without words are left out."""
    recalled: Counter[int] = Counter()
    total: Counter[int] = Counter()
    for photo, caption in words.items():
        mentions = Counter(word for text in references[photo] for word in set(plain_words(text)))
        least = min(2, len(references[photo]))
        for word, times in mentions.items():
            if times >= least and word not in FUNCTION_WORDS:
                low = max(low for low in BINS if low <= frequency.get(word, 0))
                total[low] += 1
                recalled[low] += word in caption
    names = ["0", *(f"{low}-{high - 1}" for low, high in pairwise(BINS[1:])), f"{BINS[-1]}+"]
    return {
        name: {"recall": recalled[low] / total[low], "words": total[low]}
        for low, name in zip(BINS, names, strict=True)
        if total[low]
    }


def little_learnt(
    distinct_captions: int, photos: int, CIDEr: float | None = None, **_: Any
) -> str | None:
    """The reason why captions look like those of an undertrained model; None if they do not."""
    if photos > 1 and distinct_captions < max(2, photos / 10):
        how = "the same caption" if distinct_captions == 1 else f"{distinct_captions} captions"
        return f"{how} for all {photos} photos: the model has learnt little; train it longer"
    if photos > 1 and CIDEr == 0:
        return f"CIDEr is 0 on {photos} photos: no caption is like a reference; train it longer"
    return None
