"""What goes in and out: the hub, the model card, MLflow."""
