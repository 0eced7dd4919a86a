"""Spoken telephone prompts in three languages: sequences with a wide input per step, as Debian packages."""

from __future__ import annotations

import shutil
import tempfile
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tensortrain.data.fetch import Messages, cache_folder, check_sha256, fill_folder, say, unpack_debian
from tensortrain.errors import DataError

_DEBIAN_FOLDER = Path("/usr/share/asterisk/sounds")
_FOLDERS = {"en": "en_US_f_Allison", "fr": "fr_CA_f_June", "ru": "ru_RU_f_IvrvoiceRU"}
# Of names and samples of a folder in order of the names: the header of a WAV file is free to differ.
_SHA256 = {
    "en": "8102b1b47510451ff948c04412a8fe5faa81f8c451b5f4841621bc453f58eb3f",
    "fr": "959121955b15d8984894797755db01d13660338d74c061fab10c975ce31fd9b4",
    "ru": "b6e9a8eb826ee65d4d266dba7a16567d9338875525449c7ecf96f9278f81536e",
}
_NOT_SPOKEN = ("silence/", "beep", "ascending-2tone", "descending-2tone")
_TRAIN_SHARE = 0.7

_RATE_HZ = 8000
_N_SAMPLES = 3 * _RATE_HZ
_WINDOW, _HOP = 256, 128
_FRAMES_PER_STEP = 8
_FLOOR = 1e-6  # of the power: 20 dB above the rounding to 16 bits, so that digital silence is not a mark of its own


@dataclass(frozen=True)
class SpeechData:
    """Spectrograms of spoken prompts with a fixed split; the three recordings of a prompt lie on one side of it.

    Attributes:
        features: float32 ``(n, 23, 1032)``: natural logarithms of powers. A step is 8 frames of 129 frequencies,
            the frequency running fastest: ``features.unflatten(2, (8, 129))``.
        labels: int64 ``(n,)`` into ``languages``.
        languages: Their codes.
        prompts: n names, such as ``"digits/7"``.
        train_index: int64 ``(n_train,)`` into all of these.
        test_index: int64 ``(n - n_train,)`` likewise.
        source: Where it came from.
    """

    features: Tensor
    labels: Tensor
    languages: tuple[str, ...]
    prompts: tuple[str, ...]
    train_index: Tensor
    test_index: Tensor
    source: str


def spoken_prompts(
    root: str | Path | None = None, *, download: bool = True, observer: Messages | None = None
) -> SpeechData:
    """Load about 1,660 prompts of the Asterisk telephone exchange, spoken in English, French and Russian.

    The first 3 s of each, filled up with silence, as a logarithmic spectrogram (Hann window of 256 samples, hop
    128), 8 frames to a step. The label is the language. Each language has one speaker, so a network may tell
    voices apart rather than languages: good for comparing networks, not for building a language detector.

    Looks in ``root`` alone when it is given. Otherwise in the Debian packages' folder, in the user's cache, then
    fetches the packages (no root rights needed). What these give is checked against known checksums.

    Args:
        root: Folder with one folder of WAV files (8 kHz, mono, 16 bits) per language, named as in the packages.
        download: Allow fetching into the cache.
        observer: Gets a message before the fetch.

    Raises:
        DataError: A recording is missing or damaged; or no source works, and then it says what to do.

    Source: Allison Smith, June Wallack (CC-BY-SA 3.0), Maxim Topal (CC-BY 3.0): Asterisk core sounds 1.6.1.
    """
    if root is not None:
        return _assemble(_read_folders(Path(root)), str(root))
    cache = cache_folder("spoken-prompts")
    failures = []
    for folder in (_DEBIAN_FOLDER, cache):
        try:
            return _read_published(folder)
        except DataError as error:
            failures.append(f"{folder}: {error}" if folder.exists() else f"{folder}: not there")
    if download:
        say(observer, "Fetching the spoken prompts (54 MB) from the Debian packages.")
        try:
            fill_folder(cache, _fetch)
            return _read_published(cache)
        except (DataError, OSError) as error:
            failures.append(f"the Debian packages: {error}")
    raise DataError(
        f"the spoken prompts must be found: spoken_prompts has tried {'; '.join(failures)}, expected one to work. "
        f"Install the Debian packages {', '.join(_package(language) for language in _FOLDERS)}, or unpack them with "
        "dpkg -x and pass their usr/share/asterisk/sounds as root."
    )


def _package(language: str) -> str:
    return f"asterisk-core-sounds-{language}-wav"


