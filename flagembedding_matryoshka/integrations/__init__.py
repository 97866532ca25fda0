"""The re-ranker in other libraries, one file for each; a file needs the extra with its name."""
