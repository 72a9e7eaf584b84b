"""Oracles: transformers with a hook, loops, and comparisons whose answer is planted."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import byte_tokenizer
from scipy import stats
from scipy.sparse import csc_array
from torch.nn.functional import kl_div

from tsae import evaluate, heldout, quality, scores
from tsae.sae import SAE

TOKENS = torch.randint(1, 257, (6, 12), generator=torch.Generator().manual_seed(1))
TOKENS[:, 0] = 0


def random_sae(d: int = 16, n: int = 9, seed: int = 0, **how) -> SAE:
    sae = SAE(d, n, "relu", scale=0.7, **how)
    table = torch.randn(how["vocabulary"], d) if how else None
    sae.start(torch.zeros(d), table, seed=seed)
    return sae


def unpatched_blocks(lm):
    return lm.model.get_submodule(next(name for name, module in lm.model.named_modules()
                                       if isinstance(module, torch.nn.ModuleList) and len(module) == 3))


@torch.no_grad()
def hooked(lm, tokens, layer, change) -> torch.Tensor:
    """Next-token logits with a change to the residual of the last position, by a plain torch hook."""
    def hook(_, args, kwargs):
        x = (args[0] if args else kwargs["hidden_states"]).clone()
        x[:, -1] = x[:, -1] - (x[:, -1].mean(-1, keepdim=True) if lm.centred else 0) + change
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | dict(hidden_states=x))
    handle = unpatched_blocks(lm)[layer].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        return lm.model(tokens).logits[:, -1]
    finally:
        handle.remove()


def test_next_token_logits_are_those_of_the_model(tiny):
    change = torch.randn(6, 16)
    with torch.no_grad():
        clean = tiny.model(TOKENS).logits[:, -1]
    assert torch.allclose(tiny.next_token_logits(TOKENS), clean, atol=1e-4)
    expected = hooked(tiny, TOKENS, 1, change)
    assert not torch.allclose(expected, clean, atol=1e-2)
    assert torch.allclose(tiny.next_token_logits(TOKENS, 1, lambda x: x + change), expected, atol=1e-4)
    held = tiny.residuals(TOKENS, [1])[1]
    assert torch.allclose(tiny.next_token_logits(TOKENS, 1, lambda x: x + change, held), expected, atol=1e-4)
    columns = torch.tensor([3, 9, 3, 5, 8, 4])
    expected = torch.cat([hooked(tiny, row[None, :at + 1], 1, step) for row, at, step in zip(TOKENS, columns, change)])
    found = tiny.next_token_logits(TOKENS, 1, lambda x: x + change, held, columns)
    assert torch.allclose(found, expected, atol=1e-4), "what comes after a column changes nothing there"


def test_the_unembedding_is_what_logits_read(tiny):
    """Behind the final norm, logits less their mean are the readers' products with the normalised stream."""
    norm = [module for module in tiny.model.modules() if "Norm" in type(module).__name__][-1]
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.rand(parameter.shape))
        h = torch.randn(5, 16)
        h = h - h.mean(-1, keepdim=True) if tiny.centred else h
        weight = tiny.model.get_output_embeddings().weight
        logits = (norm(h) - norm(torch.zeros_like(h))) @ weight.T  # less the bias
        expected = (logits - logits.mean(-1, keepdim=True)) * h.square().mean(-1, keepdim=True).sqrt()
        assert torch.allclose(h @ quality.unembedding(tiny).T, expected, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("before, shared", [(6, False), (0, False), (0, True)])
def test_effects_equal_one_hooked_pass_each(tiny_gpt2, before, shared):
    lm, sae = tiny_gpt2, random_sae()
    rows = TOKENS.int()
    keep = lm.keep(rows)
    text = heldout.prepare(rows, keep, byte_tokenizer())
    random = np.random.default_rng(0)
    dense = random.exponential(5, (len(text.t), 9)) * (random.random((len(text.t), 9)) < 0.1).astype(np.float32)
    dense = dense.astype(np.float32)
    dense[:, 4] = 0
    codes = csc_array(dense)
    held = quality.residuals(lm, rows, 2) if shared else None
    found = quality.effects(lm, sae, 2, codes, text, rows, 2, before, top=3, batch=2, held=held).set_index("feature")
    assert list(found.index) == [0, 1, 2, 3, 5, 6, 7, 8] and (found["contexts"] <= 2).all()
    p, j, v = scores.firings(codes)
    chosen = scores.spread(codes, np.ones(len(text.t), bool), 2)
    readers = quality.unembedding(lm)
    for feature in found.index:
        kl, moved, change = [], 0, 0
        for i in chosen[j[chosen] == feature]:
            row, column = text.row[p[i]], text.column[p[i]]
            first = max(1, column - before + 1) if before else 1
            tokens = torch.cat([TOKENS[row, :1], TOKENS[row, first:column + 1]])[None]
            step = float(v[i]) * sae.W_dec[feature] * 0.7
            clean, ablated, boosted = (hooked(lm, tokens, 2, sign * step).log_softmax(-1)[0] for sign in (0, -1, 1))
            kl.append([kl_div(after, clean, log_target=True, reduction="sum").item() for after in (ablated, boosted)])
            moved, change = moved + boosted.exp() - ablated.exp(), change + boosted - ablated
        ours = found.loc[feature, ["kl_ablate", "kl_boost"]].astype(float)
        assert np.allclose(ours, np.mean(kl, 0), rtol=1e-3, atol=1e-6)
        for name, by in (("", moved), ("direct_", readers @ sae.W_dec[feature])):
            order = by.argsort(descending=True).tolist()
            for kind, ids in (("promoted", order[:3]), ("suppressed", order[:-4:-1])):
                assert found.loc[feature, name + kind] == ", ".join(repr(lm.tokenizer.decode([i])) for i in ids)
        expected = np.corrcoef(change.numpy(), (readers @ sae.W_dec[feature]).numpy())[0, 1]
        assert found["direct_agreement"][feature] == pytest.approx(expected, abs=1e-3)


def test_residuals_are_held_where_they_fit(tiny_gpt2):
    rows = TOKENS.int()
    assert torch.equal(quality.residuals(tiny_gpt2, rows, 2), tiny_gpt2.residuals(rows, [2])[2])
    assert quality.residuals(tiny_gpt2, rows, 2, most_gb=1e-6) is None


@torch.no_grad()
def test_duplicates_and_token_directions_are_found():
    sae, random = random_sae(16, 6), torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=random))[0].T
    unigrams = torch.randn(300, 4, generator=random) @ basis[:4] * 5 + 0.1 * torch.randn(300, 16, generator=random) + 3
    sae.W_dec[0], sae.W_dec[1], sae.W_dec[2] = basis[0], basis[8], 0.5**0.5 * (basis[1] + basis[9])
    sae.W_dec[3] = sae.W_dec[5] + 0.01
    sae.normalise()
    found = quality.dictionary(sae, unigrams, batch=4)
    assert found["token_share"][:3].tolist() == pytest.approx([1, 0, 0.5], abs=0.02)
    cosines = sae.W_dec @ sae.W_dec.T - 9 * torch.eye(6)
    assert np.allclose(found["nearest_cosine"], cosines.max(-1).values, atol=1e-6)
    assert found["nearest_feature"].tolist() == cosines.argmax(-1).tolist()
    assert found["nearest_cosine"][3] > 0.9 and found["nearest_feature"][3] == 5 and found["nearest_feature"][5] == 3
    assert quality.dictionary(sae, unigrams, rank=16)["token_share"].tolist() == pytest.approx([1] * 6)


