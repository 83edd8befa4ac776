"""All weights of a model in a call or two, by kernels written in C, on the cores of a CPU.

They are compiled on the user's machine, for its processor, by the C compiler that is found there, once: a second or two
at the first use, then they lie in the user's cache. Whether they are to be used is `is_trusted`; without a compiler
torch's own operations do the work, with the same numbers but for rounding. The tables of
`spectralnorm.linalg.cuda` have these names as well, and are used alike:

- `spectralnorm.linalg.cpu.tracking`: `TrackingPlan`, the largest singular values of all weights, as
  `spectralnorm.linalg.track_together`;
- `spectralnorm.linalg.cpu.quotients`: `QuotientPlan`, the division by them and its gradient;
- `spectralnorm.linalg.cpu.storing`: `VectorStore`, what was found copied into the buffers.

What they call is in the C file of the same name beside each. Bounds of convolutions are not among them:
`spectralnorm.linalg.cpu.panels` calls panels.c, symbol_grams.c, power_iteration.c and factorization.c.
"""

from spectralnorm.linalg.cpu.compiled import is_trusted
from spectralnorm.linalg.cpu.quotients import QuotientPlan, is_quotient
from spectralnorm.linalg.cpu.storing import VectorStore
from spectralnorm.linalg.cpu.tables import form_of
from spectralnorm.linalg.cpu.tracking import Tracked, TrackingPlan

__all__ = ["QuotientPlan", "Tracked", "TrackingPlan", "VectorStore", "form_of", "is_quotient", "is_trusted"]
