"""What surrounds a training step: loops, sweeps, analysis, and bridges to other code."""
