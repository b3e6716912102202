"""GradInit: the scale of every parameter, learned before training."""
