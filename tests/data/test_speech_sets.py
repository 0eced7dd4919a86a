"""The spoken prompts: WAV files, the spectrogram, the split by prompt, and the order of the sources."""

from __future__ import annotations

import hashlib
import math
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from tensortrain.data import fetch, speech_sets, spoken_prompts
from tensortrain.errors import DataError

RATE = 8000
PROMPTS = ("hello", "digits/1", "digits/2", "bye")


def tone(hertz: float, seconds: float) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    return (12_000 * np.sin(2 * math.pi * hertz * time)).astype("<i2")


def write_wav(path: Path, samples: np.ndarray, *, rate: int = RATE, channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())


def write_small(root: Path) -> None:
    for number, folder in enumerate(speech_sets._FOLDERS.values(), start=1):
        for k, name in enumerate(PROMPTS):
            write_wav(root / folder / f"{name}.wav", tone(500 * number, 0.5 + k))
        write_wav(root / folder / "silence" / "1.wav", np.zeros(RATE, dtype="<i2"))
        write_wav(root / folder / "beep.wav", tone(1000, 0.2))
    write_wav(root / speech_sets._FOLDERS["ru"] / "empty.wav", np.zeros(0, dtype="<i2"))


def digest(recordings: dict[str, bytes]) -> str:
    return hashlib.sha256(b"".join(name.encode() + samples for name, samples in recordings.items())).hexdigest()


@pytest.fixture
def small(tmp_path):
    root = tmp_path / "sounds"
    write_small(root)
    return root


