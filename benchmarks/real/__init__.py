"""Real models through the whole recipe; ``python -m benchmarks.real --help``."""

import os

# threads that wait for each other in a loop take half of a machine that others use, too; read when torch is loaded
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
