"""Make the tiny base model of the tests: a 6-layer Mistral which ranks docstrings, trained on two CPU cores.

    python -m tests.tiny_base.recipe --output_dir DIR

A ranking loss does not find the interaction of query and passage from random weights in minutes, so the weights start
with a lexical matcher written into them (``write_matcher``): an ordinary checkpoint whose first three layers count the
query's words in the passage by their rarity. Training on summary → docstring pairs with BM25 negatives does the rest.
"""

import argparse
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import Stemmer
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from docstrings import Bm25, Candidates, Pair, candidates, collect_pairs, split

PROMPT = "Predict whether passage B contains an answer to query A."
VOCABULARY, HIDDEN, HEADS, LAYERS = 6144, 192, 3, 6
QUERY_TOKENS, PASSAGE_TOKENS = 28, 88
GROUP, CANDIDATES, QUERIES = 8, 20, 8
LEARNING_RATE, WARMUP_STEPS, STEPS = 5e-4, 60, 800
EXIT_WEIGHTS = {3: 0.3, 6: 1.0}

# The matcher's places in the residual stream: a word's identity, its company, and single features.
IDENTITY, COMPANY = slice(0, 128), slice(128, 168)
IDF, ONE, SEPARATOR, START, END, AFTER, MATCH, MATCHED_IDF, SOFT, SCORE = range(168, 178)


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A lower-casing BPE over words, digits and signs; the prompt's words and "yes" are one token each."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    pieces = Regex(r"[a-z]+|[0-9]|\n|[^\sa-z0-9]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="removed", invert=True)
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, limit_alphabet=128)
    tokenizer.train_from_iterator([*texts, *[f"Yes\n{PROMPT}"] * 1000], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


class Encoder:
    """Texts to the re-ranker's inputs: ``<s> A: query \\n B: passage \\n prompt``."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.newline, self.prompt = self.ids("\n"), self.ids("\n" + PROMPT)
        self.cache: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def cached(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.ids(text)
        return self.cache[text]

    def pair(self, query: str, passage: str) -> list[int]:
        head = [self.tokenizer.bos_token_id, *self.cached("A: " + query)[:QUERY_TOKENS], *self.newline]
        return [*head, *self.cached("B: " + passage)[:PASSAGE_TOKENS], *self.prompt]


@dataclass(frozen=True)
class WordStatistics:
    """What the corpus says of each token: idf in [0, 1] (vocabulary,) and its company (vocabulary, 40)."""

    idf: Tensor
    company: Tensor


def stem_numbers(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """For each token the number of the first token with the same stem, (vocabulary,)."""
    stemmer, first = Stemmer.Stemmer("english"), {}
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([first.setdefault(stemmer.stemWord(token), number) for number, token in enumerate(tokens)])


def word_statistics(encoder: Encoder, stems: Tensor, pairs: Sequence[Pair]) -> WordStatistics:
    """Inverse document frequency of the stems, and latent semantic analysis (SVD) of the stem by docstring matrix."""
    rows, columns = [], []
    for number, pair in enumerate(pairs):
        text = torch.tensor(encoder.ids(pair.query + " " + pair.passage))
        found = stems[text].unique()
        rows.append(found)
        columns.append(torch.full_like(found, number))
    index = torch.stack([torch.cat(rows), torch.cat(columns)])
    frequency = torch.bincount(index[0], minlength=len(stems)).float().clamp(min=1)
    idf = (len(pairs) / frequency).log() / math.log(len(pairs))
    matrix = torch.sparse_coo_tensor(index, idf[index[0]], (len(stems), len(pairs)), check_invariants=False)
    left, _, _ = torch.svd_lowrank(matrix.coalesce(), q=COMPANY.stop - COMPANY.start, niter=3)
    company = torch.nn.functional.normalize(left, dim=1)
    return WordStatistics(idf[stems], company[stems])


def new_model(tokenizer: PreTrainedTokenizerFast) -> MistralForCausalLM:
    """A randomly initialised Mistral; nearly all rotary dimensions turn so slowly that attention compares content."""
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=HIDDEN // HEADS, max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e10}, sliding_window=None, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return MistralForCausalLM(config)


def slow_dimensions(size: int, head: int) -> Tensor:
    """The rows of a head's query and key projection that rotary embedding leaves alone over a few hundred places."""
    half = torch.arange(size // 8, size // 2)
    return head * size + torch.cat([half, half + size // 2])


def set_content_match(layer, head: int, source: slice, sharpness: float) -> None:
    """Let a head look for tokens whose ``source`` part of the stream equals its own: the same projection as q and k."""
    rows = slow_dimensions(layer.self_attn.head_dim, head)
    width = source.stop - source.start
    projection = torch.randn(max(len(rows), width), min(len(rows), width))
    projection = torch.linalg.qr(projection).Q
    projection = projection if len(rows) >= width else projection.T
    for module in (layer.self_attn.q_proj, layer.self_attn.k_proj):
        module.weight[rows, source] = sharpness * projection


def set_flag_look(layer, head: int, logits: dict[int, float]) -> None:
    """Let every token of a head attend by the key token's features alone: {feature: logit of a feature of size 1}."""
    row = slow_dimensions(layer.self_attn.head_dim, head)[-1]
    layer.self_attn.q_proj.weight[row, ONE] = math.sqrt(layer.self_attn.head_dim)
    for feature, logit in logits.items():
        layer.self_attn.k_proj.weight[row, feature] = logit


def carry(layer, head: int, inputs: dict[int, float], output: int) -> None:
    """Let a head write a weighted sum of features of the tokens it looks at into one feature."""
    row = head * layer.self_attn.head_dim
    for feature, weight in inputs.items():
        layer.self_attn.v_proj.weight[row, feature] = weight
    layer.self_attn.o_proj.weight[output, row] = 1.0


@torch.no_grad()
def write_matcher(model: MistralForCausalLM, tokenizer: PreTrainedTokenizerFast, stems: Tensor, words: WordStatistics):
    """Write a lexical matcher into the embedding and layers 1 to 3; features are of size about 1 after the norm.

    1. Every token looks for a separator: AFTER is set on passage and prompt, not on the query.
    2. Every token looks for its own stem. A passage token finds itself, earlier copies and the query's: the query's
       share falls with each repetition as BM25's term weight does. The MLP multiplies MATCH by IDF.
    3. The last token sums MATCHED_IDF over the passage; the start token takes the rest of its attention, so that the
       softmax's mean acts as a sum. SCORE is what the row of "Yes" reads.
    """
    embedding, layers = model.model.embed_tokens.weight, model.model.layers
    own, shared = torch.randn(len(stems), 128), torch.randn(len(stems), 128)[stems]
    embedding.zero_()
    embedding[:, IDENTITY] = math.sqrt(0.85) * shared + math.sqrt(0.15) * own
    embedding[:, COMPANY] = words.company * math.sqrt(40) * 0.7
    embedding[:, IDF], embedding[:, ONE] = words.idf, 1.0
    yes, newline, end = (tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in ("Yes", "\n", "."))
    embedding[newline, SEPARATOR] = embedding[tokenizer.bos_token_id, START] = embedding[end, END] = 1.0
    embedding[newline, IDF] = embedding[tokenizer.bos_token_id, IDF] = 0.0
    embedding[yes] = 0.0
    embedding[yes, SCORE] = 4.0
    for layer in layers:
        layer.self_attn.q_proj.weight.mul_(0.1)
        layer.self_attn.k_proj.weight.mul_(0.1)
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()

    set_flag_look(layers[0], 0, {SEPARATOR: 12.0, START: 6.0})
    carry(layers[0], 0, {SEPARATOR: 2.0}, AFTER)

    set_content_match(layers[1], 0, IDENTITY, 1.31)
    carry(layers[1], 0, {ONE: 4.0, AFTER: -1.45}, MATCH)
    set_content_match(layers[1], 1, COMPANY, 1.0)
    carry(layers[1], 1, {ONE: 2.0, AFTER: -0.7}, SOFT)
    mlp = layers[1].mlp
    mlp.gate_proj.weight[0].zero_()
    mlp.gate_proj.weight[0, MATCH], mlp.gate_proj.weight[0, AFTER], mlp.gate_proj.weight[0, ONE] = 3.0, 6.0, -17.5
    mlp.up_proj.weight[0].zero_()
    mlp.up_proj.weight[0, IDF] = 1.0
    mlp.down_proj.weight[MATCHED_IDF, 0] = 3.0

    set_flag_look(layers[2], 0, {START: 1.5})
    carry(layers[2], 0, {MATCHED_IDF: 6.0}, SCORE)
    for layer in layers[3:]:
        set_content_match(layer, 0, IDENTITY, 0.7)


def exit_scores(model: MistralForCausalLM, rows: Sequence[Sequence[int]], yes: int) -> Tensor:
    """Scores at every depth, (layers, rows): the row of "Yes" on the normalised state of the last token.

    Causal attention never sees the right padding, so there is no mask.
    """
    last = torch.tensor([len(row) - 1 for row in rows])
    ids = torch.zeros(len(rows), int(last.max()) + 1, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    places, states, scores = torch.arange(len(rows)), model.model.embed_tokens(ids), []
    rotary = model.model.rotary_emb(states, torch.arange(ids.shape[1])[None])
    for layer in model.model.layers:
        states = layer(states, position_embeddings=rotary)
        scores.append(model.model.norm(states[places, last]) @ model.lm_head.weight[yes])
    return torch.stack(scores)


@torch.no_grad()
def reciprocal_ranks(model: MistralForCausalLM, encoder: Encoder, yes: int, lists: Sequence[Candidates]) -> Tensor:
    """MRR@10 of every depth over lists of candidates, (layers,)."""
    order = sorted(range(len(lists)), key=lambda i: sum(len(text) for text in lists[i].passages))
    total = torch.zeros(LAYERS)
    for i in order:
        scores = exit_scores(model, [encoder.pair(lists[i].query, text) for text in lists[i].passages], yes)
        ranks = 1 + (scores > scores[:, lists[i].positive, None]).sum(1)
        total += torch.where(ranks <= 10, 1 / ranks, 0.0)
    return total / len(lists)


def training_groups(pairs: Sequence[Pair], seed: int) -> Iterator[tuple[str, list[str]]]:
    """Queries with GROUP passages, endlessly: the positive and others of the BM25 list that it is in.

    Queries whose positive is not in the list are left out, as they are when lists are re-ranked: they would teach that
    the passage with the fewest words in common is right.
    """
    draw, passages = random.Random(seed), [pair.passage for pair in pairs]
    found, _ = Bm25(passages).top([pair.query for pair in pairs], CANDIDATES)
    lists = {number: row for number, row in enumerate(found.tolist()) if number in row}
    while True:
        for number in draw.sample(list(lists), len(lists)):
            others = draw.sample([i for i in lists[number] if i != number], GROUP - 1)
            yield pairs[number].query, [passages[i] for i in [number, *others]]


def group_scores(model: MistralForCausalLM, rows: Sequence[list[int]], yes: int, chunks: int = 4) -> Tensor:
    """``exit_scores`` (layers, rows) in chunks of similar length, so that little padding is computed."""
    order = torch.tensor(sorted(range(len(rows)), key=lambda i: len(rows[i])))
    parts = [exit_scores(model, [rows[i] for i in chunk], yes) for chunk in order.chunk(chunks)]
    return torch.cat(parts, dim=1)[:, order.argsort()]


def train(model: MistralForCausalLM, encoder: Encoder, yes: int, pairs: Sequence[Pair], steps: int) -> None:
    """Cross entropy of the positive in its group, summed over EXIT_WEIGHTS; warm-up, then a cosine to a 50th."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    groups, target, recent = training_groups(pairs, seed=0), torch.zeros(QUERIES, dtype=torch.long), []
    for step in range(1, steps + 1):
        for options in optimizer.param_groups:
            decay = 0.02 + 0.98 * math.cos(step / steps * math.pi / 2) ** 2
            options["lr"] = LEARNING_RATE * min(1, step / WARMUP_STEPS) * decay
        rows = [encoder.pair(query, text) for query, texts in (next(groups) for _ in range(QUERIES)) for text in texts]
        scores = group_scores(model, rows, yes).unflatten(1, (QUERIES, GROUP))
        losses = {depth: cross_entropy(scores[depth - 1], target) for depth in EXIT_WEIGHTS}
        optimizer.zero_grad()
        sum(weight * losses[depth] for depth, weight in EXIT_WEIGHTS.items()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(losses[LAYERS].item())
        if step % 50 == 0:
            print(f"step {step} of {steps}  loss {np.mean(recent[-50:]):.3f}", flush=True)


def report(name: str, mrr: Tensor) -> None:
    print(name, " ".join(f"layer {depth} {value:.3f}" for depth, value in enumerate(mrr.tolist(), start=1)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS, help="about 2 seconds each on two cores")
    parser.add_argument("--dev_queries", type=int, default=200, help="to report MRR@10 on, before and after")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    pairs = collect_pairs()
    parts = split(pairs)
    tokenizer = train_tokenizer([text for pair in parts.train for text in (pair.query, pair.passage)])
    encoder, stems = Encoder(tokenizer), stem_numbers(tokenizer)
    yes = encoder.ids("Yes")[0]
    model = new_model(tokenizer)
    write_matcher(model, tokenizer, stems, word_statistics(encoder, stems, parts.train))

    dev = candidates(parts.dev, [pair.passage for pair in pairs])[: arguments.dev_queries]
    bm25 = sum(1 / (item.positive + 1) for item in dev if item.positive < 10) / len(dev)
    print(
        f"{len(parts.train)} training pairs; BM25's own order on {len(dev)} dev queries: MRR@10 {bm25:.3f}", flush=True
    )
    report("matcher  ", reciprocal_ranks(model, encoder, yes, dev))
    train(model, encoder, yes, parts.train, arguments.steps)
    report("trained  ", reciprocal_ranks(model, encoder, yes, dev))
    model.half().save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)


if __name__ == "__main__":
    main()
