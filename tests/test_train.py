"""Oracle: naive loops, torch's own Adam, a planted dictionary with a planted table, and the run that was not interrupted."""

import os
import shutil
import signal
import threading
import weakref
from copy import deepcopy

import pytest
import torch
from conftest import tiny_network
from torch.nn.functional import embedding, normalize

from tsae import activations, checkpoints, kernels, train
from tsae.pairs.order import Shuffled
from tsae.pairs.shards import Memory
from tsae.evaluate import nmse
from tsae.lm import LM
from tsae.sae import SAE

torch.set_num_threads(1)  # on tensors as small as these a second thread only waits for the first
D, N, V = 40, 8, 32


def planted(m=6000, seed=0):
    """x = 4 u[t] + a sum of two of N directions, all orthogonal; returns x (m, D), t (m,), u (V, D)."""
    g = torch.Generator().manual_seed(seed)
    u, directions = torch.nn.init.orthogonal_(torch.empty(V + N, D), generator=g).split([V, N])
    t, which = torch.randint(V, (m,), generator=g), torch.randint(N, (m, 2), generator=g)
    size = 1 + torch.rand(m, 2, 1, generator=g)
    return 4 * u[t] + (size * directions[which]).sum(1), t, u


def mixed(x, t, batch, seed=0):
    return Shuffled(Memory(x, t), batch, seed)


def started(lookup="learned", activation="topk", seed=0, **settings):
    sae = SAE(D, N, activation, 2, V, lookup, **settings)
    return sae.start(torch.zeros(D), torch.zeros(V, D), seed=seed)


def state(sae):
    return {name: value.clone() for name, value in sae.state_dict().items()}


def test_statistics_by_hand():
    x, t, table = *(planted(50)[:2]), torch.randn(V + 1, D)
    stats = Memory(x, t.int()).statistics(V + 1)  # the last token never occurs
    mean = sum(x) / 50
    assert torch.allclose(stats["mean"], mean, atol=1e-5)
    assert stats["scale"].item() == pytest.approx((sum(((a - mean) ** 2).sum() for a in x) / (50 * D)).item() ** 0.5)
    assert stats["count"].tolist() == [t.tolist().count(token) for token in range(V + 1)]
    for token, row in enumerate(train.conditional_mean(stats, prior=3.0)):
        shrunk = torch.cat([x[t == token], mean.expand(3, D)]).mean(0)
        assert torch.allclose(row, shrunk, atol=1e-5)
    assert torch.allclose(train.left_over(stats, table), (x - table[t]).mean(0), atol=1e-5)


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
        assert not moved.any() if (name, lookup) == ("W_lookup", "frozen") else moved.float().mean() > 0.5, name
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

    def loss(self, x, t, sparsity, dead, aux_weight):
        self.__dict__.setdefault("seen", []).append((sparsity, dead.tolist(), self.training))
        return super().loss(x, t, sparsity, dead, aux_weight)


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
                last.restore(first.state())
                assert last.usual == first.usual > 0
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
    assert not torch.equal(run.sae.W_dec, before["W_dec"]) and run.usual > 0


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu", "gated"])
def test_a_bias_that_is_not_a_number_is_named_at_once(activation, quick):
    """Its feature is never chosen, so that the loss need not show it."""
    x, t, _ = planted(100)
    sae = started(activation=activation)
    sae.b_enc.data[3] = float("nan")
    with pytest.raises(FloatingPointError, match="after 0 tokens"):
        train.fit(sae, iter([(x, t)] * 20), 2000, quick=quick)


