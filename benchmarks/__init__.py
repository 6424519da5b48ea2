"""What surgery costs, measured against the stock training step: ``python -m benchmarks``."""
