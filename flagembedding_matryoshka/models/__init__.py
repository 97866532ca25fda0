"""One ragged batch through a decoder whose layers can be left early and whose tokens can be merged."""
