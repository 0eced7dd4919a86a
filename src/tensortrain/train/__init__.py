"""One training loop for all: dense networks, healing, models; its batches, losses, tasks and guards."""

from tensortrain.train.batchnorm import reestimate_batchnorm_
from tensortrain.train.evaluation import evaluate_accuracy
from tensortrain.train.loop import FitResult, fit
from tensortrain.train.losses import cross_entropy_loss, distillation_loss, feature_loss

__all__ = [
    "FitResult",
    "cross_entropy_loss",
    "distillation_loss",
    "evaluate_accuracy",
    "feature_loss",
    "fit",
    "reestimate_batchnorm_",
]
