"""Oracle: each SAE of a sweep trained alone, and sweeps killed between two SAEs."""

import pytest
import torch

from tsae import store, train
from tsae.sae import SAE
from tsae.scale import sweep as module
from tsae.scale.sweep import needed_bytes, sweep, trained

SETTINGS = dict(activation="topk", n=32, k=2, lookup="learned", seed=0, tokens=200)


@pytest.fixture
def passes(monkeypatch):
    """What fit_all was given, call by call."""
    calls, fit_all = [], module.fit_all
    monkeypatch.setattr(module, "fit_all", lambda runs, *a, **k: calls.append(runs) or fit_all(runs, *a, **k))
    return calls


def test_settings_are_trained_once(data, tmp_path, passes):
    def kept(**changes):
        return trained(tmp_path, data, **(SETTINGS | changes))

    sae, history = kept()
    again, loaded = kept()
    assert len(passes) == 1 and all(torch.equal(v, again.state_dict()[name]) for name, v in sae.state_dict().items())
    assert history.equals(loaded)
    changed = [dict(seed=1), dict(k=3), dict(lr=0.1), dict(recipe="code"), dict(tokens=300)]
    for count, changes in enumerate(changed, 2):
        kept(**changes)
        assert len(passes) == count
    own = train.RECIPES["ours"]["table_lr"]
    rates = [[rate for _, rate in runs[0].optimisers] for runs in passes]
    assert rates[2:5] == [[1e-3, own], [0.1, own], [1e-3, 1e-2]]  # lr and table_lr
    next(tmp_path.glob("*/history.csv")).unlink()  # as after a power cut
    for changes in ({}, *changed):
        kept(**changes)
    assert len(passes) == 7
    kept(recipe="text", lr=0.03)
    assert [rate for _, rate in passes[-1][0].optimisers] == [0.03, 0.03]  # the table has no rate of its own
    with pytest.raises(ValueError, match="recipes are code, text, ours.*table_scale"):
        kept(recipe="mine")
    with pytest.raises(ValueError, match="table_sale"):
        kept(table_sale=1.0)

JOBS = [SETTINGS | dict(activation=activation, lookup=lookup, seed=seed) for seed in (0, 1)
        for activation, lookup in (("topk", "none"), ("topk", "learned"), ("relu", "learned"), ("gated", "none"))]


def test_a_sweep_is_its_jobs_one_by_one(data, tmp_path, passes):
    places = sweep(tmp_path / "together", data, JOBS)
    assert [len(runs) for runs in passes] == [4, 4]  # one pass a seed
    for place, job in zip(places, JOBS):
        alone, history = trained(tmp_path / "alone", data, **job)
        together = SAE.load(place)
        assert together.config == alone.config and (place / "history.csv").read_text() == (
            tmp_path / "alone" / place.name / "history.csv").read_text()
        assert all(torch.equal(value, alone.state_dict()[name]) for name, value in together.state_dict().items())
    sweep(tmp_path / "together", data, JOBS[::-1])
    assert len(passes) == 2 + len(JOBS)  # nothing was trained twice
    assert not list((tmp_path / "together").glob("unfinished/*"))


def test_a_sweep_stays_within_its_memory_or_says_what_to_change(data, tmp_path, passes):
    one = max(needed_bytes(16, 32, job["activation"], 2, 257, 16) for job in JOBS) / 1e9
    sweep(tmp_path, data, JOBS, memory_gb=2.5 * one)
    assert len(passes) >= 4 and all(len(runs) <= 4 for runs in passes)
    with pytest.raises(ValueError, match=r"about .* GB, and `memory_gb` is 1e-06.*fewer features"):
        sweep(tmp_path / "x", data, JOBS, memory_gb=1e-6)
    assert not (tmp_path / "x").exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("memory_gb", [4.0, 1e-3])