def test_split_tokens_counts_the_owners():
    table = pd.DataFrame(dict(modal_token=[7, 7, 7, 8, 9], modal_share_mass=[0.9, 0.6, 0.1, 1.0, 0.2]))
    assert quality.split_tokens(table).tolist() == [2, 2, 0, 1, 0]


def test_probes_equal_loops_and_see_absorption():
    random, tokenizer = np.random.default_rng(0), byte_tokenizer()
    rows = np.c_[np.zeros((60, 1), int), random.choice(tokenizer.encode("aB1 ."), (60, 40))]
    rows = torch.from_numpy(rows).int()
    text = heldout.prepare(rows, rows != 0, tokenizer)
    m = len(text.t)
    number, digit = text.ids[text.names.index("a number")].astype(bool), random.random(m) < 0.1
    dense = random.exponential(1, (m, 5)) * (random.random((m, 5)) < 0.1)
    dense[:, 1] = np.round(2 * dense[:, 1])  # ties
    dense[:, 2] = number & ~digit  # the general feature, with holes
    dense[:, 3] = number & digit  # the specialist that stands in for it
    codes = csc_array(dense.astype(np.float32))
    found = quality.probes(codes, text, rare=0.3).set_index("attribute")
    assert set(found.index) == set(heldout.OF_TOKEN) | set(heldout.OF_TEXT) | set(heldout.OCCURRENCES)
    one = found.loc["a number"]
    assert one.f1_feature == one.auc_feature == 2 and one.absorbed == 1 and one.beside == 0 and one.specialists == 1
    held, y = ~text.fit, number & ~text.fit
    assert one.f1 == pytest.approx(2 * (dense[y, 2] > 0).sum() / ((dense[held, 2] > 0).sum() + y.sum()))
    assert one.share == pytest.approx(number.mean())
    flags = text.ids[text.attributes].T.astype(bool)[held]
    auc, *_ = quality._probed(codes[held], flags)
    for j in range(5):
        for a in range(flags.shape[1]):
            inside, outside = dense[held][flags[:, a], j], dense[held][~flags[:, a], j]
            if len(inside) and len(outside):
                gap = inside[:, None] - outside
                assert auc[j, a] == pytest.approx(((gap > 0) + (gap == 0) / 2).mean())


