"""The blind study of the paper's Table 1: the form, and what scorers' answers say."""
