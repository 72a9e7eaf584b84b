"""What chance reaches: things that look like the model's activations, and say nothing of the text.

    permuted   the same language model with every weight dealt to another place of its matrix
    gaussian   activations drawn from a Gaussian of the same mean and covariance, whatever the token

A third null needs no code here: an SAE as train.build starts it, with random directions.
"""

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tsae.lm import LM, Layer


def permuted(lm: LM, seed: int = 0) -> LM:
    """A language model whose tensors hold the numbers of `lm`, each in another order.

    Weights that are tied stay tied; `lm` is left as it is.
    """
    generator, model = torch.Generator().manual_seed(seed), copy.deepcopy(lm.model)
    with torch.no_grad():
        for weight in model.parameters():
            order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
            weight.copy_(weight.flatten()[order].view_as(weight))
    return LM(model, lm.tokenizer, f"{lm.name} with permuted weights")


def gaussian(layer: Layer, x: Tensor, seed: int = 0) -> Layer:
    """A layer of Gaussian activations with the mean and covariance of x (m, d) of `layer`.

    A row of tokens has the same draws whenever it is asked for.
    """
    mean, covariance = x.double().mean(0), torch.cov(x.double().T)
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp_min(0).sqrt()).T.float()

    def drawn(n: int, own: bytes) -> Tensor:
        start = int.from_bytes(hashlib.sha256(own).digest()[:7])
        normal = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(start))
        return normal.to(x.device) @ root + mean.float()

    def rows(tokens: Tensor) -> Iterator[Tensor]:
        for row in tokens.cpu().long():
            yield drawn(len(row), f"{seed} ".encode() + row.numpy().tobytes())

    about = dict(gaussian=seed, root=hashlib.sha256(root.cpu().numpy().tobytes()).hexdigest())
    return replace(layer, residuals=lambda tokens: torch.stack(list(rows(tokens))), other=None,
                   unigrams=lambda: drawn(layer.vocabulary, f"{seed} unigrams".encode()),
                   identity=layer.identity | about)
