"""Floor 6: Prefect flows. The only code that imports prefect; it orchestrates, the artifacts carry the truth."""
