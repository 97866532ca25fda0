"""A parser of dataclasses. transformers, which it is made of, takes seconds to import."""

from transformers import HfArgumentParser

from flagembedding_matryoshka.parser import WithConfig


class DataclassParser(WithConfig, HfArgumentParser):
    """A parser of dataclasses, as in transformers."""
