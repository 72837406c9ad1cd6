"""Written reports against references, by the packages whose figures papers print: sacreBLEU and rouge-score.

These count shared words. A report that says the opposite with the same words scores high; they compare systems on one
set, and say nothing about clinical correctness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_medgpt.config.errors import UsageError

ROUGE = ("rouge1", "rouge2", "rougeL")


def written(text: str) -> str:
    """White space made single: line breaks of a report are layout."""
    return " ".join(text.split())


def text_figures(references: Sequence[str], outputs: Sequence[str | None]) -> dict[str, Any]:
    """Corpus BLEU-1 to -4, mean ROUGE F1 and the share of exact matches, all in 0..1; an absent output is empty.

    BLEU is sacreBLEU's on lower-cased text with its 13a tokenizer and no smoothing, its signature given beside it;
    ROUGE uses Porter's stemmer. Exact compares after making white space single, case kept.

    Raises:
        UsageError: a package is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise UsageError(f"protocol report needs {error.name}; pip install 'megatron-medgpt[reports]'") from None
    wanted, given = [written(text) for text in references], [written(text or "") for text in outputs]
    figures: dict[str, Any] = {"exact": _mean([float(a == b) for a, b in zip(wanted, given)])}
    for order in (1, 2, 3, 4):
        bleu = BLEU(lowercase=True, max_ngram_order=order, smooth_method="none")
        figures[f"bleu{order}"] = round(bleu.corpus_score(given, [wanted]).score / 100, 6)
        figures["bleu_signature"] = str(bleu.get_signature())
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    scores = [scorer.score(reference, output) for reference, output in zip(wanted, given)]
    figures |= {name: _mean([score[name].fmeasure for score in scores]) for name in ROUGE}
    figures["mean_words"] = {"reference": _mean([len(t.split()) for t in wanted]),
                             "output": _mean([len(t.split()) for t in given])}  # fmt: skip
    return figures


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 6) if values else 0.0
