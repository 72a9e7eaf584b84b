"""Sparse probing of labels that a text gives free: its package, section, century, author.

The unit is a document: its positions' codes are averaged. Probes are fitted on some documents and
scored on others; those may come from the same file. Beside an SAE's features stand tokens: how
often each occurs in a document. A tokenized SAE's dictionary is both, as a row of the table is one
more unit.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csc_array, csr_array
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression

from tsae.evaluate import interval


def pooled(codes: csc_array, document: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Mean codes (D, n) of the documents `of` (D,), from codes (m, n) of positions (m,) in them."""
    place = np.searchsorted(of, document).clip(max=len(of) - 1)
    mine = np.flatnonzero(of[place] == document)
    counts = np.bincount(place[mine], minlength=len(of))
    mean = csr_array((1 / counts[place[mine]], (place[mine], mine)), shape=(len(of), len(document)))
    return (mean @ codes).toarray()


def tokens(t: np.ndarray, vocabulary: int) -> csc_array:
    """Tokens t (m,) as codes (m, vocabulary) that are 1 where the token stands."""
    return csc_array((np.ones(len(t)), (np.arange(len(t)), t)), shape=(len(t), vocabulary))


def long(document: np.ndarray, least: int = 16) -> np.ndarray:
    """The documents (D,), ascending, with `least` positions or more among those of `document`."""
    names, counts = np.unique(document, return_counts=True)
    return names[counts >= least]


def flags(labels: Sequence[dict[str, str]], fit: np.ndarray, test: np.ndarray,
          least: int = 8) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The labels that can be probed: (name, flag of the fit documents (D,), of the test ones).

    A flag is 1 where a document has the value, 0 where it has another of the same kind, nan where
    it has none; `least` documents or more have 1, and as many 0, on either side. Of a kind with two
    values only one is taken: the other's flag is its opposite.
    """
    found = []
    of_kind = sorted({(kind, value) for one in labels for kind, value in one.items()})
    values = Counter(kind for kind, _ in of_kind)
    for kind, value in of_kind:
        if values[kind] == 2 and found and found[-1][0].startswith(f"{kind}: "):
            continue
        each = [np.array([np.nan if kind not in labels[i] else labels[i][kind] == value
                          for i in side], float) for side in (fit, test)]
        if all((flag == want).sum() >= least for flag in each for want in (0, 1)):
            found.append((f"{kind}: {value}", *each))
    return found


def probe(fit: np.ndarray, flag: np.ndarray, test: np.ndarray, k: int) -> np.ndarray:
    """How sure (D,) a logistic regression on k columns is of a flag, on test (D, n).

    The k columns of fit (D', n) are those whose means differ most between flag (D',) 1 and 0, in
    units of their standard deviation; they are standardised.
    """
    mean, deviation = fit.mean(0), fit.std(0)
    varies = deviation > 0
    apart = np.zeros(fit.shape[1])
    difference = np.abs(fit[flag == 1].mean(0) - fit[flag == 0].mean(0))
    apart[varies] = difference[varies] / deviation[varies]
    best = np.argsort(-apart, kind="stable")[:k]
    best = best[varies[best]]
    if not len(best):
        return np.zeros(len(test))
    scaled = [(side[:, best] - mean[best]) / deviation[best] for side in (fit, test)]
    return LogisticRegression(class_weight="balanced", max_iter=1000).fit(
        scaled[0], flag).decision_function(scaled[1])


def probed(inputs: dict[str, tuple[np.ndarray, np.ndarray]], wanted: list,
           ks: Sequence[int]) -> dict[tuple[str, int], np.ndarray]:
    """Guesses (L, D) for the L labels of `wanted` (see `flags`), by input and number of columns.

    `inputs`: by name, columns of the fit documents (D', n) and of the test documents (D, n). A
    guess is nan where a document does not count.
    """
    found = {}
    for name, (fit, test) in inputs.items():
        for k in ks:
            guess = np.full((len(wanted), len(test)), np.nan)
            for row, (_, of_fit, of_test) in zip(guess, wanted):
                use, counted = ~np.isnan(of_fit), ~np.isnan(of_test)
                row[counted] = probe(fit[use], of_fit[use], test[counted], k)
            found[name, k] = guess
    return found


def auc(guess: np.ndarray, flag: np.ndarray) -> float:
    """The chance that a guess (D,) where flag (D,) is 1 is above one where it is 0; nan: left out.

    nan where a side has nobody.
    """
    guess, positive = guess[~np.isnan(flag)], flag[~np.isnan(flag)] == 1
    some = positive.sum()
    if some in (0, len(positive)):
        return float("nan")
    above = rankdata(guess)[positive].sum() - some * (some + 1) / 2
    return above / (some * (len(positive) - some))


def mean_auc(guesses: np.ndarray, flags: np.ndarray, names: Sequence[str],
             over: np.ndarray | None = None, draws: int = 300) -> tuple[float, float, float]:
    """(value, low, high) of the mean AUC of guesses (S, L, D) over seeds and labels.

    flags (L, D) and names "kind: value" as in `flags`; kinds count alike, however many values they
    have. With `over`, guesses of the same shape, how much higher the mean is than theirs. Seeds and
    test documents are drawn anew; as in `evaluate.resampled` an interval is not narrower than
    Student's t over seeds, and one seed has none.
    """
    kinds = [name.partition(":")[0] for name in names]
    weights = np.array([1 / kinds.count(kind) for kind in kinds])

    def mean(of: np.ndarray) -> np.ndarray:
        """(S,) for each seed, on the documents `of`."""
        scores = [[[auc(row[of], flag[of]) for row, flag in zip(one, flags)] for one in side]
                  for side in ((guesses,) if over is None else (guesses, over))]
        scores = np.array(scores[0] if over is None else np.subtract(*scores))
        known = ~np.isnan(scores)
        return np.nansum(weights * scores, axis=1) / (weights * known).sum(axis=1)

    seeds, _, documents = guesses.shape
    each = mean(np.arange(documents))
    value, least, most = interval(each)
    if seeds < 2:
        return value, float("nan"), float("nan")
    generator = np.random.default_rng(0)
    of_documents = generator.integers(documents, size=(draws, documents))
    of_seeds = generator.integers(seeds, size=(draws, seeds))
    drawn = [mean(of)[picked] for of, picked in zip(of_documents, of_seeds)]
    low, high = np.quantile(np.mean(drawn, axis=1), [0.025, 0.975])
    return value, min(low, least), max(high, most)
