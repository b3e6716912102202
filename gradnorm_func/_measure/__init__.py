"""measure: one pass over a batch, by the engine that fits the loss."""
