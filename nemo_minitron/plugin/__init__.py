"""Floor 4: the NeMo plugin. The only place that imports nemo and lightning; importing it costs 10 to 20 seconds."""
