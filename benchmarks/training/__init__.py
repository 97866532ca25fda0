"""What a training step costs, in time and in memory: `python -m benchmarks.training …`."""
