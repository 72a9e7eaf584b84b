"""The paper's claims: criteria written down before the run that decides them, held against tables.

`data/claims.csv` has one line a claim: which row of which result table measures it, the bar that
it must clear, the band of the published size where there is one, and when this was written (UTC).
"""

from pathlib import Path

import pandas as pd

from tsae import store

REPRODUCED, DIRECTION, NOT, UNTESTED = VERDICTS = (
    "reproduced", "direction only", "not reproduced", "not testable here")
LONGEST = "longest"  # in `where`: the largest value that the column has


def read(path: Path = store.DATA / "claims.csv") -> pd.DataFrame:
    """The claims. Raises ValueError for a line whose criterion cannot be applied."""
    claims = store.read_table(path).astype({"id": str, "date": str}).fillna(
        {"where": "", "post_hoc": "", "source": ""})
    for row in claims.itertuples():
        if row.better not in ("over", "under") or row.take not in ("only", "lowest", "highest"):
            raise ValueError(f"claim {row.id} of {path} has better {row.better!r} and take "
                             f"{row.take!r}: expected over or under; only, lowest or highest")
    return claims


def held(claims: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Every claim against the result tables in `folder`, which holds manifest.json too.

    Columns id, claim, paper, ours (in words), value, low, high, verdict, criterion, table, post_hoc
    (bool: the criterion is newer than the table, or was changed after a result was known).
    """
    manifest = folder / "manifest.json"
    made = store.read_json(manifest) if manifest.is_file() else {}
    rows = [_judged(claim, folder, made) for claim in claims.itertuples()]
    return pd.DataFrame(rows)


def _judged(claim, folder: Path, made: dict[str, dict]) -> dict:
    about = made.get(f"{claim.table}.csv", {})
    row = _measured(claim, folder, about.get("parameters", {}))
    value, low, high, bound = (row.get(name) for name in ("value", "low", "high", "bound"))
    on = about.get("made", "")
    return dict(id=claim.id, claim=claim.claim, paper=claim.published, ours=_words(row),
                value=value, low=low, high=high,
                verdict=verdict(claim, value, low, high, bool(bound)),
                criterion=criterion(claim), table=claim.table,
                post_hoc=bool(row) and (bool(claim.post_hoc) or on < claim.date))


def _measured(claim, folder: Path, parameters: dict) -> dict:
    """value, low, high, bound of the row that a claim is about; {} where there is none.

    Of several rows as `where` says it is that of the layer among the table's `parameters`. Raises
    ValueError where there are several still, and one was expected.
    """
    path = folder / f"{claim.table}.csv"
    found = store.read_table(path) if path.is_file() else pd.DataFrame()
    for part in filter(None, claim.where.split("; ")):
        column, _, wanted = part.partition("=")
        if column not in found:
            return {}
        if wanted == LONGEST:
            found = found[found[column] == found[column].max()]
        else:
            found = found[found[column].astype(str) == wanted]
    found = found.dropna(subset=[claim.column]) if claim.column in found else found[:0]
    if found.empty:
        return {}
    if claim.take == "only" and len(found) > 1 and "layer" in found:
        found = found[found["layer"] == parameters.get("layer")]
    if claim.take == "only" and len(found) > 1:
        raise ValueError(f"claim {claim.id}: {len(found)} rows of {path} are as {claim.where!r} "
                         "says, one was expected")
    if "bound" in found and not found["bound"].all():
        found = found[~found["bound"].astype(bool)]  # a bound has no size
    row = found.sort_values(claim.column, ascending=claim.take != "highest").iloc[0].to_dict()
    return {name: row[name] for name in ("low", "high", "bound") if name in row} | dict(
        value=float(row[claim.column]))


def verdict(claim, value: float | None, low: float | None, high: float | None,
            bound: bool = False) -> str:
    """One of VERDICTS. The whole interval must clear the bar; the band, it must only meet.

    A value without an interval column is a count; one with an empty interval (one run) decides
    nothing. Of a `bound` is known only that the true value is not lower: it has no size.
    """
    if value is None or low is not None and pd.isna(low) and not bound:
        return UNTESTED
    if low is None or bound and pd.isna(low):
        low = high = value
    if bound and (claim.better == "under" or low <= claim.bar):
        return UNTESTED
    if not (low > claim.bar if claim.better == "over" else high < claim.bar):
        return NOT
    if pd.isna(claim.low):
        return REPRODUCED
    return REPRODUCED if not bound and low <= claim.high and high >= claim.low else DIRECTION


def criterion(claim) -> str:
    """A claim's criterion in words."""
    words = f"{claim.better} {claim.bar:g}, with its interval"
    return words + f"; size {claim.low:g} to {claim.high:g}" * pd.notna(claim.low)


def _words(row: dict) -> str:
    if not row:
        return ""
    if row.get("bound"):
        return f"at least {row['value']:.3g}"
    if pd.isna(row.get("low")):
        return f"{row['value']:.3g}"
    return f"{row['value']:.3g} [{row['low']:.3g}, {row['high']:.3g}]"
