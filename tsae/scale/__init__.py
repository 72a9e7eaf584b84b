"""Many SAEs on one pass, exact resume, many devices (`torchrun -m tsae.scale`)."""
