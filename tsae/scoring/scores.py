"""Every score side by side, one row a live feature, and how far to trust each."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.sparse import csc_array
from scipy.stats import spearmanr

from tsae.scoring.heldout import LEVELS, Text, half
from tsae.scoring.ladder import ladder
from tsae.scoring.rules import explained
from tsae.scoring.tokens import WEIGHTS, token_statistics

FIRST = ["feature", "explanation", "complexity_1", "complexity_3", "tokens_firing", "told_firing",
         "detection", "fuzzing", "firings", "frequency", "peak_code"]  # columns to look at first
MEANINGS = {  # what each column of `scored` (and of dictionary.dictionary) says, in a few words
    "firings": "positions where it fires", "modal_token": "the token with most of its activation",
    **{f"r2_{n}": f"how well the last {n} tokens predict its code (R², held-out)"
       for n in range(1, LEVELS + 1)},
    **{f"auc_{n}": f"how well the last {n} tokens tell its firings from silence (AUC, held-out)"
       for n in range(1, LEVELS + 1)},
    "complexity_1": "share of its code that the token leaves unexplained",
    "complexity_3": "share of its code that the last three tokens leave unexplained",
    **{f"{score}_{name}": f"{meaning} {over}" for score, meaning in (
        ("tokens", "effective number of tokens over"),
        ("modal_share", "share of the commonest token in"),
        ("bits", "bits that firing and token share,"),
        ("told", "share of its firing that the token tells,")) for name, over in WEIGHTS.items()},
    "rule": "the kind of rule that finds its firings best", "explanation": "the rule itself",
    "detection": "the rule's balanced accuracy over the whole text (0.5 is chance)",
    "detection_mass": "the same, firings weighted by their codes",
    "precision": "share of the rule's hits where it fires",
    "recall": "share of its firings that the rule finds",
    "rule_f1": "precision and recall of the rule in one",
    "fuzzing": "the rule's balanced accuracy close to its firings",
    "nearest_feature": "the feature with the most similar decoder row",
    "nearest_cosine": "cosine to that row",
    "token_share": "share of its decoder row in the leading directions of the unigrams"}


def scored(codes: csc_array, text: Text) -> pd.DataFrame:
    """Every score of codes (m, n): one row a live feature, the columns of MEANINGS up to fuzzing.

    Besides: feature, frequency (share of positions), peak_code (in units of the SAE's scale).
    """
    fired = np.diff(codes.indptr)
    first = pd.DataFrame(dict(feature=np.arange(len(fired)), firings=fired,
                              frequency=fired / codes.shape[0],
                              peak_code=codes.max(axis=0).toarray().ravel()))
    parts = [first, ladder(codes, text), token_statistics(codes, text), explained(codes, text)]
    table = pd.concat(parts, axis=1)
    return table[[*FIRST, *table.columns.drop(FIRST)]][fired > 0].reset_index(drop=True)


def reliability(codes: csc_array, text: Text,
                score: Callable[[csc_array, Text], pd.DataFrame] = scored, seed: int = 1,
                least: int = 20) -> pd.DataFrame:
    """Test and retest: each score on two disjoint halves of the documents, one row a score.

    spearman: rank correlation over the `features` that fire at least `least` times in both halves;
    corrected: what it would be with all of the text in each (Spearman and Brown).
    """
    first = half(text.document, seed)
    tables = [score(codes[mask], text.take(mask)).set_index("feature") for mask in (first, ~first)]
    one, other = (table[table["firings"] >= least] for table in tables)
    both = one.index.intersection(other.index)
    rows = []
    for name in one.select_dtypes("number").columns.drop("modal_token", errors="ignore"):
        pair = pd.concat([one.loc[both, name], other.loc[both, name]], axis=1).dropna().to_numpy()
        flat = len(pair) < 3 or (np.ptp(pair, axis=0) == 0).any()
        rho = np.nan if flat else spearmanr(*pair.T).statistic
        rows.append(dict(score=name, spearman=rho, corrected=2 * rho / (1 + rho),
                         features=len(pair)))
    return pd.DataFrame(rows)
