"""Training data from a corpus, without training: hard negatives, lists and teacher scores."""
