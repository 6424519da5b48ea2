"""Figures of merit, and how to show them: losses, gradient norms, FLOPs, tables, plots, the report."""

from gradsurgery.evaluation.arithmetic import ExactMatch, exact_match, final_number, first_line
from gradsurgery.evaluation.by_kind import mean_by_kind, mean_log_probability, token_log_probabilities
from gradsurgery.evaluation.calibration import Calibration, calibrate
from gradsurgery.evaluation.detector import DetectorRates
from gradsurgery.evaluation.flops import Throughput, model_flops, training_flops
from gradsurgery.evaluation.generation import continuations
from gradsurgery.evaluation.grad_norms import relative_grad_norms
from gradsurgery.evaluation.leakage import Leakage, leakage
from gradsurgery.evaluation.losses import Score, evaluate
from gradsurgery.evaluation.penalty import Penalty, ScalingCurve, compute_penalty, fit_scaling_curve
from gradsurgery.evaluation.plots import grad_norm_plot, loss_bars, training_curves
from gradsurgery.evaluation.protocol_plots import (
    density_plot,
    heat_map,
    penalty_bars,
    relearning_plot,
    sweep_plot,
    trade_off_plot,
)
from gradsurgery.evaluation.refusal import DetectorScore, RefusalDetector, RefusalRate, refusal_rate
from gradsurgery.evaluation.relearn import Relearned, RelearnPoint, relearn
from gradsurgery.evaluation.report import write_report
from gradsurgery.evaluation.responses import ResponseScore, score_responses
from gradsurgery.evaluation.tables import table
from gradsurgery.evaluation.token_losses import density, token_losses
from gradsurgery.evaluation.trade_off import TradeOff, forget_gap, retain_at, retain_gap, trade_off

__all__ = [
    "Calibration",
    "DetectorRates",
    "DetectorScore",
    "ExactMatch",
    "Leakage",
    "Penalty",
    "RefusalDetector",
    "RefusalRate",
    "RelearnPoint",
    "Relearned",
    "ResponseScore",
    "ScalingCurve",
    "Score",
    "Throughput",
    "TradeOff",
    "calibrate",
    "compute_penalty",
    "continuations",
    "density",
    "density_plot",
    "evaluate",
    "exact_match",
    "final_number",
    "first_line",
    "fit_scaling_curve",
    "forget_gap",
    "grad_norm_plot",
    "heat_map",
    "leakage",
    "loss_bars",
    "mean_by_kind",
    "mean_log_probability",
    "model_flops",
    "penalty_bars",
    "refusal_rate",
    "relative_grad_norms",
    "relearn",
    "relearning_plot",
    "retain_at",
    "retain_gap",
    "score_responses",
    "sweep_plot",
    "table",
    "token_log_probabilities",
    "token_losses",
    "trade_off",
    "trade_off_plot",
    "training_curves",
    "training_flops",
    "write_report",
]
