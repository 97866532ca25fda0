"""What the design claims and nothing else shows: `python -m benchmarks.ablations …`."""
