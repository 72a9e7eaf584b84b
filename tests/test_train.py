"""Oracle: naive loops, torch's own Adam, a planted dictionary with a planted table."""

from copy import deepcopy

import pytest
import torch
from planted import D, N, V, mixed, planted, started
from torch.nn.functional import embedding, normalize

from tsae import baseline, train
from tsae.evaluate import nmse
from tsae.pairs.shards import Memory
from tsae.sae import SAE
from tsae.scale.passes import _go_on, _state

torch.set_num_threads(1)  # on tensors as small as these a second thread only waits for the first


def state(sae):
    return {name: value.clone() for name, value in sae.state_dict().items()}


def test_statistics_by_hand():
    x, t, table = *(planted(50)[:2]), torch.randn(V + 1, D)
    stats = Memory(x, t.int()).statistics(V + 1)  # the last token never occurs
    mean = sum(x) / 50
    assert torch.allclose(stats["mean"], mean, atol=1e-5)
    assert stats["scale"].item() == pytest.approx((sum(((a - mean) ** 2).sum() for a in x) / (50 * D)).item() ** 0.5)
    assert stats["count"].tolist() == [t.tolist().count(token) for token in range(V + 1)]
    for token, row in enumerate(baseline.conditional_mean(stats, prior=3.0)):
        shrunk = torch.cat([x[t == token], mean.expand(3, D)]).mean(0)
        assert torch.allclose(row, shrunk, atol=1e-5)
    assert torch.allclose(baseline.left_over(stats, table), (x - table[t]).mean(0), atol=1e-5)


def test_row_adam_is_adam_with_a_clock_for_every_row():
    torch.manual_seed(0)
    table, target = torch.randn(V, D, requires_grad=True), torch.randn(V, D)
    alone = [row.clone().requires_grad_() for row in table.detach()]
    ours, theirs = train.RowAdam([table], lr=0.1), [torch.optim.Adam([row], lr=0.1) for row in alone]
    for step in range(30):
        t = torch.arange(V) if step < 5 else torch.randint(V - 1, (4,))  # first all, then some, twice or never
        before = table.detach().clone()
        ours.zero_grad()
        (embedding(t, table, sparse=True) - target[t]).pow(4).sum().backward()
        ours.step()
        for token in t.unique().tolist():
            theirs[token].zero_grad()
            ((alone[token] - target[token]).pow(4).sum() * (t == token).sum()).backward()
            theirs[token].step()
        untouched = ~torch.isin(torch.arange(V), t)
        assert torch.equal(table[untouched], before[untouched])
    assert torch.allclose(table, torch.stack(alone), atol=1e-5) and untouched.any()


def test_the_first_step_of_a_late_row_is_the_learning_rate():
    table = torch.zeros(2, D, requires_grad=True)
    optimiser = train.RowAdam([table], lr=0.1)
    for token in [0] * 50 + [1]:
        optimiser.zero_grad()
        (embedding(torch.tensor([token]), table, sparse=True) * 7).sum().backward()
        optimiser.step()
    assert torch.allclose(table[1], torch.full((D,), -0.1)) and torch.allclose(table[0], torch.full((D,), -5.0))


def test_learning_rate_schedules():
    rate = train.learning_rate
    assert [rate(p, "cosine", 0.3) for p in (0, 0.5, 1)] == pytest.approx([1, 0.65, 0.3])
    assert [rate(p, "decay", 0.0) for p in (0, 0.5, 0.8, 0.9, 1)] == pytest.approx([1, 1, 1, 0.5, 0])
    with pytest.raises(ValueError, match="cosine.*decay"):
        rate(0.5, "linear", 0.0)


def test_the_first_step_of_fit_by_hand():
    x, t, _ = planted(64)
    sae = started(scale=2.0)
    by_hand = deepcopy(sae)
    loss = by_hand.loss(x, t % 3)["loss"]
    loss.backward()
    history = train.fit(sae, iter([(x, t % 3)]), 64, lr=0.01, table_lr=0.1)
    assert history.loss[0] == pytest.approx(loss.item())
    assert history.nmse[0] == pytest.approx(nmse(x, by_hand(x, t % 3)))
    for name, rate in dict(W_enc=0.01, b_enc=0.01, W_dec=0.01, b_dec=0.01, W_lookup=0.1).items():
        p, g = getattr(by_hand, name), getattr(by_hand, name).grad.to_dense()
        expected = p.detach() - rate * g / (g.abs() + 1e-8)
        expected = normalize(expected, dim=1) if name == "W_dec" else expected
        assert torch.allclose(getattr(sae, name), expected, atol=1e-5)
    assert sae.W_lookup[:3].all() and not sae.W_lookup[3:].any() and not sae.training


