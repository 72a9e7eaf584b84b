"""Oracle: closed forms, tables of a textbook, sums over positions, and SAEs whose effect on a model is known."""

from math import isnan

import numpy as np
import pandas as pd
import pytest
import torch

from tsae import evaluate
from tsae.baseline import Tokens
from tsae.sae import SAE

M, D, N, V = 50, 6, 12, 5
X, T = torch.randn(M, D, generator=torch.Generator().manual_seed(0)) + 1, torch.arange(M) % V


def random_sae(activation="relu", lookup="learned", **settings):
    sae = SAE(D, N, activation, 3, V, lookup, scale=1.5, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in sae.parameters():
            p.normal_(generator=generator)
        sae.b_enc[:2] = -100  # two features that never fire
    return sae.eval()


def test_errors_have_their_closed_forms():
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert evaluate.nmse(x, x) == evaluate.fvu(x, x) == 0 and evaluate.nmse(x, 0 * x) == 1
    x_hat = torch.tensor([[3.0, 3.0], [0.0, 1.0]])
    assert evaluate.nmse(x, x_hat) == pytest.approx((1 / 25 + 1 / 4) / 2)  # the mean of ratios, not the ratio of means
    assert evaluate.fvu(x, x_hat) == pytest.approx(2 / (2 * (1.5**2 + 1)))
    assert evaluate.fvu(x, x.mean(0).expand(2, 2)) == 1
    assert evaluate.ce_added(3.3, 3.0) == pytest.approx(0.1) and evaluate.ce_added(3.0, 3.0) == 0
    assert [evaluate.ce_recovered(ce, 3.0, 5.0) for ce in (3.0, 3.5, 5.0, 6.0)] == pytest.approx([1, 0.75, 0, -0.5])


def test_interval_is_the_one_of_the_textbook():
    assert evaluate.interval([1, 2, 3, 4, 5]) == pytest.approx((3, 3 - 1.9632, 3 + 1.9632), abs=1e-4)  # t(4) = 2.776
    assert evaluate.interval([0, 2]) == pytest.approx((1, 1 - 12.706, 1 + 12.706), abs=1e-3)  # t(1) = 12.706
    assert evaluate.interval(iter([1, 2, 3, 4, 5]), level=0.9)[2] == pytest.approx(3 + 2.132 * 0.5**0.5, abs=1e-3)
    value, low, high = evaluate.interval([7])
    assert value == 7 and isnan(low) and isnan(high)


def test_bootstrap_covers_the_true_mean_as_often_as_it_says():
    generator, covered, widths = np.random.default_rng(0), 0, []
    for i in range(100):
        groups = [generator.normal(10, 2, 60)]
        estimate, low, high = evaluate.bootstrap(np.mean, groups, draws=200, seed=i)
        assert estimate == pytest.approx(groups[0].mean())
        covered += low <= 10 <= high
        widths.append(high - low)
    assert 88 <= covered <= 99 and np.mean(widths) == pytest.approx(2 * 1.96 * 2 / 60**0.5, rel=0.1)


def test_bootstrap_draws_the_groups_too():
    groups = [np.full(30, 1.0), np.full(10, 3.0)]  # nothing varies but which group is drawn
    assert evaluate.bootstrap(np.mean, groups) == (2, 1, 3)
    assert evaluate.bootstrap(np.mean, groups[:1]) == (1, 1, 1) == evaluate.bootstrap(np.mean, [groups[0], []])
    assert all(map(isnan, evaluate.bootstrap(np.mean, [])))
    noisy = [np.random.default_rng(1).normal(size=40)]
    assert evaluate.bootstrap(np.mean, noisy, seed=3) == evaluate.bootstrap(np.mean, noisy, seed=3)
    assert evaluate.bootstrap(np.mean, noisy, seed=3) != evaluate.bootstrap(np.mean, noisy, seed=4)


def test_summaries_are_intervals_of_each_group():
    nan = float("nan")
    table = pd.DataFrame(dict(kind=list("bbaab"), size=[1, 1, 1, 1, 2], nmse=[0, 2, 5, 5, 7], other=[1, nan, 1, 1, 1]))
    rows = evaluate.summarise(table, ["kind", "size"], ["nmse", "other"])
    names = list(zip(rows.kind, rows["size"], rows.metric))
    assert names == [(*group, metric) for group in [("b", 1), ("a", 1), ("b", 2)] for metric in ("nmse", "other")]
    assert rows.value.tolist() == [1, 1, 5, 1, 7, 1] and rows.runs.tolist() == [2, 1, 2, 2, 1, 1]
    assert rows.low[0] == pytest.approx(1 - 12.706, abs=1e-3) and rows.high[2] == 5 and isnan(rows.high[4])


def test_reading_off_curves():
    tokens = np.array([10, 100, 1000, 10000])
    falling = 1 - 0.1 * np.log10(tokens)  # straight in log tokens: 0.9, 0.8, 0.7, 0.6
    assert evaluate.tokens_to_reach(tokens, falling, 0.75) == pytest.approx(10**2.5)
    assert evaluate.tokens_to_reach(tokens, falling, 0.95) == 10
    assert isnan(evaluate.tokens_to_reach(tokens, falling, 0.5))
    assert evaluate.tokens_to_reach([10, 100, 1000], [0.9, 0.7, 0.8], 0.7) == pytest.approx(100)  # the first time
    l0 = np.array([40, 5, 10, 20])
    errors = 2 * l0**-0.5  # straight in log-log
    assert evaluate.l0_at_equal(l0, errors, 2 * 13**-0.5) == pytest.approx(13)
    assert all(isnan(evaluate.l0_at_equal(l0, errors, 2 * outside**-0.5)) for outside in (4, 41))


@pytest.mark.parametrize("lookup", ["none", "frozen", "learned"])
@pytest.mark.parametrize("activation", ["relu", "topk", "gated"])
def test_reconstruction_is_the_sum_over_positions(activation, lookup):
    sae = random_sae(activation, lookup)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    ours = evaluate.reconstruction(sae, X, T, batch=7)
    codes = torch.cat([sae.encode(x[None], t[None]) for x, t in zip(X, T)])
    x_hat, alone = sae.decode(codes, T), sae.decode(torch.zeros(M, N), T)
    expected = dict(nmse=sum(((x - y) @ (x - y) / (x @ x)).item() for x, y in zip(X, x_hat)) / M,
                    fvu=evaluate.fvu(X, x_hat), l0=sum(int((row > 0).sum()) for row in codes) / M,
                    dead=sum(int(not (column > 0).any()) for column in codes.T) / N)
    if lookup != "none":
        table = (sae.W_lookup[T] + sae.b_dec) * sae.scale
        assert torch.allclose(alone, table)
        expected |= dict(lookup_nmse=evaluate.nmse(X, table),
                         lookup_share=(1 - evaluate.fvu(X, table)) / (1 - evaluate.fvu(X, x_hat)))
    assert ours == pytest.approx(expected, rel=1e-5) and expected["dead"] >= 2 / N
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


def test_a_perfect_table_explains_everything_alone():
    table = torch.randn(V, D)
    sae = SAE(D, N, "relu", vocabulary=V, lookup="learned", scale=2.0).start(torch.zeros(D), table)
    sae.b_enc.data -= 100
    ours = evaluate.reconstruction(sae, table[T], T)
    wanted = dict(nmse=0, fvu=0, l0=0, dead=1, lookup_nmse=0, lookup_share=1)
    assert ours == pytest.approx(wanted, abs=1e-6)


def test_table_drift_of_known_changes():
    start, seen = torch.eye(V, D), torch.tensor([0, 1, 3])
    sae = SAE(D, N, "relu", vocabulary=V, lookup="learned", scale=4.0).start(torch.zeros(D), start)
    assert evaluate.table_drift(sae, start, seen) == pytest.approx(dict(table_cosine=1, table_norm_ratio=1))
    sae.W_lookup.data[0] *= 0.5  # shorter
    sae.W_lookup.data[1] = sae.W_lookup.data[1].roll(1)  # at a right angle
    sae.W_lookup.data[2] = 100  # not seen in training
    assert evaluate.table_drift(sae, start, seen) == pytest.approx(dict(table_cosine=2 / 3, table_norm_ratio=2.5 / 3))


@pytest.fixture
def model(tiny_gpt2):
    rows = torch.randint(1, 257, (6, 12), generator=torch.Generator().manual_seed(0))
    x = tiny_gpt2.layer(2).residuals(rows)[:, 1:].flatten(0, 1)
    return tiny_gpt2, rows, x.mean(0), evaluate.ablations(tiny_gpt2.tail(rows, 2), x.mean(0))


def test_an_identity_adds_no_cross_entropy(model):
    lm, rows, _, baseline = model
    sae = SAE(16, 32, "topk", 16, 257, "learned", encoder_sees="rest", scale=1.3)
    with torch.no_grad():
        for W in (sae.W_enc, sae.W_dec):
            W.copy_(torch.cat([torch.eye(16), -torch.eye(16)]))  # of each coordinate the positive and the negative part
        sae.W_lookup.normal_(generator=torch.Generator().manual_seed(0))
    ours = evaluate.cross_entropy(sae, lm.tail(rows, 2), baseline)
    assert ours["ce_added"] == pytest.approx(0, abs=1e-5) and ours["ce_recovered"] == pytest.approx(1, abs=1e-3)
    assert set(ours) == {"ce_added", "ce_recovered"}


def test_an_empty_sae_is_an_ablation(model):
    """Codes are zero: with b_dec = 0 it is zero ablation, with b_dec = mean it is mean ablation."""
    lm, rows, mean, baseline = model
    clean = baseline["ce_clean"]
    assert len({round(ce, 4) for ce in baseline.values()}) == 3 and clean == pytest.approx(lm.nats(rows).mean().item())
    for b_dec, name in ((0 * mean, "ce_zero"), (mean, "ce_mean")):
        sae = SAE(16, 8, "relu", scale=2.0).start(b_dec)
        sae.b_enc.data -= 100
        ours = evaluate.cross_entropy(sae, lm.tail(rows, 2), baseline)
        assert ours["ce_added"] == pytest.approx((baseline[name] - clean) / clean, abs=1e-6)
        assert ours["ce_recovered"] == pytest.approx(
            0 if name == "ce_mean" else 1 - (baseline["ce_zero"] - clean) / (baseline["ce_mean"] - clean), abs=1e-3)


def test_how_much_of_what_the_encoder_reads_is_the_token():
    """Against an analysis of variance of each feature's pre-activations by hand; noise alone has about 0."""
    generator = torch.Generator().manual_seed(2)
    means, t = torch.randn(V, D, generator=generator), torch.randint(V, (2000,), generator=generator)
    noise = torch.randn(2000, D, generator=generator)
    x = means[t] + noise
    sae = random_sae("topk", encoder_sees="full")
    pre = (sae.preactivations(x, t)).double()
    groups = [pre[t == token] for token in range(V)]
    between = sum(len(group) * (group.mean(0) - pre.mean(0)).square() for group in groups).sum()
    within = sum((group - group.mean(0)).square().sum() for group in groups)
    wanted = (between - (V - 1) * within / (2000 - V)) / (between + within)
    assert evaluate.token_read(sae, x, t, batch=300) == pytest.approx(wanted.item(), rel=1e-5) and 0.2 < wanted < 0.9
    assert abs(evaluate.token_read(sae, noise, t)) < 0.01
    rest = random_sae("topk", encoder_sees="rest")
    with torch.no_grad():
        rest.W_lookup.copy_(means / 1.5)
    assert abs(evaluate.token_read(rest, x, t)) < 0.01


def test_silent_features_are_counted_over_all_parts_once():
    saes = [random_sae("relu"), random_sae("topk")]
    parts = iter([(X[:20], T[:20]), (X[20:], T[20:])])
    shares, positions = evaluate.silent(saes, parts, batch=7)
    for sae, share in zip(saes, shares):
        assert share == pytest.approx(1 - (sae.encode(X, T) > 0).any(0).float().mean().item()) and share >= 2 / N
    assert positions == M and next(parts, None) is None


def test_what_a_baseline_explains_alone():
    known = Tokens(D, V)
    stats = dict(mean=X.mean(0), scale=torch.tensor(2.0))
    assert evaluate.explained(known, stats, X, T) == pytest.approx(0, abs=1e-5)  # the mean alone
    means = torch.stack([X[T == t].mean(0) for t in range(V)])
    with torch.no_grad():
        known.W_lookup.copy_((means - stats["mean"]) / 2)
    within = (X - means[T]).square().sum() / (X - X.mean(0)).square().sum()
    assert evaluate.explained(known, stats, X, T, batch=7) == pytest.approx(1 - within.item(), abs=1e-5)


def test_sums_by_document_are_those_of_a_loop():
    values, document = np.array([1.0, 2.0, 3.0, 4.0]), np.array([7, 3, 7, 9])
    assert evaluate.by_document(values, document).tolist() == [2.0, 4.0, 4.0]


def test_resampled_intervals_cover_seeds_and_documents():
    """Known variances: a mean over documents of N(1, 1), to which each seed adds N(0, s)."""
    generator = np.random.default_rng(0)
    for spread, expected in ((0.0, 1.96 / 20), (0.5, None)):
        covered, widths = 0, []
        for _ in range(100):
            documents, seeds = generator.normal(1, 1, 400), generator.normal(0, spread, (3, 1))
            value, low, high = evaluate.resampled(lambda a, n: a / n, documents + seeds, np.ones((3, 400)), draws=300)
            assert value == pytest.approx((documents + seeds).mean())
            covered, widths = covered + (low <= 1 <= high), [*widths, (high - low) / 2]
        assert 88 <= covered <= 100, "95 % intervals hold the truth about as often"
        assert expected is None or np.mean(widths) == pytest.approx(expected, rel=0.1), "that of the documents alone"


def test_a_ratio_of_two_arms_keeps_what_documents_share():
    generator = np.random.default_rng(0)
    documents = generator.lognormal(0, 1, 300)
    other = np.stack([documents, documents * 1.01, documents * 0.99])
    value, low, high = evaluate.resampled(lambda a, b: 1 - a / b, 0.8 * other, other)
    assert (value, low, high) == pytest.approx((0.2, 0.2, 0.2), abs=1e-9), "hard documents are hard for both"
    assert np.isnan(evaluate.resampled(lambda a, b: a / b, other[:1], other[:1])[1:]).all(), "one seed has no interval"


def test_the_lowest_place_and_its_interval():
    generator = np.random.default_rng(0)
    table = pd.DataFrame([dict(layer=layer, row=row, value=generator.normal(layer, 1)) for layer in (2, 1, 3)
                          for row in range(100) for _ in range(2)])
    found = evaluate.lowest(table, "value", ["layer"], "row")
    assert found["layer"] == 1 and found["runs"] == 100
    assert found["value"] == pytest.approx(table[table["layer"] == 1]["value"].mean())
    assert (found["high"] - found["low"]) / 2 == pytest.approx(1.96 / 200**0.5, rel=0.15)
