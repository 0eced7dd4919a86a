"""Recurrent layers, their cells, and the maps that both multiply by."""

from tensortrain.nn.recurrent.layers import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN"]
