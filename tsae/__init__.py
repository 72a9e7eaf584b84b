"""Tokenized sparse autoencoders: an SAE whose decoder adds one learned vector per vocabulary token.

    sae.py       the model                      lm.py        any causal LM, through nnsight
    train.py     pairs (x, t) and the loop      text.py      documents and packed token rows
    evaluate.py  reconstruction metrics         features.py  what each feature answers to
    plots.py     tables to figures              store.py     files, written whole or not at all
"""
