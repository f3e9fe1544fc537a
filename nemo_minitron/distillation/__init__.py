"""What the student learns from: cached logits, intermediate states, the loss on a rank. No NeMo."""
