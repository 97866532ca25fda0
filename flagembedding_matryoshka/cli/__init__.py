"""One command with sub-commands."""
