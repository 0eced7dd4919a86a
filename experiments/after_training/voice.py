"""silero-vad: is somebody speaking? Convolutions over a spectrum, an LSTM cell over frames of 512 samples."""

from __future__ import annotations

import sys
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from subject import Subject, binary_divergence
from torch import Tensor, nn

from tensortrain.data import spoken_prompts

sys.path.insert(0, str(Path(__file__).parent.parent))

from installed import package_folder

__all__ = ["Voice", "voice"]

_FRAME, _BEFORE, _AFTER = 512, 64, 64  # samples at 16 kHz: new ones, known ones before them, mirrored ones after
_RATE_HZ = 8000  # of the recordings


class Voice(nn.Module):
    """Waves at 16 kHz to the probability of speech in every frame: b n to b n/512."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, 1, 1)
        self.conv2 = nn.Conv1d(128, 64, 3, 2, 1)
        self.conv3 = nn.Conv1d(64, 64, 3, 2, 1)
        self.conv4 = nn.Conv1d(64, 128, 3, 1, 1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, waves: Tensor) -> Tensor:
        frames = nn.functional.pad(waves, (_BEFORE, 0)).unfold(1, _FRAME + _BEFORE, _FRAME)  # b t 576
        b, t, _ = frames.shape
        x = self.stft_conv(nn.functional.pad(frames.flatten(0, 1).unsqueeze(1), (0, _AFTER), "reflect"))
        x = (x[:, :129].square() + x[:, 129:].square()).sqrt()
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = layer(x).relu()
        state, found = None, []
        for step in x.squeeze(-1).reshape(b, t, -1).unbind(1):
            state = self.lstm_cell(step, state)
            found.append(self.final_conv(state[0].unsqueeze(-1).relu()).sigmoid().flatten())
        return torch.stack(found, dim=1)


def voice(config: Mapping[str, Any]) -> Subject:
    """``agreement``: share of frames with the original's decision at 0.5, ``agreement_other``: under noise.

    ``kl`` and ``kl_other``: of the probabilities.
    """
    from safetensors.torch import load_file

    path = package_folder("silero_vad", "silero-vad==6.2.3") / "data" / "silero_vad_16k.safetensors"
    model = Voice()
    model.load_state_dict(load_file(path))
    model.eval()
    waves = _waves(config["calibration"] + config["judged"], config["seconds"])
    calibration, clean = waves[: config["calibration"]], waves[config["calibration"] :]
    heard = (clean, _with_noise(clean, config["noise_db"]))
    half = len(calibration) // 2
    mixed = torch.cat([calibration[:half], _with_noise(calibration[half:], config["noise_db"])])
    mixed = mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(0))]
    references = [_probabilities(model, x) for x in heard]

    def judge(changed: nn.Module) -> dict[str, float]:
        found = [_probabilities(changed, x) for x in heard]
        pairs = list(zip(references, found, strict=True))
        agree = [float(((p > 0.5) == (q > 0.5)).float().mean()) for p, q in pairs]
        kl = [binary_divergence(p, q) for p, q in pairs]
        return {"agreement": agree[0], "agreement_other": agree[1], "kl": kl[0], "kl_other": kl[1]}

    data = list(mixed.split(config["batch_size"]))
    return Subject(model, data, judge, options={"n_batches": len(data)}, whole=("stft_conv",))


@torch.no_grad()
def _probabilities(model: nn.Module, waves: Tensor) -> Tensor:
    model.eval()
    return model(waves)


def _waves(n: int, seconds: float) -> Tensor:
    """Recorded prompts at 16 kHz, cut or filled up with silence to one length; all three languages in turn."""
    top = Path(spoken_prompts().source)
    paths = [
        path for path in sorted(top.rglob("*.wav")) if "silence" not in path.parts and path.stat().st_size > 20_000
    ]
    chosen = [paths[k] for k in np.random.RandomState(0).permutation(len(paths))[:n]]
    length = int(seconds * _RATE_HZ)
    return torch.stack([_twice_as_fast(_read(path, length)) for path in chosen])


def _read(path: Path, length: int) -> Tensor:
    with wave.open(str(path), "rb") as file:
        values = np.frombuffer(file.readframes(length), dtype="<i2").astype(np.float32) / 2**15
    return torch.from_numpy(np.pad(values, (0, length - len(values))))


def _twice_as_fast(samples: Tensor) -> Tensor:
    """From 8 to 16 kHz, with nothing above the frequencies that were there."""
    return 2 * torch.fft.irfft(torch.fft.rfft(samples), n=2 * len(samples))


def _with_noise(waves: Tensor, db: float) -> Tensor:
    power = waves.square().mean(dim=1, keepdim=True) * 10 ** (-db / 10)
    return waves + power.sqrt() * torch.randn(waves.shape, generator=torch.Generator().manual_seed(1))
