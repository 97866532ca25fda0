"""Tiny random encoders with a tokenizer of whole words."""

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

WORDS = ["wing", "lift", "drag", "flow", "heat", "shock", "layer", "plate", "cone", "nozzle"]


def save_cross_encoder(path, labels):
    """A random BERT of 2 layers, 32 wide, whose scores differ by more than rounding."""
    _save(path, BertForSequenceClassification, num_labels=labels)
    return path


def save_bi_encoder(path, **options):
    """The same without a head as a `SentenceTransformer`, which `options` are given to: vectors are means."""
    _save(path / "bert", BertModel)
    encoder = Transformer(str(path / "bert"))
    pooling = Pooling(encoder.get_embedding_dimension(), pooling_mode="mean")
    SentenceTransformer(modules=[encoder, pooling], device="cpu", **options).save(str(path), create_model_card=False)
    return path


def _save(path, kind, **options):
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **special).save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.5,
        **options,
    )
    kind(config).save_pretrained(path)
