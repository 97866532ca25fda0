"""Templates, tokenisation, and files of texts."""
