"""Small classification losses that the tests of trust-region methods share."""

import numpy as np
import torch
from torch import nn

from ddml.data.sample_sets import TensorSamples
from ddml.losses.module import ModuleLoss
from ddml.problems.classification import ClassificationLoss


def classifier(samples: int = 60, seed: int = 0, dtype: torch.dtype = torch.float64) -> ClassificationLoss:
    """Cross-entropy of a chain 6-5-4-3 on Gaussian clouds, 77 parameters."""
    rng = np.random.default_rng(seed)
    targets = torch.arange(samples) % 3
    centres = rng.standard_normal((3, 6))
    inputs = torch.as_tensor(centres[targets.numpy()] + 0.7 * rng.standard_normal((samples, 6))).to(dtype)
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    return ClassificationLoss(network, TensorSamples(inputs, targets), 3)


def value_gradient(loss: ModuleLoss, theta: np.ndarray) -> tuple[float, np.ndarray]:
    """By plain calls of the network."""
    views, end = {}, 0
    leaf = torch.as_tensor(theta).requires_grad_()
    for name, p in loss.module.named_parameters():
        views[name] = leaf[end : end + p.numel()].view(p.shape)
        end += p.numel()
    outputs = torch.func.functional_call(loss.module, views, (loss.inputs,))
    value = nn.functional.cross_entropy(outputs, loss.targets)
    return float(value.detach()), torch.autograd.grad(value, leaf)[0].numpy()


def batches(loss: ModuleLoss, size: int, count: int, seed: int = 1) -> list[ModuleLoss]:
    """Losses on random samples."""
    rng = np.random.default_rng(seed)
    return [loss.sampled(torch.as_tensor(rng.permutation(loss.count)[:size])) for _ in range(count)]
