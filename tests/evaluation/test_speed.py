"""The process that measures speed, and what it reports."""

import torch

from nemo_minitron.evaluation.speed import Case, measure_in_process
from nemo_minitron.models.causal_lm import load_model
from tests.support.models import make_model


def test_memory_is_that_of_the_loaded_model_however_it_is_stored(tmp_path):
    """A student lies in float32 and is measured in bfloat16: loading it takes more than running it."""
    wide = make_model(tmp_path / "wide", "llama", hidden_size=384, vocab_size=32000)
    model = load_model(wide, torch.bfloat16)
    model.save_pretrained(tmp_path / "narrow")
    peaks = [
        measure_in_process(folder, "cpu", [Case(1, 8, 2)], "bfloat16")["peak_megabytes"]
        for folder in (wide, tmp_path / "narrow")
    ]
    assert peaks[0] < 1.5 * peaks[1]


def test_what_others_print_is_not_taken_for_numbers_and_no_case_is_longer_than_the_model(
    teacher, tmp_path, monkeypatch
):
    # as vLLM's log does, which ends after the numbers were told
    (tmp_path / "sitecustomize.py").write_text("import atexit; atexit.register(print, 'the end')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = measure_in_process(teacher, "cpu", [Case(1, 256, 2), Case(1, 4, 999)])
    # the model has 64 positions
    assert [(case["prompt"], case["new"]) for case in found["cases"]] == [(62, 2), (1, 63)]
