"""Keys of ``track``: where else the facts of a run go."""

from dataclasses import dataclass

from nemo_minitron.config.option import option


@dataclass
class TrackConfig:
    """Where else the facts of a run go."""

    mlflow: str | None = option(
        None, "MLflow tracking URI, as in http://mlflow:5000 (pip install nemo-minitron[mlflow])"
    )
    experiment: str = option("nemo_minitron", "MLflow experiment")
