"""Token rows and stand-ins for the language model, for the tests of pairs/."""

import hashlib

import torch

ROWS = torch.arange(97 * 8, dtype=torch.int32).view(97, 8)  # every position has a token of its own
D = 3


def residuals(tokens):
    """x is a function of t alone, so that a pair which was torn apart shows."""
    t = tokens.float()
    return torch.stack([t / 7, t.sin() * 300, -t], dim=-1)


def keep(tokens):
    kept = tokens % 5 != 3
    kept[:, 0] = False
    return kept


KEPT = ROWS[keep(ROWS)]


def equal(ours, theirs):
    """Whether two series of batches (x, t) are the same bits."""
    return all(torch.equal(a, b) for pair in zip(ours, theirs, strict=True) for a, b in zip(*pair, strict=True))


# For the golden digests: small integers, which every machine computes and bfloat16 holds exactly

GOLDEN_ROWS = (torch.arange(20 * 9, dtype=torch.int32) * 7 % 61).view(20, 9)  # `keep` keeps 128 positions


def golden_residuals(tokens):
    t = tokens.long()
    return torch.stack([t, 3 - t, t * t % 200, t % 2], dim=-1).float()


def golden_digest(*tensors):
    """sha256 of tensors of whole numbers, as 64-bit integers."""
    whole = hashlib.sha256()
    for tensor in tensors:
        assert torch.equal(tensor, tensor.round())
        whole.update(tensor.long().contiguous().numpy().astype("<i8").tobytes())
    return whole.hexdigest()
