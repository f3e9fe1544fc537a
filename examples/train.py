"""Trains a Hugging Face causal LM in NeMo: python examples/train.py hf_folder=... model.train_ds.paths=..."""

from lightning.pytorch import Trainer
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig

from nemo_minitron import MinitronModel


@hydra_runner(config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """Trains, and leaves checkpoints and a .nemo archive in exp_manager's folder."""
    trainer = Trainer(**cfg.trainer)
    folder = exp_manager(trainer, cfg.exp_manager)
    model = MinitronModel.from_hf(cfg.hf_folder, trainer=trainer, **cfg.model)
    model.maybe_init_from_pretrained_checkpoint(cfg)  # +init_from_nemo_model=other.nemo
    trainer.fit(model)
    model.save_to(str(folder / "model.nemo"))


if __name__ == "__main__":
    main()