def test_the_schedule_rules_both_optimisers(monkeypatch):
    asked = []
    monkeypatch.setattr(train, "learning_rate", lambda *arguments: asked.append(arguments) or 0.0)
    sae = started()
    before = state(sae)
    train.fit(sae, mixed(*planted()[:2], batch=50), 200, schedule="cosine", last_lr=0.3)
    assert all(torch.allclose(value, before[name], atol=1e-6) for name, value in sae.state_dict().items())
    assert asked[1:] == [(i / 4, "cosine", 0.3) for i in range(4) for _ in range(2)]  # the first is the check of the name


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu", "gated"])
@pytest.mark.parametrize("lookup", ["none", "frozen", "learned"])
def test_training_lowers_the_loss_and_moves_everything_but_a_frozen_table(lookup, activation):
    x, t, u = planted()
    x, results = x - 3 * u[t], []  # now `u` is the right table
    for _ in range(2):
        sae = SAE(D, N, activation, 2, V, lookup, scale=0.9).start(torch.zeros(D), u, seed=1)
        if activation == "jumprelu":
            sae.log_threshold.data.fill_(-1.0)  # the planted codes are smaller than those of a language model
        before = state(sae)
        source = mixed(x, t, batch=100, seed=1)
        history = train.fit(sae, source, 5000, lr=1e-2, sparsity=0.01, log_every_tokens=1000)
        results.append((sae, history))
    assert history.tokens.tolist() == [1000, 2000, 3000, 4000, 5000] and history.loss[4] < 0.8 * history.loss[0]
    for name, value in state(sae).items():
        moved = (value != before[name]).reshape(len(value) if value.ndim else 1, -1).any(1)
        assert not moved.any() if (name, lookup) == ("baseline.W_lookup", "frozen") else moved.float().mean() > 0.5, name
        assert torch.equal(value, results[0][0].state_dict()[name])  # bit for bit
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(N)) and results[0][1].equals(history)


def test_the_table_absorbs_planted_single_token_features():
    x, t, u = planted()
    saes = {lookup: started(lookup) for lookup in ("none", "learned")}
    for sae in saes.values():
        train.fit(sae, mixed(x, t, batch=100), 30_000, lr=3e-3, table_lr=5e-2)
    assert nmse(x, saes["learned"](x, t)) < 0.1 * nmse(x, saes["none"](x, t))
    table = saes["learned"].W_lookup.detach()
    assert torch.cosine_similarity(table - table.mean(0), u - u.mean(0)).min() > 0.7  # b_dec has what all rows share
    of_tokens = {lookup: (sae.W_dec @ u.T).norm(dim=1).mean().item() for lookup, sae in saes.items()}
    assert of_tokens["none"] > 0.8 and of_tokens["learned"] < 0.4  # and the features are freed


class Spy(SAE):
    """Notes what `fit` passes to the loss."""

    def loss(self, x, t, sparsity, dead, aux_weight, kth):
        self.__dict__.setdefault("seen", []).append((sparsity, dead.tolist(), self.training))
        return super().loss(x, t, sparsity, dead, aux_weight, kth)


@pytest.mark.filterwarnings("ignore:the loss of .* jumps:RuntimeWarning")  # the seventh batch is of another kind
def test_dead_is_counted_in_tokens_and_sparsity_warms_up():
    sae = Spy(D, N, "relu").start(torch.zeros(D))
    with torch.no_grad():
        sae.b_enc += 100
        sae.b_enc[5] = -1000  # never fires
        sae.b_enc[6] = -1000  # fires for the seventh batch alone
        sae.W_enc[6].zero_()[0] = 100
    x = [torch.randn(50, D, generator=torch.Generator().manual_seed(i)) + 100 * (i == 6) for i in range(20)]
    history = train.fit(sae, iter([(a, torch.zeros(50)) for a in x]), 1000, lr=0.0, sparsity=0.5, sparsity_warmup=0.2,
                        dead_after_tokens=150, log_every_tokens=1, check=lambda sae: {}, checks=3)
    silent5, silent6 = [50 * (i + 1) for i in range(20)], [50 * (i + 1 if i < 6 else i - 6) for i in range(20)]
    assert history.dead.tolist() == pytest.approx([((a >= 150) + (b >= 150)) / N for a, b in zip(silent5, silent6)])
    assert all(training for _, _, training in sae.seen) and not sae.training  # in spite of the checks
    for i, (weight, dead, _) in enumerate(sae.seen):
        assert weight == pytest.approx(0.5 * min(1, (50 * i + 1) / 200))
        assert dead[5] == (50 * i >= 150) and dead[6] == (i > 0 and silent6[i - 1] >= 150) and sum(dead) <= 2


