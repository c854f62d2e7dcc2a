"""CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726) of lists of words, as a reward."""

import math
from collections import Counter
from collections.abc import Sequence

LONGEST_GRAM, SIGMA = 4, 6.0

Gram = tuple[str, ...]


def count_grams(words: Sequence[str]) -> Counter[Gram]:
    """The number of occurrences of each n-gram of one to four words."""
    return Counter(
        tuple(words[start : start + n])
        for n in range(1, LONGEST_GRAM + 1)
        for start in range(len(words) - n + 1)
    )


class CiderD:
    """CIDEr-D over lists of words. It is equal to what pycocoevalcap calls CIDEr (which clips and
    damps by length as CIDEr-D does), except for the source of the document frequencies.

    As in pycocoevalcap, the length in the damping factor is the number of bigrams.
    """

    def __init__(self, documents: Sequence[Sequence[Sequence[str]]]) -> None:
        """`documents` is [photo][caption][word]. The document frequency of an n-gram is the number
        of photos that have it in a caption."""
        frequency: Counter[Gram] = Counter()
        for captions in documents:
            frequency.update({gram for words in captions for gram in count_grams(words)})
        self.log_documents = math.log(len(documents))
        # Not stored for one photo: log 1 is 0, the default, and most n-grams occur in one only.
        self.log_frequency = {gram: math.log(n) for gram, n in frequency.items() if n > 1}

    def scores(
        self, captions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
    ) -> list[float]:
        """The score of each caption of a photo against all references of the photo, 0 to 10."""
        truths = [self._vector(words) for words in references]
        return [self._score(self._vector(words), truths) for words in captions]

    def _vector(self, words: Sequence[str]) -> tuple[dict[Gram, float], list[float], int]:
        """tf-idf of each gram, the norm over the grams of each size, and the length."""
        weights = {
            gram: count * (self.log_documents - self.log_frequency.get(gram, 0.0))
            for gram, count in count_grams(words).items()
        }
        squares = [0.0] * LONGEST_GRAM
        for gram, weight in weights.items():
            squares[len(gram) - 1] += weight * weight
        return weights, [math.sqrt(square) for square in squares], max(0, len(words) - 1)

    def _score(
        self,
        caption: tuple[dict[Gram, float], list[float], int],
        truths: Sequence[tuple[dict[Gram, float], list[float], int]],
    ) -> float:
        weights, norms, length = caption
        total = 0.0
        for true_weights, true_norms, true_length in truths:
            products = [0.0] * LONGEST_GRAM
            for gram, weight in weights.items():
                true = true_weights.get(gram)
                if true is not None:
                    # Clipped: repeating a word more often than the reference does not help.
                    products[len(gram) - 1] += min(weight, true) * true
            cosines = sum(
                product / (norm * true_norm)
                for product, norm, true_norm in zip(products, norms, true_norms, strict=True)
                if norm and true_norm
            )
            total += cosines * math.exp(-((length - true_length) ** 2) / (2 * SIGMA**2))
        return 10 * total / (LONGEST_GRAM * len(truths))
