"""Reports of an evaluation: Markdown tables, JSON, an HTML page and a plot."""
