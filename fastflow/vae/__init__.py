"""Variational autoencoders with Gaussian and flow posteriors, and their training.

The parts (objectives, posteriors, models, evaluation) need PyTorch alone. Training, checkpoints and
pictures (`fastflow.vae.training`, `.checkpoint`, `.plots`, and `python -m fastflow.vae`) need the
extra packages of `pip install 'fastflow[vae]'`.
"""

from fastflow.vae.config import Config
from fastflow.vae.data import ImageData, load
from fastflow.vae.errors import VaeError
from fastflow.vae.evaluation import evaluate, mean_negative_elbo
from fastflow.vae.models import VAE, build
from fastflow.vae.objectives import (
    BernoulliLikelihood,
    ElboTerms,
    GaussianLikelihood,
    diagonal_normal_log_prob,
    gaussian_kl,
    importance_weighted_bound,
    negative_elbo,
    standard_normal_log_prob,
    training_loss,
)
from fastflow.vae.posteriors import Draw, FlowPosterior, GaussianPosterior, Posterior
from fastflow.vae.registry import register

__all__ = [
    "VAE",
    "BernoulliLikelihood",
    "Config",
    "Draw",
    "ElboTerms",
    "FlowPosterior",
    "GaussianLikelihood",
    "GaussianPosterior",
    "ImageData",
    "Posterior",
    "VaeError",
    "build",
    "diagonal_normal_log_prob",
    "evaluate",
    "gaussian_kl",
    "importance_weighted_bound",
    "load",
    "mean_negative_elbo",
    "negative_elbo",
    "register",
    "standard_normal_log_prob",
    "training_loss",
]
