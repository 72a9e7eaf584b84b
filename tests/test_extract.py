"""Oracle: naive loops over rows, and sums by hand."""

import math

import pytest
import torch
from standin import GOLDEN_ROWS, ROWS, golden_digest, golden_residuals, keep, residuals

from tsae.pairs.extract import Moments, activations, statistics


def collect(rows, **settings):
    x, t = zip(*activations(rows, residuals, keep, **settings))
    return torch.cat(x), torch.cat(t)


def test_activations_are_the_kept_positions_in_order():
    x, t = collect(ROWS, batch_rows=7)
    naive = [token for row in ROWS.tolist() for i, token in enumerate(row) if i and token % 5 != 3]
    assert t.tolist() == naive and torch.equal(x, residuals(torch.tensor(naive)))
    order = torch.tensor([5, 0])
    naive = [token for row in ROWS[order].tolist() for i, token in enumerate(row) if i and token % 5 != 3]
    assert collect(ROWS, order=order)[1].tolist() == naive


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_broken_activation_names_its_row_position_and_token(wrong):
    def broken(tokens):
        return residuals(tokens).masked_fill((tokens == 8 * 35 + 2).unsqueeze(-1), wrong)
    with pytest.raises(ValueError, match="row 35 of the tokens, position 2, token id 282: .*float32"):
        list(activations(ROWS, broken, keep, 7, torch.arange(96, -1, -1)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_of_what_is_no_number_are_refused(value):
    moments = Moments(5)
    moments.add(torch.tensor([[1.0, value]]), torch.tensor([2]))
    with pytest.raises(ValueError, match="NaN or infinite.*another layer"):
        moments.result()


@pytest.mark.parametrize("part", [1, 7, 10**6])
def test_moments_are_the_same_in_whatever_parts_they_come(part):
    """Whole numbers, so that sums are exact in any order; the last part is empty. More than one block of 8192."""
    t = torch.arange(9000) % 50
    x = golden_residuals(t)
    stats = statistics([*zip(x.split(part), t.split(part)), (x[:0], t[:0])], 51)
    exact, centred = x.double(), x.double() - x.double().mean(0)
    assert torch.allclose(stats["mean"], exact.mean(0).float()) and stats["mean"].dtype == torch.float32
    assert torch.allclose(stats["scale"], centred.square().mean().sqrt().float()) and not stats["scale"].ndim
    assert stats["count"].tolist() == [180] * 50 + [0] and stats["sum"].dtype == torch.float32
    for token in range(51):
        assert torch.equal(stats["sum"][token], exact[t == token].sum(0).float())


def test_moments_need_pairs_and_their_own_vocabulary():
    with pytest.raises(ValueError, match="special tokens only"):
        statistics([], 5)
    with pytest.raises(ValueError, match="token id 49 is outside the vocabulary of 49"):
        statistics([(torch.zeros(3, 2), torch.tensor([0, 49, 1]))], 49)


def test_golden_statistics():
    stats = statistics(activations(GOLDEN_ROWS, golden_residuals, keep), 62)
    told = "the numbers changed: raise VERSION in tsae/pairs/prepare.py and write the new ones here"
    assert golden_digest(stats["count"], stats["sum"]) == (
        "d6eacd6917b1a0a408f3e5672098b10ad5dde31bb637c3924b485210e44be1e0"), told
    assert stats["mean"].tolist() == [30.9609375, -27.9609375, 75.2109375, 0.5546875], told
    assert stats["scale"].item() == 31.24101448059082, told
