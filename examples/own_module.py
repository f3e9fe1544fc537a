"""Prunes and distils the model in a module of one's own: python examples/own_module.py FOLDER PLAN OUT."""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_minitron import KnowledgeDistillation, ModelTransform, Pruning


class Tuning(LightningModule):
    """A fine-tuning as one writes it without this package; nothing in it changes."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.llm = AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        """The cross-entropy that the model itself computes."""
        loss: torch.Tensor = self.llm(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of the parameters that are trained."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)

    def train_dataloader(self) -> torch.utils.data.DataLoader[dict[str, torch.Tensor]]:
        """A few sentences."""
        texts = [f"the model reads a file of {i} words" for i in range(32)]
        rows = [
            self.tokenizer(text, padding="max_length", max_length=32, truncation=True)
            for text in texts
        ]
        batches = [
            {name: torch.tensor(row[name]) for name in ("input_ids", "attention_mask")}
            for row in rows
        ]
        for row in batches:
            row["labels"] = row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)
        return torch.utils.data.DataLoader(batches, batch_size=4)  # type: ignore[arg-type]


def main(folder: str, plan: str, out: str) -> None:
    """The lines that pruning and distillation add are the model's transform and the two callbacks."""
    module = Tuning(folder)
    module.model_transform = Pruning(plan)  # type: ignore[assignment]
    callbacks = [ModelTransform(), KnowledgeDistillation(folder)]
    trainer = Trainer(max_epochs=1, callbacks=callbacks, logger=False, enable_checkpointing=False)
    trainer.fit(module)
    module.llm.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
