"""Overlap of a generated text with the true one, and how monotonous it is.

ROUGE takes its words from ``rouge_score``'s tokenizer, as TOFU and OpenUnlearning do, which keeps ``a-z`` and ``0-9``
and parts "Müller" into "m" and "ller". It would find nothing in "Аккра" or "阿克拉". Where the true answer has a letter
of another script than Latin, or none that this tokenizer knows, both texts are therefore taken apart by
:func:`soul.words.words`: Unicode words, of which those of ASCII letters are stemmed as ever, and single characters
where a script puts no space between words. All other answers have the official number, to the bit.
"""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from soul.words import words


class _AnyScript:
    """Words as :class:`RougeScorer` asks for them; those of ASCII text are the official ones."""

    def __init__(self, stem: bool) -> None:
        self.official = DefaultTokenizer(stem)

    def tokenize(self, text: str) -> list[str]:
        found = words(text.replace("_", " "))
        return [part for word in found for part in (self.official.tokenize(word) if word.isascii() else [word])]


@functools.cache
def _scorer(*kinds: str, stem: bool, official: bool) -> RougeScorer:
    # building one compiles its tokenizer and stemmer; thousands of rows share it
    return RougeScorer(list(kinds), tokenizer=DefaultTokenizer(stem) if official else _AnyScript(stem))


def _rouge(generated: str, answer: str, *kinds: str, stem: bool = True) -> dict[str, Any]:
    return _scorer(*kinds, stem=stem, official=_is_official(answer)).score(answer, generated)


def _is_official(answer: str) -> bool:
    """Say whether all letters of an answer are Latin, and the official tokenizer finds a word where there is one."""
    if answer.isascii():
        return True
    letters = (c for c in unicodedata.normalize("NFKC", answer) if c.isalpha() and not c.isascii())
    latin = all(unicodedata.name(c, "").startswith("LATIN ") for c in letters)
    return latin and re.search("[a-z0-9]", answer.lower()) is not None


def rouge_l_recall(generated: str, answer: str) -> float:
    """Return the share of the answer's words that the generation holds in the same order.

    ``LCS(generated, answer) / len(answer)`` over lower-cased, Porter-stemmed words (ROUGE-L recall, Lin 2004; as
    TOFU's ``eval_rouge_recall``, arXiv 2401.06121). A long generation is not punished for what it adds.

    Args:
        generated: What the model wrote.
        answer: The true answer.

    Returns:
        A share in [0, 1]; 0 where the answer has no word. What a word is, see :mod:`soul.metrics.text`.

    Example:
        >>> rouge_l_recall("She paints boats.", "She painted a boat"), rouge_l_recall("她生于阿克拉。", "阿克拉")
        (0.75, 1.0)
    """
    return float(_rouge(generated, answer, "rougeL")["rougeL"].recall)


def rouge(generated: str, answer: str, *, stem: bool = True) -> dict[str, float]:
    """Return recall and F1 of ROUGE-1 and ROUGE-L (Lin 2004), by the names ``rouge1_recall`` ... ``rougeL_f1``.

    ROUGE-1 counts words that both texts hold, ROUGE-L the longest common subsequence of words; recall divides by the
    answer's words, precision by the generation's, and F1 is their harmonic mean. MUSE scores knowledge and verbatim
    memorization by ROUGE-L F1, TOFU by recall. All are 0 where a text has no word (see
    :mod:`soul.metrics.text`).

    Args:
        generated: What the model wrote.
        answer: The true answer.
        stem: Take words by their Porter stems, as TOFU and OpenUnlearning; MUSE's own code takes them as they are.

    Example:
        >>> rouge("a boat she paints", "she paints")["rouge1_f1"]
        0.6666666666666666
    """
    found = _rouge(generated, answer, "rouge1", "rougeL", stem=stem)
    return {
        f"{kind}_{name}": float(value)
        for kind in ("rouge1", "rougeL")
        for name, value in (("recall", found[kind].recall), ("f1", found[kind].fmeasure))
    }


def bleu(generated: str, answer: str) -> float:
    """Return the sentence BLEU-4 of a generation, from 0 to 100 (Papineni et al. 2002), by sacrebleu.

    ``BP * exp(mean_n log p_n)``: modified n-gram precisions up to 4 words, cased, tokenised as WMT does (13a), smoothed
    exponentially (Chen and Cherry 2014, method 3), times a penalty for brevity. Orders of which the generation has no
    n-gram are left out, so that a short text that is right has 100. 0 for an empty generation or answer.

    Raises:
        ValueError: sacrebleu is not installed.
    """
    if not generated.strip() or not answer.strip():
        return 0.0
    return float(need_sacrebleu().sentence_bleu(generated, [answer]).score)


def corpus_bleu(generated: Sequence[str], answers: Sequence[str]) -> float:
    """Return the corpus BLEU-4 of generations, from 0 to 100: n-grams are counted over all of them (sacrebleu).

    Not the mean of :func:`bleu`. 0 where all generations are empty.

    Raises:
        ValueError: sacrebleu is not installed, there is no text, or the sides differ in length.
    """
    if len(generated) != len(answers) or not generated:
        raise ValueError(f"BLEU needs a generation for each answer, got {len(generated)} and {len(answers)}")
    return float(need_sacrebleu().corpus_bleu(list(generated), [list(answers)]).score)


def need_sacrebleu() -> Any:
    """Return the library that BLEU is measured with.

    Raises:
        ValueError: It is not installed.
    """
    try:
        import sacrebleu
    except ImportError:
        raise ValueError("BLEU needs sacrebleu: pip install sacrebleu") from None
    return sacrebleu


def token_entropy(tokens: Sequence[Hashable]) -> float:
    """Return the entropy of the tokens' frequencies, divided by its maximum: 1 where none repeats, 0 where all do.

    ``-sum_v f_v log f_v / log n`` (arXiv 2410.08109, where the tokens are the tokenizer's). 0 for no token; 1 for a
    single one, which repeats nothing (public code: 0).

    Args:
        tokens: Words or token ids of one generation, ``n`` of them.

    Example:
        >>> token_entropy("no no no no".split()), token_entropy("what do you mean".split())
        (0.0, 1.0)
    """
    n = len(tokens)
    if n < 2:
        return float(n)
    return math.fsum(-c / n * math.log(c / n) for c in Counter(tokens).values()) / math.log(n) + 0.0  # no -0


def repetition(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Return the share of n-grams that have occurred before, ``1 - distinct / all`` (seq-rep-n, arXiv 1908.04319).

    0 where there is no n-gram.

    Args:
        tokens: Words or token ids of one generation.
        n: Length of an n-gram.

    Raises:
        ValueError: ``n`` is less than 1.

    Example:
        >>> repetition("a b a b a b".split(), n=2)
        0.6
    """
    if n < 1:
        raise ValueError(f"n must be 1 or more, not {n}")
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
