import json
import shutil

import pytest

from flagembedding_matryoshka.finetune.checkpoints import find_checkpoint, is_complete, locked, newest_resumable


@pytest.fixture
def output_dir(tmp_path):
    """Checkpoints of steps 2, 9 and 10; the writing of 10 stopped within its last file, that of 11 before it."""
    for step in (2, 9, 10, 11):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        (directory / "rng_state.pth").touch()
        state = json.dumps({"global_step": step, "log_history": []})
        (directory / "trainer_state.json").write_text(state if step < 10 else state[:20])
    (tmp_path / "checkpoint-11" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-best").mkdir()
    return tmp_path


def test_a_checkpoint_cut_off_is_never_taken_for_a_good_one(output_dir):
    assert [is_complete(output_dir / f"checkpoint-{step}") for step in (2, 9, 10, 11)] == [True, True, False, False]
    assert newest_resumable(output_dir) == output_dir / "checkpoint-9"
    shutil.rmtree(output_dir / "checkpoint-9")
    assert newest_resumable(output_dir) == output_dir / "checkpoint-2"


def test_what_can_be_asked_for(output_dir):
    assert find_checkpoint(None, output_dir) is find_checkpoint("False", output_dir) is None
    assert [find_checkpoint(name, output_dir) for name in ("True", "last")] == [str(output_dir / "checkpoint-9")] * 2
    assert find_checkpoint(str(output_dir / "checkpoint-2"), output_dir) == str(output_dir / "checkpoint-2")


def test_without_a_checkpoint_the_run_starts_anew(tmp_path):
    assert find_checkpoint("last", tmp_path) is None
    assert find_checkpoint("last", tmp_path / "never made") is None


def test_asking_for_one_that_was_cut_off_names_a_good_one(output_dir):
    with pytest.raises(
        ValueError,
        match=r"checkpoint-10 is not a complete checkpoint.*newest .* in .*: .*checkpoint-9",
    ):
        find_checkpoint(str(output_dir / "checkpoint-10"), output_dir)


def test_a_checkpoint_with_weights_only_is_not_resumed(output_dir, caplog):
    (output_dir / "checkpoint-9" / "rng_state.pth").rename(output_dir / "checkpoint-2" / "rng_state_1.pth")
    assert find_checkpoint("last", output_dir) == str(output_dir / "checkpoint-2")
    assert "checkpoint-9 were written with save_only_model=True and cannot be resumed" in caplog.text
    with pytest.raises(ValueError, match="checkpoint-9 was written with save_only_model=True: it has no optimizer"):
        find_checkpoint(str(output_dir / "checkpoint-9"), output_dir)
    assert is_complete(output_dir / "checkpoint-9")


def test_a_second_run_in_the_same_directory_is_refused(tmp_path):
    refused = pytest.raises(ValueError, match=r"another run writes to output_dir=.*out: it holds .*\.lock")
    with locked(tmp_path / "out"), refused, locked(tmp_path / "out"):
        pass
    with locked(tmp_path / "out"):
        pass
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "out" / ".lock").touch()  # of a run that was killed
    with locked(tmp_path / "out"):
        pass
