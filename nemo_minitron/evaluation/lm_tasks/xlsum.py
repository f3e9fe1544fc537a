"""Functions that ``xlsum_en.yaml`` calls: its documents and its metric."""

import functools
from typing import Any

_KINDS = ("rougeL", "rouge1", "rouge2")


def fifth(documents: Any) -> Any:
    """Every fifth document of a ``datasets.Dataset``."""
    return documents.select(range(0, len(documents), 5))


def rouge(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """F-measures of ROUGE between what was written and the summary, words stemmed, 0 to 1."""
    scores = _scorer().score(document["summary"], results[0].strip())
    return {kind: scores[kind].fmeasure for kind in _KINDS}


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(_KINDS), use_stemmer=True)