def test_a_kill_between_two_saes_of_a_pass_loses_nothing(memory_gb, data, tmp_path, passes, monkeypatch):
    jobs, kept, keep, steps, step = JOBS[:3], [], module._Job.keep, [], train.Run.step

    def dies(self, *arguments):
        if len(kept) == 1:
            raise Killed
        kept.append(self)
        keep(self, *arguments)
    with monkeypatch.context() as patch:
        patch.setattr(module._Job, "keep", dies)
        with pytest.raises(Killed):
            sweep(tmp_path, data, jobs, checkpoint_every_s=0)
    stale = tmp_path / "unfinished" / "stale"
    store.write_json(stale / module.PLAN, dict(places=[kept[0].place.name]))
    other = tmp_path / "unfinished" / "other"
    store.write_json(other / module.PLAN, dict(places=[kept[0].place.name, "of another sweep"]))
    monkeypatch.setattr(train.Run, "step", lambda *a: steps.append(1) or step(*a))
    places = sweep(tmp_path, data, jobs[::-1], memory_gb)
    assert not steps and [len(runs) for runs in passes] == [3, 3]
    assert [path.name for path in (tmp_path / "unfinished").iterdir()] == ["other"]
    for place, job in zip(places, jobs[::-1]):
        alone = trained(tmp_path / "alone", data, **job)[0]
        assert all(torch.equal(value, alone.state_dict()[name]) for name, value in SAE.load(place).state_dict().items())


@pytest.mark.parametrize("lengths, last_lr, share", [  # one and three batches have no step at a lower rate of their own
    ((100, 208, 400), 0.0, 0.75), ((16, 48, 100), 0.0, 0.85), ((100, 200), 1.0, 0.8)])
@pytest.mark.parametrize("cut", [0, 40, 90, 170, 230])
def test_shorter_trainings_branch_off_and_end_as_on_their_own(lengths, last_lr, share, cut, data, tmp_path, passes,
                                                              monkeypatch):
    jobs = [SETTINGS | dict(lookup=lookup, tokens=tokens, last_lr=last_lr, dead_after_tokens=50)
            for lookup in ("none", "learned") for tokens in lengths]
    cut, step, steps = cut if cut < max(lengths) else 0, train.Run.step, []

    def counted(self, *batch):
        if self.seen >= cut > 0:
            raise Killed
        steps.append(1)
        return step(self, *batch)
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "step", counted)
        if cut:
            with pytest.raises(Killed):
                sweep(tmp_path / "together", data, jobs, checkpoint_every_s=0)
        cut = 0
        sweep(tmp_path / "together", data, jobs, checkpoint_every_s=0)
    alone = sum(-(-job["tokens"] // 16) for job in jobs)
    assert len(passes) <= 2 and len(steps) < share * alone
    for job in jobs:
        together, history = trained(tmp_path / "together", data, **job)
        own, its = trained(tmp_path / "alone", data, **job)
        assert history.equals(its) and together.config == own.config
        assert all(torch.equal(value, own.state_dict()[name]) for name, value in together.state_dict().items())
    assert not list((tmp_path / "together").glob("unfinished/*"))


def test_what_cannot_branch_off_is_trained_alone_and_memory_counts_the_branches(data, tmp_path, passes):
    def groups(memory_gb=4.0, **changes):
        jobs = [SETTINGS | changes | dict(tokens=tokens) for tokens in (100, 110, 200)]
        before = len(passes)
        for job, place in zip(jobs, sweep(tmp_path / store.key(**changes, memory=memory_gb), data, jobs, memory_gb)):
            assert SAE.load(place) and store.read_json(place / "settings.json")["tokens"] == job["tokens"]
        return [len(runs) for runs in passes[before:]]

    one = needed_bytes(16, 32, "topk", 2, 257, 16) / 1e9
    assert groups() == [1] and groups(3.1 * one) == [1], "one run, two branches of which live together"
    assert groups(2.9 * one) == [1, 1, 1]
    assert groups(recipe="code") == [1, 1, 1], "the rates differ from the second step on"
    assert groups(activation="relu", sparsity=0.1) == [1, 1, 1] and groups(checks=2) == [1, 1, 1]


def test_a_lost_sae_of_an_interrupted_pass_is_trained_again(data, tmp_path, monkeypatch):
    jobs, step = [SETTINGS | dict(tokens=tokens) for tokens in (100, 400)], train.Run.step

    def dies(self, *batch):
        if self.seen >= 200:
            raise Killed
        return step(self, *batch)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Run, "step", dies)
        sweep(tmp_path, data, jobs, checkpoint_every_s=0)
    kept, = tmp_path.glob("*/history.csv")
    kept.unlink()
    assert all((place / "history.csv").is_file() for place in sweep(tmp_path, data, jobs))
