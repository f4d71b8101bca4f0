"""The uncertainty of a prediction: its entropy, and the part of it that is disagreement of its
members.

With the probabilities p_m of M members and their mean p, the entropy H(p) is the total uncertainty.
Its part H(p) - mean H(p_m) is the mutual information between the class and the member: it falls as
models are trained on more images. The rest is in the images and their labels (arXiv 1112.5745, eq.
2; arXiv 1703.04977).

All are shares of the largest entropy, log2 K bits of K classes: of two classes they are bits.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def entropy(probability: Tensor) -> Tensor:
    """Entropy (..., H, W), from 0 to 1, of probabilities (..., K, H, W).

    A single one is that of the second of two classes.
    """
    if probability.shape[-3] == 1:
        probability = torch.cat([1 - probability, probability], dim=-3)
    found: Tensor = torch.special.entr(probability.clamp(0, 1)).sum(dim=-3)
    return found / np.log(probability.shape[-3])


def entropy_map(probability: NDArray[np.float32]) -> NDArray[np.float32]:
    """`entropy` of an array (K, H, W)."""
    return entropy(torch.from_numpy(np.ascontiguousarray(probability))).numpy()


def disagreement_map(
    probability: NDArray[np.float32], entropies: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Mutual information (H, W), from 0 to 1, of the class and the members of a mean.

    Args:
        probability: (K, H, W), the mean of the members.
        entropies: (H, W), the mean of their entropies.
    """
    found: NDArray[np.float32] = np.maximum(entropy_map(probability) - entropies, 0)
    return found
