"""Oracle: one token after the other."""

import numpy as np
import pandas as pd
import pytest
import torch

from tsae import evaluate
from tsae.sae import SAE
from tsae.scoring import heldout, table


def pairs():
    """An SAE with a table of 7 tokens, its unigrams (7, 16), and 50 pairs, in which token 6 does not occur."""
    sae = SAE(16, 9, "relu", scale=0.7, vocabulary=7, lookup="learned")
    sae.start(torch.zeros(16), torch.randn(7, 16, generator=torch.Generator().manual_seed(1)), seed=0)
    random = torch.Generator().manual_seed(2)
    sae.b_dec.data.normal_(generator=random)
    unigrams, x = torch.randn(7, 16, generator=random), torch.randn(50, 16, generator=random)
    return sae, unigrams, x, torch.randint(0, 6, (50,), generator=random)


@torch.no_grad()
def test_every_token_is_that_of_a_loop():
    sae, unigrams, x, t = pairs()
    found = table.by_token(sae, unigrams, x, t, batch=8).set_index("token")
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


def test_bins_of_count_are_means_of_tokens():
    sae, unigrams, x, t = pairs()
    trained = np.array([0, 3, 4, 15, 16, 63, 64])
    tokens = table.by_token(sae, unigrams, x, t, trained)
    assert tokens["count"].tolist() == trained[:6].tolist()
    bins = table.by_count(tokens)
    assert bins[["low", "high", "tokens"]].values.tolist() == [[0, 0, 1], [1, 3, 1], [4, 15, 2], [16, 63, 2]]
    assert bins["nmse"][2] == pytest.approx(tokens["nmse"][2:4].mean())


def test_powers_of_the_base_start_a_bin():
    counts = [0, *range(1, 1200)]
    tokens = table.by_count(pd.DataFrame(dict(count=counts, token=counts, nearest_token=0, nmse=1.0)), base=10)
    assert tokens[["low", "high", "tokens"]].values.tolist() == [[0, 0, 1], [1, 9, 9], [10, 99, 90], [100, 999, 900],
                                                                [1000, 9999, 200]]


def test_an_sae_without_a_table_is_refused():
    _, unigrams, x, t = pairs()
    with pytest.raises(ValueError, match="no lookup table"):
        table.by_token(SAE(16, 9, "relu"), unigrams, x, t)


def test_a_single_token_has_no_nearest_one():
    sae, unigrams, x, t = pairs()
    with pytest.raises(ValueError, match="one row was given, two are needed"):
        table.by_token(sae, unigrams, x[t == 3], t[t == 3])


@torch.no_grad()
def test_a_row_that_was_moved_towards_another_token_is_found():
    sae, _, _, _ = pairs()
    count = torch.tensor([5, 9, 1, 4, 2, 6, 0])
    start = sae.W_lookup.clone() * 0.7
    own = start - (count / count.sum()) @ start
    sae.W_lookup[2] += 0.5 * own[4] / 0.7
    sae.W_lookup[6] += 100  # never seen: it does not take part
    found = table.movement(sae, start, count).set_index("token")
    assert found.index.tolist() == [0, 1, 2, 3, 4, 5] and found["count"].tolist() == count[:6].tolist()
    step = own[4] * 0.5 * (1 - count[2] / count.sum())  # less what all rows share
    assert found.loc[2, "toward_token"] == 4 and found.loc[2, "toward_cosine"] > 0.99
    assert found.loc[2, "moved"] == pytest.approx((step.norm() / own[2].norm()).item(), rel=1e-4)
    assert found["moved"].drop(2).max() < 0.1 * found.loc[2, "moved"] * own[2].norm() / own.norm(dim=1).min()
    with pytest.raises(ValueError, match="no lookup table that could have moved"):
        table.movement(SAE(16, 9, "relu"), start, count)


def test_tokens_of_one_word_are_told_from_strangers():
    g = torch.Generator().manual_seed(0)
    strings = ["the", "The", " the", "cat", "Cat", " dog", "dog", "x1", "unseen", "Unseen"]
    rows, count = torch.randn(10, 64, generator=g), torch.tensor([9, 2, 30, 4, 1, 5, 5, 7, 0, 3])
    rows[1] = rows[0] + 0.1 * torch.randn(64, generator=g)  # case alone aligns
    rows[4] = rows[3] + 0.1 * torch.randn(64, generator=g)
    found = table.kinship(rows, strings, count).set_index("relation")
    centred = torch.nn.functional.normalize(rows - count / count.sum() @ rows, dim=1)
    assert found.loc["case", "pairs"] == 2 and found.loc["leading space", "pairs"] == 2
    wanted = (centred[0] @ centred[1] + centred[3] @ centred[4]) / 2
    assert found.loc["case", "cosine"] == pytest.approx(wanted.item(), abs=1e-5) and wanted > 0.8
    space = (centred[0] @ centred[2] + centred[6] @ centred[5]) / 2
    assert found.loc["leading space", "cosine"] == pytest.approx(space.item(), abs=1e-5) and abs(space) < 0.5
    assert found.loc["random", "pairs"] > 0
    assert table.kinship(rows, ["a1"] * 10, count).empty


def test_probes_find_who_knows_an_attribute():
    """Of the planted attributes one is a property of the token, one a feature's firing, one both, one nobody's."""
    g = torch.Generator().manual_seed(0)
    m, d, V = 3000, 16, 8
    t, a = torch.randint(V, (m,), generator=g), torch.rand(m, generator=g) < 0.3
    basis = torch.linalg.qr(torch.randn(d, d, generator=g))[0]
    sae = SAE(d, 4, "relu", vocabulary=V, lookup="learned", encoder_sees="rest")
    with torch.no_grad():
        sae.W_lookup.copy_(torch.randn(V, 6, generator=g) @ basis[:6])
        sae.W_enc.copy_(basis[8:12])
        sae.W_dec.copy_(basis[8:12])
    x = sae.W_lookup[t].detach() + 2.0 * a[:, None] * basis[8] + 0.1 * torch.rand(m, 1, generator=g) * basis[9]
    chance = torch.rand(m, generator=g) < 0.5
    flags = torch.stack([t == 3, a, (t == 3) | a, chance]).int().numpy()
    names = ["a number", "inside quotes", "in code", "in a link"]
    zeros = np.zeros(m, int)
    on = heldout.Text(t.numpy(), zeros, zeros, zeros, np.arange(m) < m // 2, names, flags, [str] * 4, str)
    found = table.known_by(sae, x, t, on).set_index("attribute")
    assert found["share"].tolist() == pytest.approx(flags.mean(1).tolist())
    assert found["table"].round(2).tolist()[0] == 1 and abs(found["table"].iloc[1] - 0.5) < 0.05
    assert found["features"].iloc[1] > 0.99 and abs(found["features"].iloc[0] - 0.5) < 0.05
    assert found["both"].iloc[2] > 0.99 > found[["table", "features"]].iloc[2].max()
    assert (found.iloc[3, 1:] - 0.5).abs().max() < 0.05
    without = SAE(d, 4, "relu")
    assert table.known_by(without, x, t, on).columns.tolist() == ["attribute", "share", "features"]


def test_auc_equals_all_pairs():
    value, flag = np.array([1.0, 2, 2, 3, 0, 2]), np.array([0, 1, 0, 1, 0, 1], bool)
    pairs = [(a > b) + 0.5 * (a == b) for a in value[flag] for b in value[~flag]]
    assert table.auc(value, flag) == pytest.approx(np.mean(pairs))
    assert np.isnan(table.auc(value, np.zeros(6, bool)))