@pytest.fixture
def data(tiny_gpt2, tmp_path):
    rows = torch.randint(1, 257, (8, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return train.prepare(tiny_gpt2, rows, 1, batch=16, folder=tmp_path / "activations"), tiny_gpt2, rows


def test_held_and_streamed_data_are_the_same_pairs(data, tmp_path):
    held, lm, rows = data
    folder = tmp_path / "activations"
    streamed = train.prepare(lm, rows, 1, batch=16, buffer=32, store_gb=2e-6, folder=folder, sample_rows=5)
    for ours, sampled in ((held, 8), (streamed, 5)):
        x, t = collect(rows[:sampled], lm.at(1), lm.keep)
        wanted = Memory(x.bfloat16(), t).statistics(257)
        assert all(torch.equal(ours.stats[name], value) for name, value in wanted.items())
        assert torch.equal(ours.unigrams, lm.unigrams(1))
        first, again, other = (next(ours.source(seed))[1] for seed in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)
    other_weights = LM(tiny_network("gpt2", seed=1), lm.tokenizer, lm.name)
    for model, tokens, layer in ((lm, rows, 2), (lm, rows + 1, 1), (other_weights, rows, 1)):
        assert train.prepare(model, tokens, layer, batch=16, folder=folder).identity != held.identity
    renamed = train.prepare(LM(lm.model, lm.tokenizer, "elsewhere"), rows, 1, batch=16, folder=folder)
    assert renamed.identity == held.identity  # where a model lies is not what it is


def test_streaming_starts_without_room_for_a_store(tiny_gpt2, tmp_path):
    rows = torch.randint(1, 257, (150, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    rows[:64] = 0  # a pass over special tokens only
    data = train.prepare(tiny_gpt2, rows, 1, batch=16, buffer=64, store_gb=0, folder=tmp_path)
    x, t = collect(rows, tiny_gpt2.at(1), tiny_gpt2.keep)
    wanted = Memory(x.bfloat16(), t).statistics(257)
    assert torch.equal(data.stats["count"], wanted["count"]) and not list(tmp_path.glob("*.x"))
    assert all(torch.allclose(data.stats[name], value, rtol=1e-6) for name, value in wanted.items())
    assert next(data.source(0))[0].shape == (16, 16) and not [path for path in tmp_path.iterdir() if path.is_dir()]
    with pytest.raises(ValueError, match="special tokens only"):
        train.prepare(tiny_gpt2, rows[:64], 1, store_gb=0, folder=tmp_path)


@pytest.mark.parametrize("store_gb", [0, 1])
def test_statistics_are_worked_out_once(store_gb, tiny_gpt2, tmp_path, monkeypatch, capsys):
    calls, statistics = [], activations.statistics
    for module in (train, activations):
        monkeypatch.setattr(module, "statistics", lambda *a: calls.append(1) or statistics(*a))
    rows = torch.randint(1, 257, (8, 12), dtype=torch.int32)

    def stats(rows=rows):
        held = train.prepare(tiny_gpt2, rows, 1, batch=16, store_gb=store_gb, folder=tmp_path).stats
        return {name: value.clone() for name, value in held.items()}  # they are maps of the files that are damaged below

    first, again = stats(), stats()
    assert len(calls) == 1 and all(torch.equal(again[name], value) for name, value in first.items())
    stats(rows.flip(0))
    assert len(calls) == 2
    for kind in ("statistics", "unigrams"):
        for path in tmp_path.glob(f"{kind}-*"):
            raw = bytearray(path.read_bytes())
            raw[-5] ^= 1
            path.write_bytes(raw)
    assert all(torch.equal(stats()[name], value) for name, value in first.items()) and len(calls) == 3
    assert capsys.readouterr().err.count("its checksum differs") == 2


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_a_start_leaves_no_mean_error_to_the_features(data, recipe):
    data, lm, rows = data
    x, t = collect(rows, lm.at(1), lm.keep)
    for lookup in ("none", "frozen", "learned"):
        sae = train.build(data, "topk", 32, 2, lookup, 0, train.RECIPES[recipe])
        error = x.bfloat16().float() - sae.decode(torch.zeros(len(x), 32), t)  # activations are kept in bfloat16
        assert error.mean(0).abs().max() < 1e-4 and sae.scale == pytest.approx((x - x.mean(0)).std().item(), rel=0.01)
        if lookup != "none":
            scaled = train.RECIPES[recipe]["table_scale"] * data.unigrams
            assert torch.allclose(sae.W_lookup * sae.scale, scaled, atol=1e-5)


SETTINGS = dict(activation="topk", n=32, k=2, lookup="learned", seed=0, tokens=200)


@pytest.fixture
def passes(monkeypatch):
    """What fit_all was given, call by call."""
    calls, fit_all = [], train.fit_all
    monkeypatch.setattr(train, "fit_all", lambda runs, *a, **k: calls.append(runs) or fit_all(runs, *a, **k))
    return calls


def test_settings_are_trained_once(data, tmp_path, passes):
    def trained(**changes):
        return train.trained(tmp_path, data[0], **(SETTINGS | changes))

    sae, history = trained()
    again, loaded = trained()
    assert len(passes) == 1 and all(torch.equal(v, again.state_dict()[name]) for name, v in sae.state_dict().items())
    assert history.equals(loaded)
    changed = [dict(seed=1), dict(k=3), dict(lr=0.1), dict(recipe="code"), dict(tokens=300)]
    for count, changes in enumerate(changed, 2):
        trained(**changes)
        assert len(passes) == count
    own = train.RECIPES["ours"]["table_lr"]
    rates = [[rate for _, rate in runs[0].optimisers] for runs in passes]
    assert rates[2:5] == [[1e-3, own], [0.1, own], [1e-3, 1e-2]]  # lr and table_lr
    next(tmp_path.glob("*/history.csv")).unlink()  # as after a power cut
    for changes in ({}, *changed):
        trained(**changes)
    assert len(passes) == 7
    trained(recipe="text", lr=0.03)
    assert [rate for _, rate in passes[-1][0].optimisers] == [0.03, 0.03]  # the table has no rate of its own
    with pytest.raises(ValueError, match="recipes are code, text, ours.*table_scale"):
        trained(recipe="mine")
    with pytest.raises(ValueError, match="table_sale"):
        trained(table_sale=1.0)


JOBS = [SETTINGS | dict(activation=activation, lookup=lookup, seed=seed) for seed in (0, 1)
        for activation, lookup in (("topk", "none"), ("topk", "learned"), ("relu", "learned"), ("gated", "none"))]


def test_a_sweep_is_its_jobs_one_by_one(data, tmp_path, passes):
    places = train.sweep(tmp_path / "together", data[0], JOBS)
    assert [len(runs) for runs in passes] == [4, 4]  # one pass a seed
    for place, job in zip(places, JOBS):
        alone, history = train.trained(tmp_path / "alone", data[0], **job)
        together = SAE.load(place)
        assert together.config == alone.config and (place / "history.csv").read_text() == (
            tmp_path / "alone" / place.name / "history.csv").read_text()
        assert all(torch.equal(value, alone.state_dict()[name]) for name, value in together.state_dict().items())
    train.sweep(tmp_path / "together", data[0], JOBS[::-1])
    assert len(passes) == 2 + len(JOBS)  # nothing was trained twice
    assert not list((tmp_path / "together").glob("unfinished/*"))


def test_a_sweep_stays_within_its_memory_or_says_what_to_change(data, tmp_path, passes):
    one = max(train.needed_bytes(16, 32, job["activation"], 2, 257, 16) for job in JOBS) / 1e9
    train.sweep(tmp_path, data[0], JOBS, memory_gb=2.5 * one)
    assert len(passes) >= 4 and all(len(runs) <= 4 for runs in passes)
    with pytest.raises(ValueError, match=r"about .* GB, and `memory_gb` is 1e-06.*fewer features"):
        train.sweep(tmp_path / "x", data[0], JOBS, memory_gb=1e-6)
    assert not (tmp_path / "x").exists()


class PowerCut(Shuffled):
    def __next__(self):
        if self.given == self.at:
            raise RuntimeError("power cut")
        return super().__next__()


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu", "gated"])
def test_a_run_goes_on_bit_for_bit_from_its_state(activation, tmp_path):
    x, t, u = planted(1000)

    def begun(seed):
        sae = SAE(D, N, activation, 2, V, "learned").start(torch.zeros(D), u, seed=seed)
        return train.Run(sae, 1200, lr=1e-2, sparsity=0.1, dead_after_tokens=100, log_every_tokens=150, checks=3,
                         check=lambda sae: {"held_out": nmse(x, sae(x, t))})

    runs, source = [begun(0), begun(1)], mixed(x, t, 50)
    whole = train.fit_all(runs, source, quick=True)
    for stop in (50, 400, 1150):
        cut = PowerCut(Memory(x, t), 50, 0)
        cut.at = stop // 50
        with pytest.raises(RuntimeError, match="power cut"):
            train.fit_all([begun(0), begun(1)], cut, True, tmp_path, checkpoint_every_s=0)
        again = [begun(5), begun(6)]  # what they are at the start is not what they go on from
        histories = train.fit_all(again, mixed(x, t, 50), True, tmp_path, checkpoint_every_s=0)
        for run, resumed, history, continued in zip(runs, again, whole, histories):
            assert history.equals(continued)
            assert all(torch.equal(v, resumed.sae.state_dict()[name]) for name, v in run.sae.state_dict().items())
        for place in tmp_path.iterdir():
            shutil.rmtree(place)


@pytest.mark.parametrize("kind, raised", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_writes_a_checkpoint_and_leaves(kind, raised, tmp_path):
    x, t, _ = planted(1000)

    class Interrupted(Shuffled):
        def __next__(self):
            if self.given == 7:
                os.kill(os.getpid(), kind)
            return super().__next__()

    sae, uninterrupted = started(), started()
    before = signal.getsignal(kind)
    with pytest.raises(raised):
        train.fit(sae, Interrupted(Memory(x, t), 50, 0), 1000, folder=tmp_path)
    assert signal.getsignal(kind) is before and checkpoints.newest(tmp_path)["source"]["given"] == 8
    train.fit(sae, mixed(x, t, 50), 1000, folder=tmp_path)
    train.fit(uninterrupted, mixed(x, t, 50), 1000)
    assert all(torch.equal(v, sae.state_dict()[name]) for name, v in uninterrupted.state_dict().items())


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path):
    x, t, _ = planted(1000)

    def trained(activation="topk", quick=False, number=1, **how):
        runs = [train.Run(started(activation=activation), 200, **how) for _ in range(number)]
        return train.fit_all(runs, mixed(x, t, 50), quick, tmp_path, checkpoint_every_s=0)

    trained()
    for changes, sentence in ((dict(activation="relu"), "activation 'topk' .asked for: 'relu'.: go on with its settings"),
                              (dict(lr=0.1), r"an SAE with lr 0.001 \(asked for: 0.1\): go"), (dict(quick=True), "quick False"),
                              (dict(schedule="cosine", aux_weight=0.0), "schedule 'decay' .*aux_weight 0.03125"),
                              (dict(number=2), "of 1 SAEs, and 2 are")):
        with pytest.raises(ValueError, match=sentence):
            trained(**changes)
    trained()


def test_nothing_of_a_checkpoint_stays_in_memory(tmp_path, monkeypatch):
    x, t, _ = planted(1000)
    cut = PowerCut(Memory(x, t), 50, 0)
    cut.at, places, newest = 10, set(), checkpoints.newest
    with pytest.raises(RuntimeError, match="power cut"):
        train.fit(started(), cut, 1000, folder=tmp_path, checkpoint_every_s=0)

    class State(dict):
        pass

    def tensors(held):
        for value in held.values() if isinstance(held, dict) else held:
            yield from tensors(value) if isinstance(value, (dict, list)) else [value]

    def noted(*_):
        held = State(newest(tmp_path))
        places.update(v.data_ptr() for v in tensors(held) if isinstance(v, torch.Tensor))
        refs.append(weakref.ref(held))
        return held
    refs, run = [], train.Run(started(), 1000)
    monkeypatch.setattr(train.parallel, "newest", noted)

    class Looks(Shuffled):
        def __next__(self):
            assert refs[0]() is None
            now = [v.data_ptr() for v in tensors(run.state()) if isinstance(v, torch.Tensor)]
            assert len(now) > 10 and (self.given > 10 or not places & set(now))
            return super().__next__()
    train.fit_all([run], Looks(Memory(x, t), 50, 0), folder=tmp_path)


def test_the_sae_that_diverges_is_named_and_in_no_checkpoint(tmp_path):
    x, t, _ = planted(1000)
    runs = [train.Run(started(activation=activation), 500, seed=seed) for seed, activation in ((3, "topk"), (4, "relu"))]
    runs[1].sae.W_dec.data[:] = float("nan")
    with pytest.raises(FloatingPointError, match=r"relu SAE \(n 8, k 2, lookup learned, seed 4\) is nan after 0 tokens"):
        train.fit_all(runs, mixed(x, t, 50))
    sae = started()
    sae.W_lookup.data[7] = float("inf")  # a token that does not occur
    for every, folder in ((0, tmp_path), (60, None)):
        with pytest.raises(FloatingPointError, match=r"W_lookup of the topk SAE \(n 8, .* infinite values after"):
            train.fit(sae, mixed(x[t != 7], t[t != 7], 50), 500, folder=folder, checkpoint_every_s=every)
    assert checkpoints.newest(tmp_path) is None


def test_small_runs_side_by_side_leave_no_thread_idle(monkeypatch):
    """One thread each, and none of OpenMP's beside them, which would spin on the cores that the runs need."""
    seen, step = [], train.Run.step

    def watched(run, x, t):
        seen.append((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
        return step(run, x, t)

    monkeypatch.setattr(train.Run, "step", watched)
    x, t, _ = planted(500)
    torch.set_num_threads(2)
    try:
        for small, wanted in ((0, {(True, 2)}), (10**6, {(False, 1)})):
            monkeypatch.setattr(train, "SMALL", small)
            seen.clear()
            source = Watched(mixed(x, t, 50))
            runs = [train.Run(started(), 500, check=lambda _: dict(threads=torch.get_num_threads()), checks=2)
                    for _ in range(3)]
            history = train.fit_all(runs, source)[0]
            assert set(seen) == wanted and source.threads == {threads for _, threads in wanted}
            assert history["threads"].dropna().tolist() == [2, 2] and torch.get_num_threads() == 2
        train.fit_all([train.Run(started(), 500) for _ in range(3)], stream := WatchedStream(mixed(x, t, 50)))
        assert stream.threads == {2}, "the language model runs in there"
    finally:
        torch.set_num_threads(1)


class Watched:
    """A source that notes how many threads torch has where it is read."""

    def __init__(self, source):
        self.source, self.threads = source, set()

    def __next__(self):
        self.threads.add(torch.get_num_threads())
        return next(self.source)


class WatchedStream(Watched, activations.Streamed):
    pass


def test_only_steps_are_quick():
    seen = []

    class Watched(SAE):
        def loss(self, *arguments):
            seen.append(("step", kernels._quick))
            return super().loss(*arguments)

    class Source(Shuffled):
        def __next__(self):
            seen.append(("source", kernels._quick))
            return super().__next__()
    runs = [train.Run(Watched(D, N, "topk", 2, V, "learned").start(torch.zeros(D), seed=seed), 200, checks=3,
                      check=lambda sae: seen.append(("check", kernels._quick)) or {"a": 1}) for seed in (0, 1)]
    histories = train.fit_all(runs, Source(Memory(*planted(500)[:2]), 50, 0), quick=True)
    assert set(seen) == {("step", True), ("source", False), ("check", False)} and not kernels._quick
    assert [history.a.sum() for history in histories] == [2, 2]  # the first two points fall into one batch


class Killed(BaseException):
    pass


@pytest.mark.parametrize("memory_gb", [4.0, 1e-3])
def test_a_kill_between_two_saes_of_a_pass_loses_nothing(memory_gb, data, tmp_path, passes, monkeypatch):
    jobs, kept, keep, steps, step = JOBS[:3], [], train._Job.keep, [], train.Run.step

    def dies(self, *arguments):
        if len(kept) == 1:
            raise Killed
        kept.append(self)
        keep(self, *arguments)
    with monkeypatch.context() as patch:
        patch.setattr(train._Job, "keep", dies)
        with pytest.raises(Killed):
            train.sweep(tmp_path, data[0], jobs, checkpoint_every_s=0)
    stale = tmp_path / "unfinished" / "stale"
    train.store.write_json(stale / train.PLAN, dict(places=[kept[0].place.name]))
    other = tmp_path / "unfinished" / "other"
    train.store.write_json(other / train.PLAN, dict(places=[kept[0].place.name, "of another sweep"]))
    monkeypatch.setattr(train.Run, "step", lambda *a: steps.append(1) or step(*a))
    places = train.sweep(tmp_path, data[0], jobs[::-1], memory_gb)
    assert not steps and [len(runs) for runs in passes] == [3, 3]
    assert [path.name for path in (tmp_path / "unfinished").iterdir()] == ["other"]
    for place, job in zip(places, jobs[::-1]):
        alone = train.trained(tmp_path / "alone", data[0], **job)[0]
        assert all(torch.equal(value, alone.state_dict()[name]) for name, value in SAE.load(place).state_dict().items())


def test_runs_on_one_pass_have_one_length():
    with pytest.raises(ValueError, match=r"one length.*\[100, 200\]"):
        train.fit_all([train.Run(started(), 100), train.Run(started(), 200)], mixed(*planted(100)[:2], 10))