@torch.no_grad()
def test_the_table_is_told_token_by_token():
    sae = random_sae(vocabulary=7, lookup="learned")
    sae.b_dec.normal_()
    random = torch.Generator().manual_seed(2)
    unigrams, x = torch.randn(7, 16, generator=random), torch.randn(50, 16, generator=random)
    t = torch.randint(0, 6, (50,), generator=random)
    found = quality.table(sae, unigrams, x, t, batch=8).set_index("token")
    assert found.index.tolist() == sorted(set(t.tolist())) and 6 not in found.index
    for token, row in found.iterrows():
        mine = x[t == token]
        alone, ours, mean = (sae.b_dec + sae.W_lookup[token]) * 0.7, sae.W_lookup[token] * 0.7, mine.mean(0)
        assert row["count"] == len(mine)
        own = unigrams[token]
        assert row.cosine_unigram == pytest.approx((ours @ own / ours.norm() / own.norm()).item(), abs=1e-5)
        assert row.ratio_unigram == pytest.approx((ours.norm() / unigrams[token].norm()).item(), rel=1e-5)
        assert row.cosine_mean == pytest.approx((alone @ mean / alone.norm() / mean.norm()).item(), abs=1e-5)
        assert row.ratio_mean == pytest.approx((alone.norm() / mean.norm()).item(), rel=1e-5)
        assert row.nmse_table == pytest.approx(evaluate.nmse(mine, alone.expand_as(mine)), rel=1e-5)
        assert row.nmse == pytest.approx(evaluate.nmse(mine, sae(mine, t[t == token])), rel=1e-5)
        others = {other: torch.cosine_similarity(ours, sae.W_lookup[other], dim=0).item()
                  for other in found.index if other != token}
        assert row.nearest_token == max(others, key=others.get)
        assert row.nearest_cosine == pytest.approx(max(others.values()), abs=1e-5)
    trained = np.array([0, 3, 4, 15, 16, 63, 64])
    bins = quality.by_count(quality.table(sae, unigrams, x, t, trained))
    assert bins[["low", "high", "tokens"]].values.tolist() == [[0, 0, 1], [1, 3, 1], [4, 15, 2], [16, 63, 2]]
    assert bins["nmse"][2] == pytest.approx(found["nmse"][2:4].mean())
    with pytest.raises(ValueError, match="no lookup table"):
        quality.table(random_sae(), unigrams, x, t)


def sweep(score, seeds=(0, 1, 2), settings=(4, 8, 16), n=200, gain=1.0) -> pd.DataFrame:
    """Features of planted SAEs: score(kind, log10 frequency, k, noise); the second kind has `gain` x the first's
    nmse."""
    random, parts = np.random.default_rng(0), []
    for kind in (0, 1):
        for k in settings:
            for seed in seeds:
                often = random.random(n) < 0.3 + 0.4 * kind  # more of the second's features fire often
                logs = np.where(often, -1.4, -3.6) + random.uniform(-0.2, 0.2, n)
                found = score(kind, logs, k, random.normal(0, 0.1, n))
                parts.append(pd.DataFrame(dict(table=["without", "with"][kind], seed=seed, k=k, frequency=10**logs,
                                               l0=float(k), nmse=gain**kind / k, score=found)))
    return pd.concat(parts, ignore_index=True)


def test_views_agree_on_a_true_difference():
    found = quality.compare(sweep(lambda kind, logs, k, noise: 0.3 * kind + noise), ["score"], draws=300)
    assert found["view"].tolist() == list(quality.VIEWS) and (found["says"] == "higher").all()
    assert found["difference"].tolist() == pytest.approx([0.3] * 4, abs=0.03)
    assert (found["low"] < 0.31).all() and (found["high"] > 0.29).all() and (found["low"] > 0.2).all()
    assert set(found["verdict"]) == {"with: higher in every view"}
    none = quality.compare(sweep(lambda kind, logs, k, noise: noise), ["score"], draws=300)
    assert (none["difference"].abs() < 0.03).all()


