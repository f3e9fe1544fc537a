"""What a command leaves out of its start is there for whoever uses it."""

import subprocess
import sys

ASKS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from nemo_minitron.launch.start_up import start_fast

start_fast()
import lightning.pytorch  # of which torchmetrics asks for scipy.signal.hamming
assert "torchmetrics" in sys.modules and "scipy.signal" in sys.modules
assert not {"scipy.stats", "scipy.signal._signal_api"} & {*sys.modules}, "loaded before it was used"

def peaks(_):
    import scipy
    return scipy.signal.find_peaks([0, 1, 0])[0].tolist()

assert list(ThreadPoolExecutor(8).map(peaks, range(8))) == [[1]] * 8
import scipy.signal
from scipy.signal import windows
assert scipy.signal.hamming(8).tolist() == windows.hamming(8).tolist()
assert scipy.signal.windows is windows is sys.modules["scipy.signal.windows"]
assert not hasattr(scipy.signal, "nothing") and {"convolve", "hamming"} <= {*dir(scipy.signal)}
"""


def test_scipys_signal_processing_is_loaded_when_it_is_used():
    done = subprocess.run(
        [sys.executable, "-c", ASKS], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
