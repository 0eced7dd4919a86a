"""Both types, and their corner cases, through the shared suite."""

import torch

from tensortrain.tensor import randn, randn_matrix
from tensortrain.testing import ChainSuite

BOTH_DEFAULTS = True


class TestTrain(ChainSuite):
    def make(self, seed, dtype):
        return randn((3, 4, 2, 3), (2, 3, 2), generator=torch.Generator().manual_seed(seed), dtype=dtype)


class TestTrainWithModesOfOne(ChainSuite):
    def make(self, seed, dtype):
        return randn((1, 3, 1, 4), 2, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class TestTrainOfOrderOne(ChainSuite):
    def make(self, seed, dtype):
        return randn((6,), 1, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class TestMatrix(ChainSuite):
    def make(self, seed, dtype):
        generator = torch.Generator().manual_seed(seed)
        return randn_matrix((3, 1, 2), (2, 4, 2), 2, generator=generator, dtype=dtype)


class TestMatrixOfOrderOne(ChainSuite):
    def make(self, seed, dtype):
        return randn_matrix((3,), (4,), 1, generator=torch.Generator().manual_seed(seed), dtype=dtype)
