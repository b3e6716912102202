"""Does balancing help? Every method against equal weights, on equal terms; `python -m benchmarks.evidence --help`."""
