"""Pytrees, losses, optimizers and numerics: what everything else stands on."""
