"""Quantum circuits: trains as states that gates prepare, as OpenQASM, and classifiers made of unitaries."""

from tensortrain.models.quantum.build import circuit
from tensortrain.models.quantum.channels import Noise
from tensortrain.models.quantum.circuit import Circuit
from tensortrain.models.quantum.classifier import UnitaryClassifier
from tensortrain.models.quantum.reader import from_qasm

__all__ = ["Circuit", "Noise", "UnitaryClassifier", "circuit", "from_qasm"]
