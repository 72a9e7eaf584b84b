"""Activations once, then read in any order: extraction, shards on disk, the order of batches."""
