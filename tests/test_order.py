"""Oracle: multisets of positions, a plain generator, a permutation in whole numbers of Python."""

import hashlib
import json
import math
from collections import Counter
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file, save_file
from standin import GOLDEN_ROWS, KEPT, ROWS, D, equal, golden_digest, golden_residuals, keep, residuals

from tsae.pairs.order import Shuffled, Streamed, permuted
from tsae.pairs.shards import Memory, Store

torch.set_num_threads(1)


def source_of(kind, **changes):
    """A source of each kind over the same pairs, with settings small enough for several epochs and refills."""
    if kind == "streamed":
        arguments = dict(batch=12, buffer=90, seed=1, batch_rows=10)
        return Streamed(ROWS, changes.pop("residuals", residuals), keep, **(arguments | changes))
    return Shuffled(Memory(residuals(KEPT), KEPT), **(dict(batch=12, seed=1) | changes))


def naive_permuted(i, n, seed, epoch):
    """One number, in whole numbers of Python."""
    def hashed(v):
        for _ in range(2):
            v %= 2**32
            v = (v ^ (v >> 16)) * 0x45D9F3B
        v %= 2**32
        return v ^ (v >> 16)

    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    keys = [int.from_bytes(digest[j:j + 4], "little") for j in range(0, 32, 4)]
    base = math.isqrt(n - 1) + 1
    while True:
        left, right = divmod(i, base)
        for key in keys:
            left, right = right, (left + hashed(right + key)) % base
        i = left * base + right
        if i < n:
            return i


@pytest.mark.parametrize("n", [1, 2, 10, 97, 1000])
def test_the_permutation_is_the_naive_one(n):
    for seed, epoch in ((0, 0), (5, 1), (2**70, 3)):
        naive = [naive_permuted(i, n, seed, epoch) for i in range(n)]
        assert permuted(torch.arange(n), n, seed, epoch).tolist() == naive