def _fetch(folder: Path) -> None:
    for language, name in _FOLDERS.items():
        with tempfile.TemporaryDirectory() as scratch:
            unpacked = unpack_debian(_package(language), Path(scratch))
            shutil.copytree(unpacked.joinpath(*_DEBIAN_FOLDER.parts[1:], name), folder / name)
    _check_published(_read_folders(folder), folder)


Recordings = dict[str, bytes]  # by the prompt's name: 16-bit samples, least byte first


def _read_published(folder: Path) -> SpeechData:
    found = _read_folders(folder)
    _check_published(found, folder)
    return _assemble(found, str(folder))


def _check_published(found: dict[str, Recordings], folder: Path) -> None:
    for language, recordings in found.items():
        content = b"".join(name.encode() + samples for name, samples in recordings.items())
        check_sha256(content, _SHA256[language], where=str(folder / _FOLDERS[language]))


def _read_folders(root: Path) -> dict[str, Recordings]:
    """All recordings, by language and in order of the prompts' names."""
    found = {}
    for language, folder in _FOLDERS.items():
        here = root / folder
        paths = {path.relative_to(here).with_suffix("").as_posix(): path for path in here.rglob("*.wav")}
        if not paths:
            raise DataError(
                f"the folder must hold all languages: {root} has no {folder} with WAV files, expected it there. "
                f"Add those of the Debian package {_package(language)}."
            )
        found[language] = {name: _read_wav(paths[name]) for name in sorted(paths)}
    return found


def _read_wav(path: Path) -> bytes:
    try:
        with wave.open(str(path), "rb") as file:
            kind = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            samples = file.readframes(file.getnframes())
            whole = len(samples) == file.getnframes() * file.getnchannels() * file.getsampwidth()
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(
            f"a recording must be a WAV file: {path} has {error or type(error).__name__}, expected a readable one. "
            "Fetch it again."
        ) from error
    if kind != (1, 2, _RATE_HZ):
        raise DataError(
            f"a recording must be mono, 16 bits, {_RATE_HZ} Hz: {path} has {kind[0]} channels, {8 * kind[1]} bits, "
            f"{kind[2]} Hz. Convert it."
        )
    if not whole:
        raise DataError(
            f"a recording must hold what its header states: {path} has {len(samples)} bytes of samples, expected "
            "more. Fetch it again."
        )
    return samples


def _assemble(found: dict[str, Recordings], source: str) -> SpeechData:
    features, labels, prompts = [], [], []
    for label, recordings in enumerate(found.values()):
        spoken = {k: v for k, v in recordings.items() if v and not k.startswith(_NOT_SPOKEN)}
        if not spoken:
            raise DataError(
                f"every language must have a prompt: {source} has none under {list(_FOLDERS.values())[label]}, "
                "expected one that is spoken and not empty. Complete the folder."
            )
        features.append(_spectrogram(torch.stack([_first_seconds(samples) for samples in spoken.values()])))
        labels += [label] * len(spoken)
        prompts += list(spoken)
    train, test = _split(prompts)
    return SpeechData(torch.cat(features), torch.tensor(labels), tuple(_FOLDERS), tuple(prompts), train, test, source)


def _first_seconds(samples: bytes) -> Tensor:
    """Three seconds on a scale of -1 to 1, zeros after the end of the recording."""
    values = np.frombuffer(samples[: 2 * _N_SAMPLES], dtype="<i2").astype(np.float32) / 2**15
    return torch.from_numpy(np.pad(values, (0, _N_SAMPLES - len(values))))


def _spectrogram(waves: Tensor) -> Tensor:
    """Logarithms of powers, whole steps of 8 frames: (n, samples) to (n, 23, 8 * 129)."""
    window = torch.hann_window(_WINDOW, dtype=waves.dtype)
    spectra = torch.stft(waves, _WINDOW, _HOP, window=window, center=False, return_complex=True)  # n f t
    powers = spectra.real.square() + spectra.imag.square()
    frames = (powers + _FLOOR).log().transpose(1, 2)
    n_steps = frames.shape[1] // _FRAMES_PER_STEP
    return frames[:, : n_steps * _FRAMES_PER_STEP].reshape(len(waves), n_steps, -1)


def _split(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Draw the names for training, so that what is said in one language is not held out in another."""
    names = sorted(set(prompts))
    order = np.random.RandomState(0).permutation(len(names))
    chosen = {names[k] for k in order[: round(len(names) * _TRAIN_SHARE)]}
    is_train = torch.tensor([name in chosen for name in prompts])
    return is_train.nonzero().flatten(), (~is_train).nonzero().flatten()
