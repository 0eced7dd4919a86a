"""Weight formats: how a dense weight is written as a few small cores. One file each, one registry."""

from . import block_term, btt, cp, kronecker, low_rank, ring, tt, tt_naive, tt_separate, tucker, tucker2  # registered
from .base import Format
from .chain import ChainFormat, balance_chain
from .fit import Factorization, Fit
from .modes import ModeChoice, default_order, search_modes, suggest_modes, suggest_padded_modes
from .network import NetworkFormat
from .rank_path import RankPoint, even_path, rank_path
from .registry import format_names, get_format, register
from .spec import Bond, FactorSpec, Kind, Rank, WeightShape
from .weighting import PLAIN, Weighting, energy, output_error

__all__ = [
    "PLAIN",
    "Bond",
    "ChainFormat",
    "FactorSpec",
    "Factorization",
    "Fit",
    "Format",
    "Kind",
    "ModeChoice",
    "NetworkFormat",
    "Rank",
    "RankPoint",
    "WeightShape",
    "Weighting",
    "balance_chain",
    "block_term",
    "btt",
    "cp",
    "default_order",
    "energy",
    "even_path",
    "format_names",
    "get_format",
    "kronecker",
    "low_rank",
    "output_error",
    "rank_path",
    "register",
    "ring",
    "search_modes",
    "suggest_modes",
    "suggest_padded_modes",
    "tt",
    "tt_naive",
    "tt_separate",
    "tucker",
    "tucker2",
]
