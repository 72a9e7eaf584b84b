"""Where the token table starts: what SAE.baseline adds to the reconstruction beside the features.

Statistics are those of pairs.prepare.Data: mean (d,), count (V,) and sum (V, d) of the
activations, and `limit`, the norm over which one is a sink.
"""

import torch

WITHOUT, WITH, FROZEN = "without table", "with table", "frozen token mean"
NAMES = {"none": WITHOUT, "learned": WITH}  # of a `lookup`, in result tables and figures


def conditional_mean(stats: dict[str, torch.Tensor], prior: float = 4.0) -> torch.Tensor:
    """E[a | t] (V, d), shrunk to the overall mean as if that was seen `prior` times with each t."""
    return (stats["sum"] + prior * stats["mean"]) / (stats["count"].unsqueeze(-1) + prior)


def left_over(stats: dict[str, torch.Tensor], table: torch.Tensor) -> torch.Tensor:
    """Mean (d,) of a_t - table[t]: where b_dec starts beside a table (V, d)."""
    share = stats["count"] / stats["count"].sum()
    return stats["mean"] - share @ table


def start_table(stats: dict[str, torch.Tensor], unigrams: torch.Tensor,
                recipe: dict) -> torch.Tensor:
    """Where the table of a recipe (an entry of train.RECIPES) starts: (V, d) raw.

    Its `start` is "unigram", the residuals A([BOS, t])[1] in `unigrams` (V, d), or "mean", the
    shrunk conditional means; both times its `table_scale`. The mean stands in for a unigram that is
    a sink: one with a norm over stats["limit"].
    """
    if recipe["start"] == "unigram":
        sinks = unigrams.norm(dim=-1, keepdim=True) > stats["limit"]
        return recipe["table_scale"] * torch.where(sinks, conditional_mean(stats), unigrams)
    if recipe["start"] == "mean":
        return recipe["table_scale"] * conditional_mean(stats)
    raise ValueError(f'start is {recipe["start"]!r}: expected "unigram" or "mean"')
