"""One step of training: loss, gradients, Adam."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastflow.vae.distributed import Team
from fastflow.vae.graphs import CudaRecorder, GraphedStep
from fastflow.vae.models import VAE
from fastflow.vae.objectives import ElboTerms, negative_elbo, training_loss


class ElboSums(nn.Module):
    """The two terms of -ELBO summed over a batch: what gradients are taken of, as one module.

    Arguments:
        model: the autoencoder.
    """

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Reconstruction and KL, shape (2,), of images x (B, pixels) and noise (B, D)."""
        terms = negative_elbo(self.model, x, noise)
        return torch.stack([terms.reconstruction.sum(), terms.kl.sum()])


class TrainingStep:
    """A step of an optimizer on the training loss of a joint batch.

    Everything that changes between steps is a tensor on the device, so that a CUDA graph can hold
    the whole step: images, noise, the weight of the KL term and, if `make_optimizer` made the
    optimizer, the learning rate. Nothing is read back.

    Arguments:
        model: the autoencoder.
        optimizer: of its parameters.
        free_bits: see `fastflow.vae.objectives.training_loss`.
        team: the processes that share the batch.
    """

    def __init__(
        self, model: VAE, optimizer: torch.optim.Optimizer, free_bits: float, team: Team
    ) -> None:
        device = next(model.parameters()).device
        self.sums = team.parallel(ElboSums(model))
        self.optimizer = optimizer
        self.free_bits = free_bits
        self.team = team
        self.kl_weight = torch.ones((), device=device)
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)
        """Reconstruction and KL, summed over the images since `begin`."""

    def begin(self, learning_rate: float, kl_weight: float) -> None:
        """Begins an epoch: sets what stays the same in it, and the totals to zero."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        self.kl_weight.fill_(kl_weight)
        self.totals.zero_()

    def __call__(self, x: Tensor, noise: Tensor) -> None:
        """Makes a step on images x (B, pixels) and noise (B, D) of the joint batch."""
        joint = self.team.joint(self.sums(self.team.share(x), self.team.share(noise)))
        reconstruction, kl = (joint / len(x)).unbind()
        terms = ElboTerms(reconstruction + kl, reconstruction, kl)
        loss = training_loss(terms, self.kl_weight, self.free_bits)
        self.optimizer.zero_grad(set_to_none=True)
        (loss * self.team.size).backward()  # gradients are averaged over the team, not summed
        self.optimizer.step()
        self.totals += joint.detach()


def make_optimizer(model: VAE, learning_rate: float) -> torch.optim.Adam:
    """Makes Adam for a model; on a GPU one that a CUDA graph can hold."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return torch.optim.Adam(model.parameters(), lr=learning_rate)
    rate = torch.tensor(learning_rate, device=device)
    return torch.optim.Adam(model.parameters(), lr=rate, capturable=True)


def fastest(step: TrainingStep, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    """The step as a CUDA graph where there is a GPU to itself; else the step itself.

    A step of a team stays as it is: its processes wait for each other in the middle of it.
    """
    if device.type == "cuda" and step.team.size == 1:
        return GraphedStep(step, CudaRecorder())
    return step