def test_checks_come_evenly_in_log_tokens():
    modes = []

    def check(sae):
        modes.append(sae.training)
        return {"hundredth": 0.01 * len(modes)}

    sae = started(activation="batchtopk")
    source = mixed(*planted()[:2], batch=10)
    history = train.fit(sae, source, 1000, check=check, checks=5, log_every_tokens=300)
    checked = history.dropna()
    due = [1000 * 100 ** (share - 1) for share in (0.2, 0.4, 0.6, 0.8, 1)]
    assert checked.tokens.tolist() == [next(n for n in range(0, 1001, 10) if n >= point) for point in due]
    assert checked.hundredth.tolist() == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05]) and modes == [False] * 5
    assert len(history) > 5


def test_failures_of_training_get_a_sentence():
    x, t, _ = planted(100)
    with pytest.raises(ValueError, match="1000 tokens.*ended after 100"):
        train.fit(started(), iter([(x, t)]), 1000)
    with pytest.raises(ValueError, match="training on 0 tokens was asked for"):
        train.Run(started(), 0)
    before = state(sae := started())
    with pytest.raises(FloatingPointError, match="nan after 0 tokens.*lower `lr`"):
        train.fit(sae, iter([(x * float("nan"), t)]), 100)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    with pytest.raises(FloatingPointError, match="inf after 100 tokens"):
        train.fit(started(), iter([(x, t), (x * 1e30, t)]), 200)


def test_a_spike_of_the_loss_heals(monkeypatch):
    """A batch a thousand times too large, after a restart. Without softening, Adam would hardly move for thousands of steps."""
    (x, t, _), source = planted(6000), mixed(*planted(6000)[:2], 60)
    batches = [next(source) for _ in range(300)]

    def error(spike: float, most: float = train.SPIKE) -> float:
        monkeypatch.setattr(train, "SPIKE", most)
        first, last = (train.Run(started(), 18_000, lr=3e-3) for _ in range(2))
        for i, (a, b) in enumerate(batches):
            if i == 50:
                _go_on(last, _state(first))
                assert last.usual_loss == first.usual_loss > 0
            (first if i < 50 else last).step(a * spike if i == 100 else a, b)
        return nmse(x, last.sae(x, t).detach())

    calm = error(1.0)
    with pytest.warns(RuntimeWarning, match=r"topk SAE.* jumps to .* after 6000 tokens, \d+ times the usual"):
        healed = error(1000.0)
    frozen = error(1000.0, most=float("inf"))
    assert healed < 1.3 * calm and frozen > 2 * calm


def test_a_first_loss_of_zero_makes_no_spike_of_the_next():
    x, t, _ = planted(50)
    run = train.Run(started(), 100)
    run.step(torch.zeros_like(x), t)
    before = state(run.sae)
    run.step(x, t)
    assert not torch.equal(run.sae.W_dec, before["W_dec"]) and run.usual_loss > 0


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu", "gated"])
def test_a_bias_that_is_not_a_number_is_named_at_once(activation, quick):
    """Its feature is never chosen, so that the loss need not show it."""
    x, t, _ = planted(100)
    sae = started(activation=activation)
    sae.b_enc.data[3] = float("nan")
    with pytest.raises(FloatingPointError, match="after 0 tokens"):
        train.fit(sae, iter([(x, t)] * 20), 2000, quick=quick)


@pytest.mark.parametrize("recipe, scale", [("ours", 0.5), ("code", 1.0), ("text", 1.0)])
def test_without_a_table_the_encoder_starts_as_the_recipe_says(recipe, scale):
    stats = dict(mean=torch.zeros(6), scale=torch.tensor(2.0), count=torch.ones(9), sum=torch.zeros(9, 6))
    sae = train.build(stats, torch.zeros(9, 6), train.RECIPES[recipe], "topk", 12, 2, "none", 0)
    assert torch.equal(sae.W_enc, scale * sae.W_dec)
