"""The process that measures speed, and what it tells."""

from nemo_minitron.evaluation.speed import Case, measure_in_process


def test_what_others_print_is_not_taken_for_numbers_and_no_case_is_longer_than_the_model(
    teacher, tmp_path, monkeypatch
):
    # as vLLM's log does, which ends after the numbers were told
    (tmp_path / "sitecustomize.py").write_text("import atexit; atexit.register(print, 'the end')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = measure_in_process(teacher, "cpu", [Case(1, 256, 2), Case(1, 4, 999)])
    # the model has 64 positions
    assert [(case["prompt"], case["new"]) for case in found["cases"]] == [(62, 2), (1, 63)]
