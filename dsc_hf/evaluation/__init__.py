"""Measuring: detection quality of scores on the states that decoding visits, the diagnosis of a model, calibration,
and the comparison of systems by accuracy against passes. The lm-eval model, `lm_eval_model`, is not imported here."""

from .calibration import Calibration, calibrate
from .curves import aup, aup_by_method, comparison, plot_curves
from .detection import detection_quality, score_states
from .diagnosis import diagnose
from .states import collect_states
from .systems import SYSTEMS

__all__ = [
    "SYSTEMS",
    "Calibration",
    "aup",
    "aup_by_method",
    "calibrate",
    "collect_states",
    "comparison",
    "detection_quality",
    "diagnose",
    "plot_curves",
    "score_states",
]
