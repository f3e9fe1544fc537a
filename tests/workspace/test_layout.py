"""A workspace's paths: the contract on disk, written out once more, and by nobody else."""

from pathlib import Path

from nemo_minitron.workspace import layout
from nemo_minitron.workspace.layout import ARTIFACTS, Workspace

PLACES = {
    "source": "teacher/source.json", "verdict": "gate.json", "tokens": "tokens", "results": "results", "live": "live", "data_commits": "data_commits",
    "unpacked": "unpacked", "search": "search.json", "sweep": "sweep.json", "cascade": "cascade.json", "pareto": "pareto.png", "lock": ".lock",
    "stage_lock": ".stage.lock", "holder": ".holder.json", "commands": "commands.jsonl", "memory": ".memory.json",
    "launched": ".launch", "archive": "run.nemo",
}  # fmt: skip


def test_every_path_is_where_earlier_runs_have_put_it(tmp_path):
    workspace = Workspace(tmp_path / "run")
    for name in ARTIFACTS:
        assert getattr(workspace, name) == workspace.artifact(name) == tmp_path / "run" / name
    assert workspace.artifacts == tuple(tmp_path / "run" / name for name in ARTIFACTS)
    for name, place in PLACES.items():
        assert getattr(workspace, name) == tmp_path / "run" / place, name
    others = {"root", "artifacts", "shared", "slurm_jobs", *PLACES, *ARTIFACTS}
    assert {
        name for name, value in vars(Workspace).items() if isinstance(value, property)
    } <= others
    assert not (tmp_path / "run").exists()


def test_what_is_there_once_per_stage_variant_or_text():
    workspace = Workspace(Path("run"))
    found = {
        workspace.values("score"): "run/.launch/score.json",
        workspace.outcome("score"): "run/.launch/score.outcome.json",
        workspace.progress("score"): "run/.launch/score.progress.json",
        workspace.slurm("score"): "run/.launch/score.slurm.json",
        workspace.log("score"): "run/logs/score.log",
        workspace.round(20, "a"): "run/rounds/20/a",
        workspace.variant("a"): "run/variants/a",
        workspace.unpacked_model("12ab"): "run/unpacked/12ab/hf",
        workspace.held_out_tasks("0123456789abcdef"): "run/results/tasks-0123456789ab",
        layout.outcome_of_job(workspace.slurm("score")): "run/.launch/score.outcome.json",
        layout.outcome_of_rank(workspace.outcome("score"), 3): "run/.launch/score.outcome.3.json",
        layout.manifest_in(workspace.plan): "run/plan/manifest.json",
        layout.state_in(workspace.student): "run/student/state",
        layout.aside_in(workspace.student, "0123456789abcdef"): "run/student/state-0123456789ab",
        layout.result_in(workspace.student): "run/student/result",
        layout.model_in(workspace.student): "run/student/hf",
        layout.metrics_in(workspace.student): "run/student/metrics.jsonl",
        layout.plots_in(workspace.scores): "run/scores/plots",
        layout.logs_in(workspace.student): "run/student/logs",
        layout.checkpoints_in(
            layout.state_in(workspace.student)
        ): "run/student/state/nemo/checkpoints",
        layout.snapshot_in(layout.teachers_in(Path("state")), 4): "state/teachers/step=4",
        layout.commit_in(workspace.data_commits, "a/b", None): "run/data_commits/a--b.json",
        layout.commit_in(workspace.data_commits, "a/b", "x/1"): "run/data_commits/a--b@x%2F1.json",
        layout.build_lock_of(workspace.tokens / "1"): "run/tokens/.1.lock",
    }
    assert {str(path): place for path, place in found.items()} == {
        place: place for place in found.values()
    }
    assert layout.outcome_of_rank(workspace.outcome("score"), 0) == workspace.outcome("score")


def test_notes_of_batch_jobs_are_found(tmp_path):
    workspace = Workspace(tmp_path)
    assert workspace.slurm_jobs == []
    workspace.launched.mkdir()
    for path in (workspace.slurm("score"), workspace.slurm("distill"), workspace.outcome("score")):
        path.write_text("{}")
    assert workspace.slurm_jobs == [workspace.slurm("distill"), workspace.slurm("score")]


def test_variants_see_what_decides_no_plan(tmp_path):
    names = [path.name for path in Workspace(tmp_path).shared]
    assert names == [
        "pretrain",
        "teacher",
        "correct",
        "scores",
        "tokens",
        "unpacked",
        "data_commits",
    ]
