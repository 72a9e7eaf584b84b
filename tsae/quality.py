"""What features do, how a dictionary and a table are made, and how two kinds of SAE compare over all of their features.

effects: a feature taken out and doubled in the language model; dictionary, probes: signs of splitting and absorption;
table: the lookup, token by token; compare: two kinds of SAE in views that can disagree, with intervals.
"""

import numpy as np
import pandas as pd
import torch
from scipy import stats
from scipy.sparse import csc_array
from torch.nn.functional import cosine_similarity, normalize
from tqdm import tqdm

from tsae.evaluate import squared_errors
from tsae.heldout import Text
from tsae.sae import SAE
from tsae.scores import firings, spread


def residuals(lm, rows: torch.Tensor, layer: int, most_gb: float = 1.0) -> torch.Tensor | None:
    """Residuals (N, T, d) float32 of token rows (N, T) for `effects` of several SAEs, in main memory; None over `most_gb`."""
    if rows.numel() * lm.d_model * 4 > most_gb * 1e9:
        return None
    return torch.cat([lm.residuals(part, [layer])[layer].cpu() for part in rows.split(64)])


def effects(lm, sae: SAE, layer: int, codes: csc_array, text: Text, rows: torch.Tensor, contexts: int = 2,
            before: int = 0, top: int = 8, batch: int = 128, held: torch.Tensor | None = None) -> pd.DataFrame:
    """The change in the next-token distribution when each live feature is ablated or boosted at its own firings.

    `contexts` firings of each feature, evenly over the ranks of its codes (m, n), each at the end of its row up to there
    (`before` > 0: of BOS and the last `before` tokens, faster; what a feature reads further back is then lost): code x
    decoder row is subtracted from, or once more added to, the residual of that one position at `layer`. One pass gives
    the clean, ablated and boosted distributions of a batch. `rows` (N, T) are the text's tokens, `held` their `residuals`
    where these were computed before (not with `before`). Columns: feature,
    contexts; kl_ablate, kl_boost: KL(clean || patched) in nats, means over contexts; promoted, suppressed: the `top`
    tokens whose probability differs most between boosted and ablated; direct_promoted, direct_suppressed: by direct
    logit attribution, the decoder row times the unembedding; direct_agreement: correlation over the vocabulary of that
    attribution with the change in log-probability, noise where the kl is next to nothing.
    """
    position, feature, code = firings(codes)
    picked = spread(codes, np.ones(codes.shape[0], bool), contexts)
    picked = picked[np.argsort(feature[picked], kind="stable")]
    position, feature, code = position[picked], feature[picked], torch.from_numpy(code[picked]).float()
    readers, each, parts = unembedding(lm), max(1, 2**25 // lm.vocabulary), []
    live = np.unique(feature)
    for some in tqdm(np.split(live, range(each, len(live), each)), "effects", leave=False):
        which = np.flatnonzero(np.isin(feature, some))
        parts.append(_effects(lm, sae, layer, rows, text.row[position[which]], text.column[position[which]], some,
                              np.searchsorted(some, feature[which]), code[which], before, top, batch, readers, held))
    return pd.concat(parts, ignore_index=True)


@torch.no_grad()
def _effects(lm, sae, layer, rows, row, column, live, of, code, before, top, batch, readers, held) -> pd.DataFrame:
    """`effects` of the features `live` (f,): context i is at row[i], column[i], of feature live[of[i]]."""
    kl, moved = torch.zeros(2, len(live)), torch.zeros(2, len(live), lm.vocabulary)
    batch = max(1, min(batch, 2**26 // (24 * lm.vocabulary)))  # logits at once: 8 columns of three copies of each row
    # Rows of one length go together; what comes after a position changes nothing there, so that lengths can be rounded up.
    last = np.minimum(column, before) if before else np.minimum(column | 7, rows.shape[1] - 1)
    for end in np.unique(last):
        for part in np.split(group := np.flatnonzero(last == end), range(batch, len(group), batch)):
            at, columns = column[part], np.arange(end + 1)[None]
            if before:
                columns = np.c_[np.zeros((len(part), 1), int), at[:, None] + columns[:, 1:] - end]
                at = np.full(len(part), end)
            where = torch.from_numpy(row[part, None]), torch.from_numpy(columns)
            tokens = rows[where]
            x = lm.residuals(tokens, [layer])[layer] if held is None or before else held[where].to(lm.device)
            rows_of = sae.W_dec[torch.from_numpy(live[of[part]]).to(x.device)]
            step = code[part, None].to(x.device) * rows_of * sae.scale
            steps = torch.cat([torch.zeros_like(step), -step, step])
            logs = lm.next_token_logits(tokens.repeat(3, 1), layer, lambda a, steps=steps: a + steps, x.repeat(3, 1, 1),
                                        torch.from_numpy(at).repeat(3))
            clean, ablated, boosted = logs.log_softmax(-1).cpu().chunk(3)
            to = torch.from_numpy(of[part])
            for i, patched in enumerate((ablated, boosted)):
                kl[i].index_add_(0, to, (clean.exp() * (clean - patched)).sum(-1))
            moved[0].index_add_(0, to, boosted.exp() - ablated.exp())
            moved[1].index_add_(0, to, boosted - ablated)
    count = torch.from_numpy(np.bincount(of, minlength=len(live)))
    direct = sae.W_dec[torch.from_numpy(live)].cpu() @ readers.T
    agreement = cosine_similarity(moved[1] - moved[1].mean(-1, keepdim=True), direct, dim=-1)
    found = dict(feature=live, contexts=count.numpy(), kl_ablate=(kl[0] / count).numpy(),
                 kl_boost=(kl[1] / count).numpy())
    for name, by in (("", moved[0]), ("direct_", direct)):
        for sign, kind in ((1, "promoted"), (-1, "suppressed")):
            found[name + kind] = [", ".join(repr(lm.tokenizer.decode([i])) for i in ids)
                                  for ids in (sign * by).topk(top, dim=-1).indices.tolist()]
    return pd.DataFrame(found | dict(direct_agreement=agreement.numpy()))


@torch.no_grad()
def unembedding(lm) -> torch.Tensor:
    """What each token's logit reads of the residual stream: (V, d) float32, the gain of the final norm folded in.

    Less its mean over tokens, to which probabilities are blind, and over coordinates where the norm takes that out.
    """
    readers = lm.model.get_output_embeddings().weight.float().cpu()
    blocks = {id(module) for block in lm.blocks for module in block._module.modules()}
    norms = [module for module in lm.model.modules() if "Norm" in type(module).__name__ and id(module) not in blocks]
    if norms:
        signs = torch.ones(lm.d_model).to(next(lm.model.parameters()))
        signs[::2] = -1.0  # mean 0 and rms 1: what comes out is gain x signs + bias
        readers = readers * ((norms[-1](signs) - norms[-1](-signs)) / 2 * signs).float().cpu()
    readers = readers - readers.mean(0)
    return readers - readers.mean(-1, keepdim=True) if lm.centred else readers


@torch.no_grad()
def dictionary(sae: SAE, unigrams: torch.Tensor, rank: int = 0, batch: int = 1024) -> pd.DataFrame:
    """How each decoder row lies: columns feature, nearest_feature, nearest_cosine, token_share.

    nearest: the other row with the largest cosine; above 0.9 it is a near-duplicate, a sign of splitting. token_share:
    the squared norm within the `rank` directions in which `unigrams` (m, d), raw, vary most; rank 0 is d / 4, so that a
    random row has a share of 1/4 (with more tokens than dimensions their full span is everything).
    """
    rank = rank or max(1, sae.d_model // 4)
    W = normalize(sae.W_dec.float(), dim=-1)
    directions = torch.linalg.eigh(torch.cov(unigrams.float().to(W.device).T)).eigenvectors[:, -rank:]
    near, which = [], []
    for first in range(0, sae.n, batch):
        cosines = W[first:first + batch] @ W.T
        cosines[torch.arange(len(cosines)), torch.arange(first, first + len(cosines))] = -2
        best = cosines.max(-1)
        near.append(best.values.cpu()), which.append(best.indices.cpu())
    return pd.DataFrame(dict(feature=np.arange(sae.n), nearest_feature=torch.cat(which).numpy(),
                             nearest_cosine=torch.cat(near).numpy(),
                             token_share=(W @ directions).square().sum(-1).cpu().numpy()))


def split_tokens(scores: pd.DataFrame, share: float = 0.5) -> pd.Series:
    """For each row of scores: how many features have this modal token with at least `share` of their mass, 0 if it has
    not.

    More than 1 is a sign of splitting: several features for one token.
    """
    owners = scores["modal_share_mass"] >= share
    counts = scores["modal_token"][owners].value_counts()
    return scores["modal_token"].map(counts).where(owners, 0).fillna(0).astype(int)


def probes(codes: csc_array, text: Text, precise: float = 0.9, rare: float = 0.2, least: int = 5) -> pd.DataFrame:
    """Sparse probing of what the text knows without labels: one row an attribute, its best single feature.

    Chosen on the fit half, scored on the other. Columns: attribute, share of positions; auc and its feature (by the
    code's rank, silence last); f1 and its feature (by firing); specialists: features that fire in at least `precise` of
    their firings where the attribute holds, and at less than `rare` of those places; absorbed: share of those places
    where the best feature by F1 is silent and a specialist fires, of all where it is silent; beside: the same where it
    fires. Absorbed well above beside is a sign of absorption (Chanin et al. 2024). Features with under `least` firings
    are no specialists.
    """
    flags = text.ids[text.attributes].T.astype(bool)
    auc, hits, fired, true = _probed(codes[text.fit], flags[text.fit])
    auc_held, hits_held, fired_held, true_held = _probed(codes[~text.fit], flags[~text.fit])
    f1 = 2 * hits / np.maximum(fired[:, None] + true, 1)
    f1_held = 2 * hits_held / np.maximum(fired_held[:, None] + true_held, 1)
    binary, rows = codes.astype(bool), []
    for a, rule in enumerate(text.attributes):
        by_auc, by_f1 = int(np.argmax(auc[:, a])), int(np.argmax(f1[:, a]))
        specific = (hits[:, a] >= precise * fired) & (hits[:, a] < rare * true[a]) & (fired >= least)
        specific[by_f1] = False
        where = ~text.fit & flags[:, a]
        some = np.asarray(binary[:, np.flatnonzero(specific)].sum(axis=1)).ravel()[where] > 0
        silent = codes[:, [by_f1]].toarray().ravel()[where] == 0
        rows.append(dict(attribute=text.names[rule], share=flags[:, a].mean(), auc=auc_held[by_auc, a],
                         auc_feature=by_auc, f1=f1_held[by_f1, a], f1_feature=by_f1, specialists=int(specific.sum()),
                         absorbed=some[silent].mean() if silent.any() else np.nan,
                         beside=some[~silent].mean() if (~silent).any() else np.nan))
    return pd.DataFrame(rows)


def _probed(codes: csc_array, flags: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """AUC (n, a) of codes (m, n) for flags (m, a); firings where they hold (n, a), firings (n,), places where they hold
    (a,).

    AUC by rank sums: the ranks of a feature's firings, less that of its silence, are as sparse as its codes.
    """
    m, (_, j, v) = codes.shape[0], firings(codes)
    keys = (j.astype(np.uint64) << np.uint64(32)) | v.astype(np.float32).view(np.uint32)
    _, which, ties = np.unique(keys, return_inverse=True, return_counts=True)
    fired = np.diff(codes.indptr)
    rank = (ties.cumsum() - (ties - 1) / 2)[which] - codes.indptr[j]  # among the feature's own firings, ties shared
    above = csc_array(((m - fired)[j] + rank - (m - fired[j] + 1) / 2, codes.indices, codes.indptr), shape=codes.shape)
    true = flags.sum(axis=0)
    total = above.T @ flags.astype(np.float64) + np.outer((m - fired + 1) / 2, true)
    with np.errstate(divide="ignore", invalid="ignore"):
        auc = (total - true * (true + 1) / 2) / (true * (m - true))
    return np.nan_to_num(auc, nan=0.5), codes.astype(bool).T @ flags.astype(np.float64), fired, true


@torch.no_grad()
def table(sae: SAE, unigrams: torch.Tensor, x: torch.Tensor, t: torch.Tensor, count: np.ndarray | None = None,
          batch: int = 4096) -> pd.DataFrame:
    """The lookup, one row a token that occurs in the pairs x (m, d) raw, t (m,).

    count: how often it occurs, or `count` (V,), say of the training text; cosine_unigram, ratio_unigram: of its row to
    its unigram residual (V, d), raw, ratio of norms; cosine_mean, ratio_mean: of what the table predicts alone (row +
    b_dec) to the token's mean activation in these pairs, the best that any table could predict; nmse_table, nmse: error
    of the table alone and of the whole SAE; nearest_token, nearest_cosine: the most similar other row of a token that
    occurs.
    """
    if sae.lookup == "none":
        raise ValueError("this SAE has no lookup table whose quality could be told")
    ids, which = torch.unique(t.cpu(), return_inverse=True)
    mean, errors, seen = torch.zeros(len(ids), sae.d_model), torch.zeros(2, len(ids)), torch.bincount(which).float()
    for a, tokens, to in zip(x.split(batch), t.split(batch), which.split(batch)):
        mean.index_add_(0, to, a.float().cpu())
        for i, a_hat in enumerate((sae.table_alone(tokens), sae(a, tokens))):
            errors[i].index_add_(0, to, squared_errors(a, a_hat).float().cpu())
    mean, errors = mean / seen.unsqueeze(-1), (errors / seen).numpy()
    rows, alone = sae.W_lookup[ids.to(x.device)].cpu() * sae.scale, sae.table_alone(ids.to(x.device)).cpu()
    found = dict(token=ids.numpy(), count=seen.long().numpy() if count is None else np.asarray(count)[ids.numpy()])
    for name, ours, theirs in (("unigram", rows, unigrams.cpu()[ids]), ("mean", alone, mean)):
        found[f"cosine_{name}"] = cosine_similarity(ours, theirs, dim=-1).numpy()
        found[f"ratio_{name}"] = (ours.norm(dim=-1) / theirs.norm(dim=-1)).numpy()
    unit, nearest = normalize(rows, dim=-1), []
    for first in range(0, len(unit), batch):
        cosines = unit[first:first + batch] @ unit.T
        cosines[torch.arange(len(cosines)), torch.arange(first, first + len(cosines))] = -2
        nearest.append(torch.stack([part.float() for part in cosines.max(-1)]))
    near, at = torch.cat(nearest, 1)
    return pd.DataFrame(found | dict(nmse_table=errors[0], nmse=errors[1], nearest_token=ids[at.long()].numpy(),
                                     nearest_cosine=near.numpy()))


def by_count(quality: pd.DataFrame, base: float = 4.0) -> pd.DataFrame:
    """Means of a table's quality over tokens in bins of count, 0 and [base^i, base^(i+1)): columns low, high, tokens, and
    scores."""
    count = quality["count"].to_numpy()
    bins = np.where(count == 0, -1, np.floor(np.log(np.maximum(count, 1) + 0.5) / np.log(base))).astype(int)
    means = quality.drop(columns=["token", "nearest_token", "count"]).groupby(bins).mean()
    i, tokens = means.index.to_numpy(), quality.groupby(bins).size()
    means.insert(0, "low", np.where(i < 0, 0, base**np.maximum(i, 0)).astype(int))
    means.insert(1, "high", np.where(i < 0, 0, base**np.maximum(i + 1, 0) - 1).astype(int))
    means.insert(2, "tokens", tokens)
    return means.reset_index(drop=True)


VIEWS = ("overall", "within frequency bins", "at equal L0", "at equal nmse")


def compare(scores: pd.DataFrame, measures: list[str], by: str = "table", setting: str = "k", at=None, bins: int = 6,
            least: int = 5, draws: int = 300, seed: int = 0, level: float = 0.95) -> pd.DataFrame:
    """Two kinds of SAE over all their features: the second value of column `by` less the first, in four views.

    `scores`: one row a feature; columns `by`, seed, frequency, the `measures`, and for the last two views l0, nmse (of
    the SAE) and `setting`, which tells apart the SAEs of a kind and seed. Views: overall, at setting `at` (the middle
    one when None); within `bins` equal bins of log frequency there, bins in which every SAE has at least `least`
    features, weighted by the features of both kinds in them; at equal L0 and at equal nmse: mean scores interpolated
    along each kind's front in log L0 or log nmse, averaged over the stretch `over` that all fronts cover. Intervals:
    Student's t over the differences of the seeds, which saw the same batches, with the spread of these or that of a
    bootstrap (`draws`) over the features within each SAE, whichever is larger. Columns: measure, view, a column a kind,
    difference, low, high, says, over, and verdict, one for all views of a measure; nan and "not comparable" where there
    are fewer than two seeds or nothing in common. Raises ValueError unless there are two kinds that share seeds.
    """
    kinds = list(scores[by].drop_duplicates())
    if len(kinds) != 2:
        raise ValueError(f"a comparison needs two kinds of SAE in column {by!r}, got {kinds}")
    scores = scores.assign(**{setting: 0}) if setting not in scores else scores
    settings = sorted(scores[setting].unique())
    at = settings[(len(settings) - 1) // 2] if at is None else at
    seeds = sorted(set.intersection(*(set(part["seed"]) for _, part in scores.groupby([by, setting]))))
    if not seeds or at not in settings:
        raise ValueError(f"no seed has SAEs of both kinds at every {setting}, or none at {at}: it takes {settings}")
    random = np.random.default_rng(seed)
    cells = {key: part for key, part in scores.groupby([by, setting, "seed"])}
    logs = np.log10(scores.loc[scores[setting] == at, "frequency"])
    edges = np.linspace(logs.min(), logs.max(), bins + 1)[1:-1]

    def means(kind, which, edges=()):
        """(draws + 1, seeds, bins, measures), the features as they are first."""
        return np.stack([_resampled(cells[kind, which, one], measures, edges, draws, random) for one in seeds], 1)

    views = dict.fromkeys(VIEWS)  # view: what it covers, and for each kind (draws + 1, seeds, measures)
    overall = {(kind, which): means(kind, which)[:, :, 0] for kind in kinds for which in settings}
    views[VIEWS[0]] = f"{setting} {at}", [overall[kind, at] for kind in kinds]
    counts = np.stack([np.bincount(np.digitize(np.log10(cells[kind, at, one]["frequency"]), edges), minlength=bins)
                       for kind in kinds for one in seeds])
    common = counts.min(0) >= least
    if common.any():
        weights = counts.sum(0)[common] / counts[:, common].sum()
        binned = [means(kind, at, edges)[:, :, common] for kind in kinds]
        views[VIEWS[1]] = f"{common.sum()} of {bins} bins", [np.einsum("dsbm,b->dsm", side, weights) for side in binned]
    for view, column in zip(VIEWS[2:], ("l0", "nmse")):
        if column in scores and len(settings) > 1:
            xs = [np.log([[cells[kind, which, one][column].iloc[0] for which in settings] for one in seeds])
                  for kind in kinds]
            views[view] = _along([np.stack([overall[kind, which] for which in settings], 2) for kind in kinds], xs, column)
    found = pd.concat([_told(views[view], view, kinds, measures, level) for view in VIEWS], ignore_index=True)
    found["order"] = found["measure"].map(measures.index)
    found = found.sort_values("order", kind="stable", ignore_index=True).drop(columns="order")
    return found.assign(verdict=f"{kinds[1]}: " + found["measure"].map(
        {measure: _verdict(rows) for measure, rows in found.groupby("measure")}))


def _told(view: tuple | None, name: str, kinds: list, measures: list[str], level: float) -> pd.DataFrame:
    """The rows of one view of `compare`, all measures."""
    over, sides = view or ("", [np.full((2, 1, len(measures)), np.nan)] * 2)
    gap, seeds = sides[1] - sides[0], sides[0].shape[1]
    half = np.full(len(measures), np.nan)
    if seeds > 1:
        drawn = np.where(np.isfinite(gap[1:]), gap[1:], gap[0])  # a small bin can be drawn empty
        variance = np.maximum(gap[0].var(0, ddof=1), drawn.var(0, ddof=1).mean(0))
        half = stats.t.ppf((1 + level) / 2, seeds - 1) * np.sqrt(variance / seeds)
    difference = gap[0].mean(0)
    low, high = difference - half, difference + half
    says = np.select([np.isnan(half), low > 0, high < 0], ["not comparable", "higher", "lower"], "not resolved")
    return pd.DataFrame({"measure": measures, "view": name, kinds[0]: sides[0][0].mean(0), kinds[1]: sides[1][0].mean(0),
                         "difference": difference, "low": low, "high": high, "says": says, "over": over})


def _verdict(rows: pd.DataFrame) -> str:
    """What the views of a measure say together; those that could not be compared are left out."""
    told = {row.view: row.says for row in rows.itertuples() if row.says != "not comparable"}
    if len(set(told.values())) > 1:
        return "views disagree: " + ", ".join(f"{says} {view}" for view, says in told.items())
    if not told:
        return "not comparable"
    return f"{next(iter(told.values()))} {'in every view' if len(told) == len(VIEWS) else ', '.join(told)}"


def _resampled(part: pd.DataFrame, measures: list[str], edges, draws: int, random) -> np.ndarray:
    """Means (draws + 1, bins, measures) over features drawn with replacement; the first is over all as they are.

    Weights from a multinomial in place of drawn indices: one product gives all means.
    """
    values = part[measures].to_numpy(float)
    bins = np.eye(len(edges) + 1)[np.digitize(np.log10(part["frequency"]), edges)]
    known = np.isfinite(values)
    columns = np.stack([np.where(known, values, 0), known])[:, :, None]  # what is summed, and how many
    columns = (bins[:, :, None] * columns).reshape(2, len(part), -1)
    weights = random.multinomial(len(part), np.full(len(part), 1 / len(part)), size=draws + 1).astype(float)
    weights[0] = 1
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((weights @ columns[0]) / (weights @ columns[1])).reshape(draws + 1, len(edges) + 1, len(measures))


def _along(fronts: list[np.ndarray], xs: list[np.ndarray], column: str, points: int = 17) -> tuple | None:
    """What stretch of `column` all fronts cover, and the means (draws, seeds, measures) over it of each kind's fronts.

    Fronts (draws, seeds, settings, measures) at the logs xs (seeds, settings). None where they cover none.
    """
    low, high = max(x.min(1).max() for x in xs), min(x.max(1).min() for x in xs)
    if not low < high:
        return None
    grid, found = np.linspace(low, high, points), []
    for front, x in zip(fronts, xs):
        shares = np.stack([[np.interp(grid, one[order], unit).mean() for unit in np.eye(len(one))[:, order]]
                           for one in x for order in [np.argsort(one)]])
        found.append(np.einsum("st,dstm->dsm", shares, front))
    return f"{column} {np.exp(low):.3g} to {np.exp(high):.3g}", found