@pytest.fixture
def offline(tmp_path, small, monkeypatch):
    """No installed packages, an empty cache, no apt-get, and the small recordings as the published ones."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(speech_sets, "_DEBIAN_FOLDER", tmp_path / "debian")
    sums = {language: digest(found) for language, found in speech_sets._read_folders(small).items()}
    monkeypatch.setattr(speech_sets, "_SHA256", sums)

    def unpack(package, scratch):
        raise DataError("no network")

    monkeypatch.setattr(speech_sets, "unpack_debian", unpack)
    return tmp_path


class Log:
    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


def packages_from(small: Path, calls: list[str]):
    """What unpacking a package gives, with the folders of the small recordings."""

    def unpack(package: str, scratch: Path) -> Path:
        calls.append(package)
        place = scratch.joinpath("unpacked", *speech_sets._DEBIAN_FOLDER.parts[1:])
        place.parent.mkdir(parents=True)
        place.symlink_to(small)
        return scratch / "unpacked"

    return unpack


def test_shapes_labels_and_names(small):
    data = spoken_prompts(small)
    assert data.features.shape == (12, 23, 1032)
    assert data.features.dtype == torch.float32
    assert data.languages == ("en", "fr", "ru")
    assert data.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.prompts[:4] == ("bye", "digits/1", "digits/2", "hello")  # no silence, no beep, nothing empty
    assert data.source == str(small)


def test_the_spectrogram_has_its_peak_at_the_tone(small):
    data = spoken_prompts(small)
    frames = data.features.unflatten(2, (8, 129))
    for label, hertz in enumerate((500, 1000, 1500)):
        heard = frames[data.labels == label][:, 0]  # the first step of every prompt
        assert (heard.argmax(-1) == hertz * 256 // RATE).all()


def test_short_prompts_end_in_silence_and_long_ones_are_cut(small):
    data = spoken_prompts(small)
    hello, bye = data.features[3], data.features[0]  # half a second, and 3.5 s
    assert torch.equal(hello[4:], torch.full((19, 1032), math.log(1e-6)))
    assert (bye[-1].unflatten(0, (8, 129)).amax(-1) > 0).all()


def test_the_spectrogram_is_that_of_a_plain_sum(small):
    data = spoken_prompts(small)
    samples = tone(500, 3.5)[128:384] / 2**15  # the second frame of "bye"
    window = 0.5 - 0.5 * np.cos(2 * math.pi * np.arange(256) / 256)
    power = np.abs(np.fft.rfft(samples * window)) ** 2
    # float32 in the transform, log(1e-6 + 1e-9) at worst: 2e-3 measured
    assert np.allclose(data.features[0, 0, 129:258].numpy(), np.log(power + 1e-6), atol=1e-2)


def test_split_is_a_fixed_partition_by_prompt(small):
    data, again = spoken_prompts(small), spoken_prompts(small)
    both = torch.cat((data.train_index, data.test_index))
    assert torch.equal(both.sort().values, torch.arange(12))
    sides = [{data.prompts[k] for k in index} for index in (data.train_index, data.test_index)]
    assert not sides[0] & sides[1]
    assert torch.equal(data.train_index, again.train_index)


def test_own_root_must_have_all_languages(small):
    for path in (small / speech_sets._FOLDERS["fr"]).rglob("*.wav"):
        path.unlink()
    with pytest.raises(DataError, match=r"no fr_CA_f_June.*asterisk-core-sounds-fr-wav"):
        spoken_prompts(small)


def test_a_language_with_nothing_spoken_is_a_data_error(small):
    for name in PROMPTS:
        (small / speech_sets._FOLDERS["fr"] / f"{name}.wav").unlink()
    with pytest.raises(DataError, match="none under fr_CA_f_June"):
        spoken_prompts(small)


def test_damaged_recordings_are_data_errors(small):
    path = small / speech_sets._FOLDERS["en"] / "hello.wav"
    whole = path.read_bytes()
    for content, says in ((b"", "must be a WAV"), (b"RIFFnonsense", "must be a WAV"), (whole[:1000], "must hold what")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=says):
            spoken_prompts(small)


@pytest.mark.parametrize("options", [{"rate": 16_000}, {"channels": 2}])
def test_other_kinds_of_wav_are_refused(small, options):
    write_wav(small / speech_sets._FOLDERS["en"] / "hello.wav", tone(500, 1), **options)
    with pytest.raises(DataError, match="must be mono, 16 bits, 8000 Hz"):
        spoken_prompts(small)


def test_installed_packages_come_before_the_cache(offline):
    for folder in (offline / "debian", fetch.cache_folder("spoken-prompts")):
        write_small(folder)
    assert spoken_prompts().source == str(offline / "debian")
    write_wav(offline / "debian" / speech_sets._FOLDERS["en"] / "hello.wav", tone(1, 1))
    assert spoken_prompts().source == str(fetch.cache_folder("spoken-prompts"))


def test_fetch_fills_the_cache_once(offline, small, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(speech_sets, "unpack_debian", packages_from(small, calls))
    log = Log()
    first, second = spoken_prompts(observer=log), spoken_prompts(observer=log)
    assert calls == [f"asterisk-core-sounds-{language}-wav" for language in ("en", "fr", "ru")]
    assert log.said == ["Fetching the spoken prompts (54 MB) from the Debian packages."]
    assert torch.equal(first.features, second.features)
    assert second.source == str(fetch.cache_folder("spoken-prompts"))


def test_other_content_is_not_cached(offline, small, monkeypatch):
    write_wav(small / speech_sets._FOLDERS["ru"] / "hello.wav", tone(1, 1))
    monkeypatch.setattr(speech_sets, "unpack_debian", packages_from(small, []))
    with pytest.raises(DataError, match="published one"):
        spoken_prompts()
    assert not fetch.cache_folder("spoken-prompts").exists()


def test_nothing_found_says_what_to_do(offline):
    with pytest.raises(DataError, match=r"no network.*Install the Debian packages asterisk-core-sounds-en-wav"):
        spoken_prompts()
    with pytest.raises(DataError, match="not there"):
        spoken_prompts(download=False)


def test_debian_route_without_apt(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="apt-get is not installed"):
        fetch.unpack_debian("some-package", tmp_path)


def test_real_prompts_when_they_are_here():
    try:
        data = spoken_prompts(download=False)
    except DataError:
        pytest.skip("the spoken prompts are not installed")
    assert torch.bincount(data.labels).tolist() == [554, 547, 561]
    assert data.features.isfinite().all()
    assert (len(data.train_index), len(data.test_index)) == (1162, 500)
