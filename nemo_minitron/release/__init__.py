"""Downloads and uploads of the hub, the model card, MLflow."""
