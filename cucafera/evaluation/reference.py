"""Published scores of the original cucafera, for comparison.

Source: model card of pauhidalgoo/cucafera-instruct on the Hugging Face hub, README of the original; catalan_bench of
lm-evaluation-harness, zero-shot except where a task sets its own number of examples (phrases_*: 5).
"""

REFERENCE: dict[str, dict[str, tuple[float, float | None]]] = {
    "arc_ca_challenge": {"acc": (0.2295, 0.0123), "acc_norm": (0.2534, 0.0127)},
    "arc_ca_easy": {"acc": (0.4238, 0.0101), "acc_norm": (0.4108, 0.0101)},
    "belebele_cat_Latn": {"acc": (0.2289, 0.0140), "acc_norm": (0.2289, 0.0140)},
    "cabreu_abstractive": {"bleu": (2.8684, 0.2838), "rouge1": (0.1769, None)},
    "cabreu_extractive": {"bleu": (1.3677, 0.1970), "rouge1": (0.1829, None)},
    "cabreu_extreme": {"bleu": (1.3403, 0.1363), "rouge1": (0.1217, None)},
    "catalanqa": {"exact_match": (0.0037, 0.0013), "f1": (0.0991, 0.0032)},
    "catcola": {"acc": (0.2967, 0.0143), "mcc": (0.0723, 0.0175)},
    "copa_ca": {"acc": (0.6140, 0.0218)},
    "coqcat": {"em": (0.1433, 0.0143), "f1": (0.2227, 0.0142)},
    "flores_ca": {"bleu": (0.5934, 0.0263)},
    "mgsm_direct_ca": {"exact_match": (0.0, None)},
    "openbookqa_ca": {"acc": (0.2120, 0.0183), "acc_norm": (0.3160, 0.0208)},
    "parafraseja": {"acc": (0.0, None)},
    "paws_ca": {"acc": (0.5080, 0.0112)},
    "phrases_ca-va": {"bleu": (40.3898, 1.6151)},
    "phrases_va-ca": {"bleu": (39.1577, 1.1630)},
    "piqa_ca": {"acc": (0.5996, 0.0114), "acc_norm": (0.6121, 0.0114)},
    "siqa_ca": {"acc": (0.3705, 0.0109)},
    "teca": {"acc": (0.3751, 0.0105)},
    "wnli_ca": {"acc": (0.5493, 0.0595)},
    "xnli_ca": {"acc": (0.4261, 0.0099)},
    "xquad_ca": {"exact_match": (0.0067, 0.0024), "f1": (0.0842, 0.0041)},
    "xstorycloze_ca": {"acc": (0.5817, 0.0127)},
}
"""By task and metric: the value and its standard error, None where none was published."""
