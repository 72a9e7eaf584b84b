"""Every score side by side, one row a live feature, and how far to trust each."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.sparse import csc_array
from scipy.stats import spearmanr

from tsae.scoring.heldout import Text, half
from tsae.scoring.ladder import ladder
from tsae.scoring.rules import explained
from tsae.scoring.tokens import WEIGHTS, token_statistics

FIRST = ["feature", "explanation", "complexity_1", "complexity_3", "tokens_firing", "told_firing", "detection", "fuzzing",
         "firings", "frequency", "peak_code"]  # of the columns of `scored`, the ones to look at first
MEANINGS = {  # what each column of `scored` (and of quality.dictionary) says, in a few words
    "firings": "positions where it fires", "modal_token": "the token with most of its activation",
    **{f"r2_{n}": f"how well the last {n} tokens predict its code (R², held-out)" for n in (1, 2, 3, 4)},
    **{f"auc_{n}": f"how well the last {n} tokens tell its firings from silence (AUC, held-out)" for n in (1, 2, 3, 4)},
    "complexity_1": "share of its code that the token leaves unexplained",
    "complexity_3": "share of its code that the last three tokens leave unexplained",
    **{f"tokens_{name}": f"effective number of tokens over {over}" for name, over in WEIGHTS.items()},
    **{f"modal_share_{name}": f"share of the commonest token in {over}" for name, over in WEIGHTS.items()},
    **{f"bits_{name}": f"bits that firing and token share, {over}" for name, over in WEIGHTS.items()},
    **{f"told_{name}": f"share of its firing that the token tells, {over}" for name, over in WEIGHTS.items()},
    "rule": "the kind of rule that finds its firings best", "explanation": "the rule itself",
    "detection": "the rule's balanced accuracy over the whole text (0.5 is chance)",
    "detection_mass": "the same, firings weighted by their codes",
    "precision": "share of the rule's hits where it fires", "recall": "share of its firings that the rule finds",
    "rule_f1": "precision and recall of the rule in one", "fuzzing": "the rule's balanced accuracy close to its firings",
    "nearest_feature": "the feature with the most similar decoder row", "nearest_cosine": "cosine to that row",
    "token_share": "share of its decoder row in the leading directions of the unigrams"}


def scored(codes: csc_array, text: Text) -> pd.DataFrame:
    """Every score, one row a live feature: feature, firings, frequency (share of positions), peak_code (in units of the
    SAE's scale), and the columns of `ladder`, `token_statistics` and `explained`."""
    fired = np.diff(codes.indptr)
    first = pd.DataFrame(dict(feature=np.arange(len(fired)), firings=fired, frequency=fired / codes.shape[0],
                              peak_code=codes.max(axis=0).toarray().ravel()))
    table = pd.concat([first, ladder(codes, text), token_statistics(codes, text), explained(codes, text)], axis=1)
    return table[[*FIRST, *table.columns.drop(FIRST)]][fired > 0].reset_index(drop=True)


def reliability(codes: csc_array, text: Text, score: Callable[[csc_array, Text], pd.DataFrame] = scored, seed: int = 1,
                least: int = 20) -> pd.DataFrame:
    """Test and retest: each score computed on two disjoint halves of the documents; columns score, spearman, features.

    Spearman's rank correlation over the features that fire at least `least` times in both. A half has half of the text:
    with all of it scores are better than this (Spearman and Brown: 2 r / (1 + r)), given as `corrected`.
    """
    rows = []
    first = half(text.document, seed)
    tables = [score(codes[mask], text.take(mask)).set_index("feature") for mask in (first, ~first)]
    tables = [table[table["firings"] >= least] for table in tables]
    both = tables[0].index.intersection(tables[1].index)
    for name in tables[0].select_dtypes("number").columns.drop("modal_token", errors="ignore"):
        pair = pd.concat([table.loc[both, name] for table in tables], axis=1).dropna().to_numpy()
        flat = len(pair) < 3 or (np.ptp(pair, axis=0) == 0).any()
        rho = np.nan if flat else spearmanr(*pair.T).statistic
        rows.append(dict(score=name, spearman=rho, corrected=2 * rho / (1 + rho), features=len(pair)))
    return pd.DataFrame(rows)
