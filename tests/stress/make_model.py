"""Write the model of disk_stress: small, with experts that are large beside the blocks of a drive.

python make_model.py OUT.gguf [float32|float16 [PARTS]]
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.tiny import Spec, write_gguf

SPEC = Spec("disk", seed=11, n_layer=4, n_ff_expert=160, n_expert=16, n_used=4)

if __name__ == "__main__":
    out, dtype, parts = [*sys.argv[1:], *["float32", "1"][len(sys.argv) - 2 :]]
    print(write_gguf(Path(out), SPEC, dtype=np.dtype(dtype).type, parts=int(parts)))
