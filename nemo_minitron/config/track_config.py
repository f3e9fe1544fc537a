"""Keys of ``track``: experiment tracking outside the workspace."""

from dataclasses import dataclass

from nemo_minitron.config.option import option


@dataclass
class TrackConfig:
    """Experiment tracking outside the workspace."""

    mlflow: str | None = option(
        None, "MLflow tracking URI, as in http://mlflow:5000 (pip install nemo-minitron[mlflow])"
    )
    experiment: str = option("nemo_minitron", "MLflow experiment")