def test_views_disagree_where_frequency_or_error_explains_it_all():
    by_frequency = sweep(lambda kind, logs, k, noise: (logs > -2) + noise)
    by_frequency = quality.compare(by_frequency, ["score"], draws=300).set_index("view")
    assert by_frequency.says["overall"] == "higher" and by_frequency.says["within frequency bins"] == "not resolved"
    assert by_frequency.verdict["overall"].startswith("with: views disagree: higher overall")
    # The score depends on the error alone: the second kind has half the first's at the same k.
    by_error = sweep(lambda kind, logs, k, noise: np.log(0.5**kind / k) + noise / 10, gain=0.5)
    by_error = quality.compare(by_error, ["score"], at=8, draws=300).set_index("view")
    assert by_error.difference["overall"] == pytest.approx(np.log(0.5), abs=0.02)
    assert by_error.difference["at equal L0"] == pytest.approx(np.log(0.5), abs=0.02)
    assert by_error.difference["at equal nmse"] == pytest.approx(0, abs=0.02)
    assert "views disagree" in by_error.verdict.iloc[0]


def test_intervals_equal_those_of_a_naive_loop():
    table = sweep(lambda kind, logs, k, noise: noise + 0.2 * kind, settings=(8,))
    table["score"] += table["seed"] * np.where(table["table"] == "with", 0.05, -0.02)
    table.loc[::17, "score"] = np.nan
    found = quality.compare(table, ["score"]).set_index("view")
    assert found.says["at equal L0"] == "not comparable" and np.isnan(found.low["at equal L0"])
    means = table.groupby(["seed", "table"])["score"].mean().unstack()
    value, low, high = evaluate.interval(means["with"] - means["without"])
    assert (found.difference["overall"], found.low["overall"], found.high["overall"]) == pytest.approx((value, low, high))
    assert found.says["overall"] == ("higher" if low > 0 else "not resolved")


def test_an_interval_is_never_narrower_than_the_features_of_one_seed_allow():
    table = sweep(lambda kind, logs, k, noise: noise, seeds=(0, 1, 2), settings=(8,))
    again = table[table["seed"] == 0]  # three seeds that agree by accident
    table = pd.concat([again.assign(seed=seed) for seed in (0, 1, 2)])
    found = quality.compare(table, ["score"], draws=2000).set_index("view")
    variance = again.groupby("table")["score"].agg(lambda values: values.var(ddof=0) / len(values)).sum()
    half = stats.t.ppf(0.975, 2) * (variance / 3) ** 0.5
    assert found.high["overall"] - found.difference["overall"] == pytest.approx(half, rel=0.1)


def test_seeds_that_differ_by_themselves_seldom_look_like_kinds_that_differ():
    random, called = np.random.default_rng(0), 0
    for _ in range(60):
        table = sweep(lambda kind, logs, k, noise: noise + random.normal(0, 0.05), settings=(8,), n=100)
        called += quality.compare(table, ["score"], draws=50).set_index("view").says["overall"] != "not resolved"
    assert called <= 9, "3 of 60 are expected at 95 %; 10 or more come once in 2000 times"


def test_bins_are_those_of_a_loop():
    table = sweep(lambda kind, logs, k, noise: kind * logs + noise, settings=(8,))
    found = quality.compare(table, ["score"], bins=12, least=20, draws=10).set_index("view")
    logs = np.log10(table["frequency"])
    which = np.digitize(logs, np.linspace(logs.min(), logs.max(), 13)[1:-1])
    cells = table.groupby(["table", which, "seed"])["score"]
    means = cells.mean().groupby(level=[0, 1]).mean().unstack(0)
    counts = cells.size().unstack(level=[0, 2], fill_value=0)
    common = counts.min(axis=1) >= 20
    assert common.any() and not common.all()
    gaps, weights = (means["with"] - means["without"])[common], counts.sum(axis=1)[common]
    assert found.difference["within frequency bins"] == pytest.approx((gaps * weights).sum() / weights.sum())
    assert found.over["within frequency bins"] == f"{common.sum()} of 12 bins"


def test_a_small_bin_that_is_drawn_empty_spoils_no_interval():
    table = sweep(lambda kind, logs, k, noise: 0.3 * kind + noise, settings=(8,))
    rare = table["frequency"] < 1e-3
    few = table[rare].groupby(["table", "seed"]).head(5)  # all are left out in one draw of 150
    found = quality.compare(pd.concat([table[~rare], few]), ["score"], bins=2, draws=1000).set_index("view")
    assert found.over["within frequency bins"] == "2 of 2 bins" and found.says["within frequency bins"] == "higher"


def test_one_seed_gives_no_interval():
    found = quality.compare(sweep(lambda kind, logs, k, noise: 0.3 * kind + noise, seeds=(0,)), ["score"], draws=10)
    assert (found["says"] == "not comparable").all() and found["difference"].notna().all()


def test_a_comparison_of_one_kind_is_refused():
    table = sweep(lambda kind, logs, k, noise: noise)
    with pytest.raises(ValueError, match="two kinds"):
        quality.compare(table[table["table"] == "with"], ["score"])
    with pytest.raises(ValueError, match="no seed"):
        quality.compare(table[(table["table"] == "with") ^ (table["seed"] == 1)], ["score"])
