"""How fast a re-ranker scores at several depths and widths: `python -m benchmarks.scoring …`."""
