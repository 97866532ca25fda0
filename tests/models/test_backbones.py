"""What holds for a Mistral holds for every backbone."""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.cross_encoder import load_cross_encoder
from flagembedding_matryoshka.models.layers import Context
from flagembedding_matryoshka.models.packing import pack
from tests.backbones import BACKBONES, ESSENTIAL, HEAD_TOKEN, THOROUGH, layer_wise, let_heads_differ, write_raw
from tests.batches import EXITS, LENGTHS, WIDTHS, close, collate, random_sequences, scores, slow_scores

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY_WIDTH = pytest.mark.parametrize("width", WIDTHS)
SEQUENCES = random_sequences(LENGTHS)
QUERY = "how does a wing lift"
DOCUMENTS = ["air flows faster over the upper side of a wing.", "a wing", "heat " * 20, "", "air of a wing " * 6]
PAIRS = [(QUERY, document) for document in DOCUMENTS] + [("what is heat", "heat")]


@pytest.fixture(scope="module")
def raw_path(backbone, tiny_tokenizer, tmp_path_factory):
    return write_raw(backbone, tiny_tokenizer, tmp_path_factory.mktemp(backbone))


@pytest.fixture(scope="module")
def plain(raw_path):
    """transformers' own model."""
    return AutoModelForCausalLM.from_pretrained(raw_path, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def model(raw_path):
    """With heads that differ."""
    model = layer_wise(raw_path)
    let_heads_differ(model)
    return model


@pytest.fixture(scope="module")
def path(model, tiny_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("layer_wise")
    model.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@ESSENTIAL
@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_deepest_exit_is_the_logit_that_transformers_computes(raw_path, plain, attention):
    plain = copy.deepcopy(plain)
    if attention == "sdpa" and plain.config.model_type == "gemma2":
        pytest.skip("transformers' sdpa leaves out the cap")
    plain.set_attn_implementation(attention)
    batch = collate(SEQUENCES)
    logits = plain(batch["input_ids"], batch["attention_mask"]).logits
    last = batch["attention_mask"].sum(1) - 1
    (expected,) = scores(layer_wise(raw_path), SEQUENCES, cutoff_layers=[6])
    close(expected, logits[range(len(last)), last, HEAD_TOKEN], 2e-5)


@ESSENTIAL
@torch.no_grad()
@EVERY_WIDTH
@pytest.mark.parametrize("weights", ["attention", "equal"])
def test_a_batch_scores_as_transformers_layers_on_one_sequence_at_a_time(backbone, model, plain, width, weights):
    tiny = BACKBONES[backbone]
    model = copy.deepcopy(model)
    model.config.compress_weights = weights
    options = {"equal_weights": weights == "equal", "scale": tiny.embedding_scale}
    slow = [slow_scores(plain, model.lm_head, sequence, **width, **options) for sequence in SEQUENCES]
    close(scores(model, SEQUENCES, **width), tiny.finish(torch.stack(slow, 1)), 2e-5)


@ESSENTIAL
@torch.no_grad()
def test_a_layer_takes_keys_and_values_of_the_row_for_its_last_tokens(model, monkeypatch):
    """Its first pass ends where `Context.update` has them; its second one returns what a pass for all tokens does."""
    updates, update = [], Context.update

    def counting(self, keys, values, *layer):
        updates.append((keys.shape[2], self.states is not None))
        return update(self, keys, values, *layer)

    monkeypatch.setattr(Context, "update", counting)
    decoder, layer = model.model, model.model.layers[0]
    batch = collate(SEQUENCES)
    token_ids, packed = pack(batch["input_ids"], batch["attention_mask"])
    hidden = decoder.embed(token_ids, packed).hidden
    rotary = decoder.rotary_embeddings(hidden, packed)[0]
    every, _ = layer(hidden, packed=packed, position_embeddings=rotary)
    assert not updates
    last, _ = layer(hidden, packed=packed, position_embeddings=rotary, only_last=True)
    assert updates == [(packed.total_tokens, False), (len(SEQUENCES), True)]
    close(last, every[:, packed.cu_seqlens[1:] - 1])


@THOROUGH
@torch.no_grad()
@EVERY_WIDTH
def test_a_row_scores_the_same_alone_and_in_any_batch(model, width):
    expected = torch.cat([scores(model, [sequence], **width) for sequence in SEQUENCES], 1)
    close(scores(model, SEQUENCES, side="left", extra=3, **width), expected)
    close(scores(model, SEQUENCES[::-1], **width), expected.flip(1))


@THOROUGH
@EVERY_WIDTH
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_all_weights_have_the_gradients_of_transformers_layers(backbone, model, plain, width):
    tiny = BACKBONES[backbone]
    own = copy.deepcopy(model)
    own.gradient_checkpointing_enable({"use_reentrant": False})
    own.train()
    scores(own, SEQUENCES, **width).square().mean().backward()
    slow = [slow_scores(plain, model.lm_head, sequence, **width, scale=tiny.embedding_scale) for sequence in SEQUENCES]
    expected = copy.deepcopy(plain)
    expected.zero_grad()
    loss = tiny.finish(torch.stack(slow, 1)).square().mean()
    parameters = dict(plain.model.named_parameters())
    gradients = torch.autograd.grad(loss, parameters.values())
    actual = dict(own.model.named_parameters())
    for name, gradient in zip(parameters, gradients, strict=True):
        assert gradient.any(), name
        close(actual[name].grad, gradient, 2e-5 * max(1, float(gradient.abs().max())))


@ESSENTIAL
@torch.no_grad()
def test_saving_and_loading_change_no_bit(model, path, tmp_path):
    for again in (AutoModelForCausalLM.from_pretrained(path), type(model).from_pretrained(path, dtype=torch.float32)):
        assert type(again) is type(model)
        assert type(again.config) is type(model.config) and again.config.exit_layers == list(EXITS)
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, again.state_dict()[name]), name
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    close(scores(type(model).from_pretrained(tmp_path), SEQUENCES), scores(model, SEQUENCES), 1e-6)


@pytest.fixture(scope="module")
def reranker(path):
    return MatryoshkaReranker(str(path), dtype="float32", devices="cpu")


def all_scores(reranker, pairs=PAIRS, **width):
    return torch.tensor(reranker.compute_score(pairs, cutoff_layers=[2, 4, 6], **width))


@ESSENTIAL
@EVERY_WIDTH
def test_candidates_that_share_their_query_score_as_alone(reranker, width):
    alone = torch.stack([all_scores(reranker, [pair], **width)[:, 0] for pair in PAIRS], 1)
    close(all_scores(reranker, **width), alone)


@THOROUGH
@EVERY_WIDTH
def test_a_cascade_is_dropping_by_hand(reranker, width):
    second, full = (reranker.rank(QUERY, DOCUMENTS, cutoff_layers=[layer], **width) for layer in (3, 6))
    kept = {item["corpus_id"] for item in second[:3]}
    expected = [item["corpus_id"] for item in full if item["corpus_id"] in kept]
    expected += [item["corpus_id"] for item in second[3:]]
    found = reranker.rank(QUERY, DOCUMENTS, cascade={3: 0.6}, **width)
    assert [item["corpus_id"] for item in found] == expected


@THOROUGH
def test_what_is_exported_scores_the_same(reranker, tmp_path):
    reranker.export(str(tmp_path), [2, 4])
    part = MatryoshkaReranker(str(tmp_path), dtype="float32", devices="cpu")
    assert part.config.exit_layers == [2, 4] and part.config.num_hidden_layers == 4
    expected = reranker.compute_score(PAIRS, cutoff_layers=[2, 4], compress_layers=[1], compress_ratio=2)
    actual = part.compute_score(PAIRS, cutoff_layers=[2, 4], compress_layers=[1], compress_ratio=2)
    close(torch.tensor(actual), torch.tensor(expected), 1e-6)


@THOROUGH
def test_int8_is_close(reranker, path):
    small = MatryoshkaReranker(str(path), dtype="float32", devices="cpu", quantization="int8")
    expected = all_scores(reranker)
    # a bias of these that is dropped moves scores by about their deviation
    assert 1e-6 < (all_scores(small) - expected).abs().mean() / expected.std() < 0.4


@THOROUGH
def test_nf4_computes_with_the_weights_that_4_bits_hold(reranker, path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    small = MatryoshkaReranker(str(path), dtype="float32", devices="cpu", quantization="nf4")
    rounded = MatryoshkaReranker(str(path), dtype="float32", devices="cpu")
    linears = dict(rounded.model.named_modules())
    for name, module in small.model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            linears[name].weight.data = weight.view_as(linears[name].weight)
    assert (all_scores(rounded) - all_scores(reranker)).abs().max() > 1e-3
    close(all_scores(small), all_scores(rounded), 1e-4)


@THOROUGH
@EVERY_WIDTH
def test_operations_are_those_that_torch_counts(reranker, width):
    request = {"cutoff_layers": [2, 5], **width}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        reranker.compute_score(PAIRS, **request)
    assert counter.get_total_flops() == reranker.estimate_flops(PAIRS, **request)


@THOROUGH
def test_a_cross_encoder_gives_the_same_scores(reranker, path):
    encoder = load_cross_encoder(str(path), device="cpu")
    for width in WIDTHS:
        actual = torch.tensor(encoder.predict(PAIRS, cutoff_layers=[4], **width))
        close(actual, torch.tensor(reranker.compute_score(PAIRS, cutoff_layers=[4], **width)))


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0] * 4,
    "original_max_position_embeddings": 32,
}
LONGROPE_CONFIGS = {
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    "gemma3_text": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": LONGROPE,
        },
        "head_dim": 8,
    },
}


@torch.no_grad()
@pytest.mark.parametrize("name", LONGROPE_CONFIGS)
def test_a_sequence_beyond_the_reach_of_longrope_is_refused(name, tiny_tokenizer, tmp_path):
    model = layer_wise(write_raw(name, tiny_tokenizer, tmp_path, **copy.deepcopy(LONGROPE_CONFIGS[name])))
    fits, longer = random_sequences([(32, 0, 0), (33, 0, 0)])
    assert scores(model, [fits]).isfinite().all()
    message = "row 1 has 33 tokens, more than original_max_position_embeddings of longrope=32"
    with pytest.raises(ValueError, match=message):
        scores(model, [fits, longer])
