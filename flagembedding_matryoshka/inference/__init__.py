"""From pairs to scores."""
