"""Tokenized sparse autoencoders: an SAE whose decoder adds one learned vector per vocabulary token.

The core reads as the paper:

    sae.py       equations 1 and 2          kernels.py, gpu.py  the sparse products of a step
    baseline.py  the table and its start    train.py            one step, one loop
    lm.py        any causal LM (nnsight)    text.py             documents, packed token rows
    evaluate.py  equations 3 and 4          codes.py, features.py  what features answer to
    plots.py     tables to figures          store.py            files, written whole

Rooms beside it: pairs/ (activations, read in any order), scale/ (many SAEs, many devices, exact
resume), scoring/ (every feature), browser/ (static pages), study/ (the blind study).
"""
