"""Prunes a model by a plan and distils it: python examples/prune_and_distil.py plan=RUN/plan ..."""

from pathlib import Path

from lightning.pytorch import Trainer
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig

from nemo_minitron import KnowledgeDistillation, MinitronModel, ModelTransform, Pruning


@hydra_runner(config_path="conf", config_name="prune_and_distil")
def main(cfg: DictConfig) -> None:
    """Leaves checkpoints, and the student as a .nemo archive and as a Hugging Face folder."""
    callbacks = [ModelTransform(), KnowledgeDistillation(cfg.hf_folder)]
    trainer = Trainer(**cfg.trainer, callbacks=callbacks)
    folder = Path(exp_manager(trainer, cfg.exp_manager))
    model = MinitronModel.from_hf(cfg.hf_folder, trainer=trainer, **cfg.model)
    model.model_transform = Pruning(cfg.plan)
    trainer.fit(model)
    model.save_to(str(folder / "student.nemo"))
    (folder / "hf").mkdir(exist_ok=True)
    model.save_hf(folder / "hf")


if __name__ == "__main__":
    main()
