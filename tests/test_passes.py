"""Oracle: the run that was not interrupted, and each SAE trained alone."""

import os
import shutil
import signal
import threading
import weakref

import pytest
import torch
from planted import D, N, V, mixed, planted, started

from tsae import kernels, train
from tsae.evaluate import nmse
from tsae.pairs.order import Shuffled, Streamed
from tsae.pairs.shards import Memory
from tsae.sae import SAE
from tsae.scale import checkpoints, passes

torch.set_num_threads(1)  # on tensors as small as these a second thread only waits for the first


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
    whole = passes.fit_all(runs, source, quick=True)
    for stop in (50, 400, 1150):
        cut = PowerCut(Memory(x, t), 50, 0)
        cut.at = stop // 50
        with pytest.raises(RuntimeError, match="power cut"):
            passes.fit_all([begun(0), begun(1)], cut, True, tmp_path, checkpoint_every_s=0)
        again = [begun(5), begun(6)]  # what they are at the start is not what they go on from
        histories = passes.fit_all(again, mixed(x, t, 50), True, tmp_path, checkpoint_every_s=0)
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
        passes.fit_all([train.Run(sae, 1000)], Interrupted(Memory(x, t), 50, 0), folder=tmp_path)
    assert signal.getsignal(kind) is before and checkpoints.last(tmp_path)[1]["source"]["given"] == 8
    passes.fit_all([train.Run(sae, 1000)], mixed(x, t, 50), folder=tmp_path)
    train.fit(uninterrupted, mixed(x, t, 50), 1000)
    assert all(torch.equal(v, sae.state_dict()[name]) for name, v in uninterrupted.state_dict().items())


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path):
    x, t, _ = planted(1000)

    def trained(activation="topk", quick=False, number=1, **how):
        runs = [train.Run(started(activation=activation), 200, **how) for _ in range(number)]
        return passes.fit_all(runs, mixed(x, t, 50), quick, tmp_path, checkpoint_every_s=0)

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
    cut.at, places, newest = 10, set(), passes.parallel.newest
    with pytest.raises(RuntimeError, match="power cut"):
        passes.fit_all([train.Run(started(), 1000)], cut, folder=tmp_path, checkpoint_every_s=0)

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
    monkeypatch.setattr(passes.parallel, "newest", noted)

    class Looks(Shuffled):
        def __next__(self):
            assert refs[0]() is None
            now = [v.data_ptr() for v in tensors(passes._state(run)) if isinstance(v, torch.Tensor)]
            assert len(now) > 10 and (self.given > 10 or not places & set(now))
            return super().__next__()
    passes.fit_all([run], Looks(Memory(x, t), 50, 0), folder=tmp_path)


def test_the_sae_that_diverges_is_named_and_in_no_checkpoint(tmp_path):
    x, t, _ = planted(1000)
    runs = [train.Run(started(activation=activation), 500, seed=seed) for seed, activation in ((3, "topk"), (4, "relu"))]
    runs[1].sae.W_dec.data[:] = float("nan")
    with pytest.raises(FloatingPointError, match=r"relu SAE \(n 8, k 2, lookup learned, seed 4\) is nan after 0 tokens"):
        passes.fit_all(runs, mixed(x, t, 50))
    sae = started()
    sae.W_lookup.data[7] = float("inf")  # a token that does not occur
    for every, folder in ((0, tmp_path), (60, None)):
        with pytest.raises(FloatingPointError, match=r"W_lookup of the topk SAE \(n 8, .* infinite values after"):
            passes.fit_all([train.Run(sae, 500)], mixed(x[t != 7], t[t != 7], 50), folder=folder, checkpoint_every_s=every)
    assert checkpoints.last(tmp_path)[1] is None


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
            monkeypatch.setattr(passes, "SMALL", small)
            seen.clear()
            source = Watched(mixed(x, t, 50))
            runs = [train.Run(started(), 500, check=lambda _: dict(threads=torch.get_num_threads()), checks=2)
                    for _ in range(3)]
            history = passes.fit_all(runs, source)[0]
            assert set(seen) == wanted and source.threads == {threads for _, threads in wanted}
            assert history["threads"].dropna().tolist() == [2, 2] and torch.get_num_threads() == 2
        passes.fit_all([train.Run(started(), 500) for _ in range(3)], stream := WatchedStream(mixed(x, t, 50)))
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


class WatchedStream(Watched, Streamed):
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
    histories = passes.fit_all(runs, Source(Memory(*planted(500)[:2]), 50, 0), quick=True)
    assert set(seen) == {("step", True), ("source", False), ("check", False)} and not kernels._quick
    assert [history.a.sum() for history in histories] == [2, 2]  # the first two points fall into one batch


def test_runs_on_one_pass_have_one_length():
    with pytest.raises(ValueError, match=r"one length.*\[100, 200\]"):
        passes.fit_all([train.Run(started(), 100), train.Run(started(), 200)], mixed(*planted(100)[:2], 10))


def test_the_plain_loop_of_the_core_trains_the_same(tmp_path):
    """`train.fit`, which a reader of the paper reads, and the loop of the sweeps: bit for bit."""
    x, t, _ = planted(1000)
    alone, run = started(), train.Run(started(), 1000, checks=2, check=lambda sae: {"a": nmse(x, sae(x, t))})
    history = train.fit(alone, mixed(x, t, 50), 1000, quick=True, checks=2, check=lambda sae: {"a": nmse(x, sae(x, t))})
    assert passes.fit_all([run], mixed(x, t, 50), quick=True)[0].equals(history)
    assert all(torch.equal(value, run.sae.state_dict()[name]) for name, value in alone.state_dict().items())
