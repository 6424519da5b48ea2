"""Figures of merit, and how to show them: losses, gradient norms, FLOPs, tables, plots, the report."""

from gradsurgery.evaluation.flops import Throughput, model_flops, training_flops
from gradsurgery.evaluation.grad_norms import relative_grad_norms
from gradsurgery.evaluation.losses import Score, evaluate
from gradsurgery.evaluation.plots import grad_norm_plot, loss_bars, training_curves
from gradsurgery.evaluation.report import write_report
from gradsurgery.evaluation.tables import table

__all__ = [
    "Score",
    "Throughput",
    "evaluate",
    "grad_norm_plot",
    "loss_bars",
    "model_flops",
    "relative_grad_norms",
    "table",
    "training_curves",
    "training_flops",
    "write_report",
]