def test_the_permutation_is_the_naive_one_for_large_numbers():
    n = 3 * 10**17
    some = [0, 1, 12345, n // 2, n - 1]
    assert permuted(torch.tensor(some), n, 7, 2).tolist() == [naive_permuted(i, n, 7, 2) for i in some]


@pytest.mark.parametrize("n", [*range(1, 201), 1000, 4096, 4097])
def test_the_permutation_is_one(n):
    for seed, epoch in ((0, 0), (0, 1), (2**70, 3)):
        p = permuted(torch.arange(n), n, seed, epoch)
        assert p.dtype == torch.int64 and torch.equal(p.sort().values, torch.arange(n))
        part = torch.randint(n, (5,), generator=torch.Generator().manual_seed(0))
        assert torch.equal(permuted(part, n, seed, epoch), p[part])  # one number at a time or all


def test_the_permutation_holds_for_more_pairs_than_memory():
    n = 3 * 10**17
    i = torch.cat([torch.arange(1000), n - 1 - torch.arange(1000)])
    p = permuted(i, n, 0, 0)
    assert 0 <= p.min() and p.max() < n and len(p.unique()) == 2000
    assert 0.45 < (p.double() / n).mean() < 0.55


def test_the_permutation_looks_shuffled():
    """Each statistic within 4 of its own standard deviations, for fixed keys."""
    n = 4099
    i = torch.arange(n).double()
    seen = [permuted(torch.arange(n), n, seed, epoch) for seed in range(4) for epoch in range(4)]
    for p in seen:
        moved = torch.stack([p.double(), p.roll(1).double(), (p % 2).double(), (p % 64).double()])
        assert torch.corrcoef(torch.cat([i[None], moved]))[0, 1:].abs().max() < 4 / n**0.5
        assert torch.corrcoef(moved[:2])[0, 1].abs() < 4 / n**0.5
        assert (p == torch.arange(n)).sum() <= 5  # fixed points: 1 is expected
        steps = (p[1:] > p[:-1]).sum().item() - n / 2
        assert abs(steps) < 4 * (n / 12) ** 0.5
        cells = torch.histc(p[:1024].double(), 32, 0, n)  # where the first quarter goes
        assert (cells - 32).square().sum() / 32 < 31 + 4 * 62**0.5
    for a, b in zip(seen, seen[1:]):
        assert (a == b).sum() <= 5 and torch.corrcoef(torch.stack([a, b]).double())[0, 1].abs() < 4 / n**0.5


@pytest.mark.parametrize("n, batch", [(1, 3), (5, 12), (97, 10), (96, 12), (543, 543), (543, 7)])
def test_every_epoch_gives_every_pair_once(n, batch):
    source = Shuffled(Memory(residuals(torch.arange(n)), torch.arange(n)), batch, seed=3)
    batches = list(islice(source, 4 * n // batch + 1))
    assert all(len(t) == batch and torch.equal(x, residuals(t)) for x, t in batches)
    order = torch.cat([t for _, t in batches])[:4 * n].view(4, n)
    assert all(torch.equal(epoch.sort().values, torch.arange(n)) for epoch in order)
    assert n < 20 or len({tuple(epoch.tolist()) for epoch in order}) == 4


def naive_stream(rows, batch, buffer, seed, batch_rows):
    """The stream as a plain generator, with whole copies and no state."""
    generator, x, t = torch.Generator().manual_seed(seed), torch.zeros(0, D), torch.zeros(0, dtype=torch.int32)
    while True:
        for which in torch.randperm(len(rows), generator=generator).split(batch_rows):
            kept = rows[which][keep(rows[which])]
            x, t = torch.cat([x, residuals(kept)]), torch.cat([t, kept])
            if len(t) >= max(buffer, 2 * batch):
                order = torch.randperm(len(t), generator=generator)
                x, t = x[order], t[order]
                used = len(t) // 2 // batch * batch
                yield from zip(x[:used].split(batch), t[:used].split(batch))
                x, t = x[used:], t[used:]


@pytest.mark.parametrize("batch, buffer, seed, batch_rows", [(12, 90, 1, 10), (5, 1, 2, 97), (100, 0, 0, 1),
                                                             (7, 2000, 3, 64)])
def test_streamed_batches_are_those_of_a_plain_generator(batch, buffer, seed, batch_rows):
    settings = dict(batch=batch, buffer=buffer, seed=seed, batch_rows=batch_rows)
    naive = [(x, t.long()) for x, t in islice(naive_stream(ROWS, **settings), 200)]
    assert equal(islice(Streamed(ROWS, residuals, keep, dtype=torch.float32, **settings), 200), naive)
    rounded = [(x.bfloat16().float(), t) for x, t in naive]
    assert equal(islice(Streamed(ROWS, residuals, keep, **settings), 200), rounded)


def test_a_stream_gives_every_epoch_and_holds_a_bounded_number():
    read = []
    source = source_of("streamed", residuals=lambda tokens: read.append(int(keep(tokens).sum())) or residuals(tokens))
    given = Counter()
    for number in range(1, 300):
        given.update(next(source)[1].tolist())
        assert sum(read) - 12 * number <= 90 + max(read) and source.held[0].dtype == torch.bfloat16
    assert set(given) == set(KEPT.tolist()) and max(given.values()) - min(given.values()) <= 2


@pytest.mark.parametrize("kind", ["shuffled", "streamed"])
def test_a_restored_source_goes_on_bit_for_bit(kind, tmp_path):
    straight, passes = list(islice(source_of(kind), 150)), []
    counted = {"residuals": lambda tokens: passes.append(1) or residuals(tokens)} if kind == "streamed" else {}
    for stop in [*range(12), 37, 38, 50, 77, 101]:
        source = source_of(kind)
        list(islice(source, stop))
        state = source.state()
        assert all(isinstance(value, (int, torch.Tensor)) for value in state.values())
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        if tensors:
            save_file(tensors, tmp_path / "state")
            tensors = load_file(tmp_path / "state")
        numbers = json.loads(json.dumps({name: value for name, value in state.items() if name not in tensors}))
        after = list(islice(source, 5))  # the state is a snapshot
        again = source_of(kind, **counted)
        list(islice(again, 3))  # whatever it was in the middle of
        passes.clear()
        again.restore(numbers | tensors)
        assert not passes and again.state().keys() == state.keys() and again.given == stop
        rest = list(islice(again, 150 - stop))
        assert equal(after, straight[stop:stop + 5]) and equal(rest, straight[stop:])
        assert len(passes) <= math.ceil((150 - stop) * 12 / 50) + 3


@pytest.mark.parametrize("kind", ["shuffled", "streamed"])
def test_a_state_of_another_source_is_refused(kind):
    state = source_of(kind).state()
    for name, value in dict(seed=2, batch=6).items():
        with pytest.raises(ValueError, match=f"saved with {name} .*, and this source has {value}"):
            source_of(kind, **{name: value}).restore(state)
    with pytest.raises(ValueError, match="lacks given"):
        source_of(kind).restore({name: value for name, value in state.items() if name != "given"})
    if kind == "shuffled":
        with pytest.raises(ValueError, match=f"saved with pairs {len(KEPT)}, and this source has 9"):
            Shuffled(Memory(residuals(KEPT[:9]), KEPT[:9]), 12, 1).restore(state)
    else:
        with pytest.raises(ValueError, match="saved with rows 97, and this source has 96"):
            Streamed(ROWS[:96], residuals, keep, 12, 90, 1, 10).restore(state)
        with pytest.raises(ValueError, match="buffer of torch.bfloat16, and this source has torch.float32"):
            source_of(kind, dtype=torch.float32).restore(state)


def test_an_interrupted_stream_gives_what_it_would_have():
    straight, interrupts = list(islice(source_of("streamed"), 100)), []

    def interrupted(tokens):
        interrupts.append(1)
        if len(interrupts) % 3 == 0:
            raise KeyboardInterrupt
        return residuals(tokens)

    source, batches = source_of("streamed", residuals=interrupted), []
    while len(batches) < 100:
        try:
            batches.append(next(source))
        except KeyboardInterrupt:
            assert source.state()["given"] == len(batches)
    assert equal(batches, straight) and len(interrupts) > 30


@pytest.mark.parametrize("kind", ["shuffled", "streamed"])
def test_ranks_share_out_the_global_batches(kind):
    whole = list(islice(source_of(kind), 40))
    for world in (2, 3, 12):
        ranks = [source_of(kind, rank=rank, world=world) for rank in range(world)]
        for x, t in whole:
            shares = [next(source) for source in ranks]
            assert all(torch.equal(share_x, x[rank::world]) and torch.equal(share_t, t[rank::world])
                       for rank, (share_x, share_t) in enumerate(shares))
        one = source_of(kind)
        one.restore(ranks[-1].state())  # states know nothing of ranks
        assert equal(islice(one, 3), list(islice(source_of(kind), 43))[40:])
    for rank, world in ((0, 5), (2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="batch of 12 pairs cannot be dealt to rank"):
            source_of(kind, rank=rank, world=world)


def test_prefetch_changes_nothing_but_the_time(tmp_path):
    pairs = Store.make(tmp_path, ROWS, residuals, keep, D, {}, shard_tokens=100, batch_rows=10)
    straight = list(islice(Shuffled(pairs, 12, 1), 100))
    source = Shuffled(pairs, 12, 1, prefetch=True)
    first = list(islice(source, 30))
    state = source.state()
    assert state == dict(seed=1, pairs=len(pairs), batch=12, given=30)
    assert equal(first + list(islice(source, 70)), straight)
    source.restore(state)
    assert equal(islice(source, 70), straight[30:])


def test_an_error_in_the_thread_comes_out_of_next():
    class Broken(Memory):
        whole = True

        def gather(self, index):
            if not self.whole:
                raise OSError("the disk is gone")
            return super().gather(index)

    pairs = Broken(residuals(KEPT), KEPT)
    straight = list(islice(Shuffled(pairs, 12, 1), 5))
    source = Shuffled(pairs, 12, 1, prefetch=True)
    first = [next(source), next(source)]
    source._ahead.result()
    pairs.whole = False
    first.append(next(source))  # it was ahead already
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(source)
    assert source.state()["given"] == 3
    pairs.whole = True
    assert equal(first + [next(source), next(source)], straight)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_broken_activation_is_not_streamed(wrong):
    def broken(tokens):
        return residuals(tokens).masked_fill((tokens == 8 * 35 + 2).unsqueeze(-1), wrong)
    with pytest.raises(ValueError, match="row 35 of the tokens, position 2, token id 282: .*float32"):
        list(islice(source_of("streamed", residuals=broken), 60))


def test_a_stream_needs_a_position():
    with pytest.raises(ValueError, match="special tokens only"):
        next(Streamed(ROWS, residuals, lambda tokens: torch.zeros_like(tokens, dtype=torch.bool), 4, 9, 0))


@pytest.mark.parametrize("kind", ["shuffled", "streamed"])
def test_golden_order(kind):
    """30 batches of 12, more than two epochs of 128 pairs."""
    t = GOLDEN_ROWS[keep(GOLDEN_ROWS)]
    if kind == "shuffled":
        source = Shuffled(Memory(golden_residuals(t), torch.arange(len(t))), 12, seed=3)
    else:
        source = Streamed(GOLDEN_ROWS, golden_residuals, keep, 12, 50, seed=3, batch_rows=3)
    x, t = zip(*islice(source, 30))
    wanted = dict(shuffled="03dc6910fc652f640d6ec7de2403fd0741eb3d489604b920797f1b93fd089943",
                  streamed="d87416829a0007380825400bd043f9af545c7b02b22a522598bc1737cc0a33f2")
    assert golden_digest(torch.cat(x), torch.cat(t)) == wanted[kind], (
        "the order changed: raise VERSION in tsae/pairs/prepare.py and write the new digest here")
