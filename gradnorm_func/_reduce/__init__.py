"""reduce: the stats of micro-batches and of ranks become those of the whole batch."""
