"""A plugin of pytest for sentence-transformers' tests: their tiny CrossEncoder is ours, and other tests are left out.

Tests that name models of the hub are left out, and these, whose subject a MatryoshkaCrossEncoder does not have.
"""

import os

import pytest

from flagembedding_matryoshka.cross_encoder import load_cross_encoder

MODEL = "_reranker_bert_tiny_model"
LEFT_OUT = {
    "test_classifier_dropout_default_value": "a head has no dropout",
    "test_default_activation_fn": "scores are raw by default, as in MatryoshkaReranker",
    "test_load_activation_fn_from_config_custom": "CrossEncoder loads our module with trust_remote_code only",
    "test_predict_low_precision_logits_upcast_to_float32": "compares raw scores as closely as the sigmoid's",
    "test_predict_per_call_processing_kwargs": "the arguments of a processor, which our module does not have",
    "test_predict_rank_args_decorator": "replaces CrossEncoder.predict, which our predict calls with positions",
    "test_safe_serialization": "weights that are no safetensors are refused",
}


def pytest_collection_modifyitems(config, items):
    kept, others = [], []
    for item in items:
        by_name = getattr(item, "callspec", None) and item.callspec.params.get("model_fixture")
        has_model = MODEL in item.fixturenames or f"_{by_name}" == MODEL
        (kept if has_model and item.originalname not in LEFT_OUT else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = kept


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request):
    """Set up their model as ours. Other fixtures are theirs."""
    if fixturedef.argname != MODEL:
        return None
    model = load_cross_encoder(os.environ["MATRYOSHKA_MODEL"], device="cpu")
    model.model_card_data.generate_widget_examples = False
    fixturedef.cached_result = (model, fixturedef.cache_key(request), None)
    return model
