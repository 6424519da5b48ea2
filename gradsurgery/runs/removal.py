"""Removing a capability: the configuration that the SGTM recipes share (Shilov et al. 2025, arXiv 2512.05648)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gradsurgery.data import Noise
from gradsurgery.runs.config import TrainConfig
from gradsurgery.runs.setup import ModelConfig


@dataclass
class TextConfig:
    """How the text is read.

    Args:
        tokenizer: "embedded", "train:SIZE" (on the training part), or a name or folder for AutoTokenizer.
        forget: Category or categories to be removed.
        adjacent: Categories close to it, if any.
        validation: Share of the documents held back.
        limit: Documents a category, for a quick look.
        test_rows: Sequences a category in the final evaluation.
    """

    tokenizer: str = "embedded"
    forget: str | list[str] = "es"
    adjacent: list[str] = field(default_factory=list)
    validation: float = 0.05
    limit: int | None = None
    test_rows: int = 400


@dataclass
class LabelConfig:
    """Which documents carry a label: undiscovered forget documents carry none and train everything.

    Args:
        undiscovered: Share of the forget documents without their label.
        retain: Share of the retain documents that are labelled retain.
        adjacent: Share of the adjacent documents that are labelled retain.
        precision: Precision of the forget label.
        tpr: True positive rate of the forget label, instead of ``undiscovered`` and ``precision``.
        fpr: False positive rate, over all documents that are not forget.
    """

    undiscovered: float = 0.0
    retain: float = 1.0
    adjacent: float = 0.0
    precision: float = 1.0
    tpr: float | None = None
    fpr: float | None = None

    def noise(self) -> Noise:
        """The mistakes of the forget label."""
        if self.tpr is None and self.fpr is None:
            return Noise(recall=1 - self.undiscovered, precision=self.precision)
        return Noise(tpr=self.tpr, fpr=self.fpr)


@dataclass
class SgtmConfig:
    """Options of ``gs.methods.sgtm`` and ``gs.methods.forget_units``."""

    heads: int = 1
    neurons: int = 128
    percent: float | None = None
    layers: list[int] | None = None
    strategy: Literal["mask", "detach", "zero"] = "mask"
    embeddings: Literal["joint", "retain"] = "joint"
    norms: Literal["joint", "retain"] = "joint"
    joint: list[str] = field(default_factory=list)


@dataclass
class UnlearnConfig:
    """Unlearning after plain training: ``rmu``, ``gradient_ascent`` and ``npo``.

    Args:
        steps: Optimizer steps.
        learning_rate: Constant learning rate.
        retain_weight: Weight of the retain loss; by default the method's own.
        layer: Module whose activations RMU steers; by default the block in the middle of the model.
        modules: Names of the parameters that RMU trains; by default the MLP output projections of that block and the
            two before it.
        steering: Length of RMU's target.
        beta: NPO's.
    """

    steps: int = 100
    learning_rate: float = 5e-4
    retain_weight: float | None = None
    layer: str | None = None
    modules: list[str] = field(default_factory=list)
    steering: float = 20.0
    beta: float = 0.1


@dataclass
class ProtocolConfig:
    """What is measured besides losses.

    Args:
        calibration: Steps of fitting the output bias after removal; 0 for none.
        calibration_retain: Weight of the retain loss in it (alpha). Forget and adjacent weigh 1.
        calibration_rate: Its learning rate, which falls linearly to a tenth.
        calibration_rows: Sequences of each category in a step of it.
        calibrate_checkpoints: Calibrate at every checkpoint of the trade-off, not only in the end.
        relearn: Steps of relearning at most, after removal, until the forget loss is that of ``plain``; 0 for none.
        relearn_every: Steps between its measurements.
        relearn_rows: Held-back sequences of each kind in a measurement; the level is that of ``plain`` on the same.
        relearn_rate: Its learning rate.
        token_losses: Distribution of the losses of single tokens.
        trade_off: Draw forget against retain loss along the checkpoints.
    """

    calibration: int = 0
    calibration_retain: float = 100.0
    calibration_rate: float = 1e-2
    calibration_rows: int = 16
    calibrate_checkpoints: bool = True
    relearn: int = 0
    relearn_every: int = 5
    relearn_rows: int = 128
    relearn_rate: float = 5e-4
    token_losses: bool = False
    trade_off: bool = False


@dataclass
class RemovalConfig:
    """The whole run.

    Args:
        data: "embedded", "hub:owner/name" (such as hub:ffuuugor/tinystories-spanish), or a local file or folder.
        rows: Sequences of each category in a batch, or the size of a batch whose mix follows the data.
        upsample: Category -> factor of its share, where ``rows`` is a size.
        models: Which models to train, of ``gradsurgery.runs.removal_models.VARIANTS``.
        start_from: Stock checkpoint (folder or hub name) to finetune instead of fresh weights; with
            ``train.min_learning_rate`` at ``train.learning_rate`` and no warmup at a constant learning rate.
        out: Folder of all runs.
        name: Name of this run; by default made from its configuration, so that the same command resumes.
        overwrite: Delete a run of this name first.
    """

    data: str = "embedded"
    text: TextConfig = field(default_factory=TextConfig)
    labels: LabelConfig = field(default_factory=LabelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sgtm: SgtmConfig = field(default_factory=SgtmConfig)
    unlearn: UnlearnConfig = field(default_factory=UnlearnConfig)
    protocols: ProtocolConfig = field(default_factory=ProtocolConfig)
    rows: dict[str, int] | int = field(default_factory=lambda: {"en": 4, "es": 4})
    upsample: dict[str, float] = field(default_factory=dict)
    models: list[str] = field(default_factory=lambda: ["plain", "sgtm", "data_filter"])
    start_from: str | None = None
    seed: int = 0
    out: str = "runs/sgtm_bilingual"
    name: str | None = None
    overwrite: bool = False
