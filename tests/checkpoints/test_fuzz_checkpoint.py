"""Damaged folders are a model or one clear error; ``make fuzz`` runs thousands of them."""

import itertools
import shutil
import time
from collections import Counter

import pytest

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.hf_config import both_spellings, read_config
from nemo_minitron.checkpoints.set_aside import notes
from nemo_minitron.checkpoints.side_files import copy_side_files, tokenizer_fingerprint
from nemo_minitron.families import architecture_of, families
from nemo_minitron.proofs.tiny_models import tiny_config
from nemo_minitron.pruning.cost import model_size
from nemo_minitron.pruning.slice import Cut
from tests.support.fuzz_checkpoint import cases, sound
from tests.support.fuzzing import SEED, some, tally


def size(folder):
    model = architecture_of(read_config(folder), str(folder / "config.json"))
    model.check_lists()
    return model_size(model)


def opened(folder):
    checkpoint = open_checkpoint(folder)
    both_spellings(Cut(checkpoint.architecture, {}, (0,)).result.config)
    model_size(checkpoint.architecture)
    notes(folder, checkpoint.config)
    tokenizer_fingerprint(folder)
    (folder / "target").mkdir()
    copy_side_files(folder, folder / "target")


def check(name, builder, folder):
    folder.mkdir()
    builder(folder)
    begin, outcome = time.process_time(), "opened"
    for act in (size, opened):
        try:
            act(folder)
        except ValueError as error:
            outcome = "refused"
            assert str(folder) in str(error), (name, error)
            assert len(str(error)) < 2_000, (name, error)
            assert "\x1b" not in str(error), (name, error)
    assert time.process_time() - begin < 2, name
    return outcome


@pytest.mark.parametrize("name", families())
def test_what_is_damaged_was_sound_before(tmp_path, name):
    for number, changes in enumerate(families()[name].proofs):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        sound(folder, tiny_config(families()[name], changes))
        opened(folder)


def test_damaged_folders_are_models_or_one_clear_error(tmp_path):
    outcomes = Counter()
    for name, builder in some(cases(SEED), 60):
        outcomes[check(name, builder, tmp_path / "case")] += 1
        shutil.rmtree(tmp_path / "case")
    assert set(outcomes) == {"opened", "refused"}
    tally("model folders", outcomes)


def test_one_seed_gives_the_same_cases(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number, (_, builder) in enumerate(itertools.islice(cases(7), 6)):
            (tmp_path / name / f"{number}").mkdir()
            builder(tmp_path / name / f"{number}")
    files = [
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("a", "b")
    ]
    assert files[0] == files[1]
