"""Overlap of a generated text with the true one."""

from __future__ import annotations

import functools

from rouge_score.rouge_scorer import RougeScorer


@functools.cache
def _scorer() -> RougeScorer:
    # building one compiles its tokenizer and stemmer; thousands of rows share it
    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l_recall(generated: str, answer: str) -> float:
    """Return the share of the answer's words that the generation holds in the same order.

    ``LCS(generated, answer) / len(answer)`` over lower-cased, Porter-stemmed words (ROUGE-L recall, Lin 2004; as
    TOFU's ``eval_rouge_recall``, arXiv 2401.06121). A long generation is not punished for what it adds.

    Args:
        generated: What the model wrote.
        answer: The true answer.

    Returns:
        A share in [0, 1]; 0 where the answer has no word of Latin letters or digits, which is all the tokenizer knows.

    Example:
        >>> rouge_l_recall("She paints boats.", "She painted a boat")
        0.75
    """
    return float(_scorer().score(answer, generated)["rougeL"].recall)
