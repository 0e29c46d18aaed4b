"""Update rules: (parameters, gradients, curvature) -> parameters. One file a rule; see :mod:`soul.optim.base`."""

from soul.optim.adamw import AdamW
from soul.optim.adamw_retain import AdamWRetain
from soul.optim.lion import Lion
from soul.optim.muon import Muon
from soul.optim.sgd import SGD
from soul.optim.signum import Signum
from soul.optim.sophia import Sophia
from soul.optim.soul_release import SoulRelease

__all__ = ["SGD", "AdamW", "AdamWRetain", "Lion", "Muon", "Signum", "Sophia", "SoulRelease"]
