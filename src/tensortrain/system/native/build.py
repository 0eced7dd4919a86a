"""Compile the kernels with the machine's own C++ compiler."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tensortrain.errors import KernelBuildError
from tensortrain.system.files import put_in_place
from tensortrain.system.native.load import (
    MODULE,
    SOURCES,
    built_path,
    digest_path,
    file_digest,
    is_whole,
    look_again,
)

__all__ = ["build"]

_MOST_S = 900


def build(*, force: bool = False) -> Path:
    """Compile the kernels for this machine, unless they are there; layers use them from their next call on
    (after a forced build: from the next process on).

    Args:
        force: Compile even so.

    Returns:
        Path: The library, under ``$XDG_CACHE_HOME/tensortrain``.

    Raises:
        KernelBuildError: There is no C++ compiler or no ninja, or the compiler failed. Nothing is left behind.

    Cost: half a minute to a minute, once for every release of torch and of this package.
    """
    target = built_path()
    try:
        if not is_whole(target) or force:
            _build_at(target)
    except OSError as error:
        raise KernelBuildError(
            f"the kernels must be written to {target.parent.parent}: {error}. Point XDG_CACHE_HOME to a folder that "
            "may be written to."
        ) from error
    if not look_again():
        raise KernelBuildError(
            f"kernels that were built must load: {target} does not. Build them again with force=True "
            "(tensortrain build-kernels --force)."
        )
    return target


def _build_at(target: Path) -> None:
    target.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent.parent, prefix="kernels-", suffix=".part") as folder:
        made = _compile(Path(folder))
        digest = made.with_name("digest")
        digest.write_text(file_digest(made))
        target.parent.mkdir(exist_ok=True)
        put_in_place(made, target)
        put_in_place(digest, digest_path(target))  # until then the library is passed over


def _compile(folder: Path) -> Path:
    _check_compiler()  # before a process has loaded torch for nothing
    # In a process of its own: torch imports what it has compiled, and that must happen at the final place.
    program = (
        "import sys\nfrom torch.utils.cpp_extension import load\nload(sys.argv[1], [sys.argv[2]], "
        "build_directory=sys.argv[3], extra_cflags=['-O2'], verbose=True)\n"
    )
    source = str(SOURCES / "module.cpp")
    command = [sys.executable, "-c", program, MODULE, source, str(folder)]
    environment = {**os.environ, "PATH": _path_with_tools()}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_MOST_S, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise KernelBuildError(
            f"compiling the kernels must end within {_MOST_S} s: it did not. Try again on a quieter machine."
        ) from error
    made = next((path for path in folder.glob(f"{MODULE}*") if path.suffix in (".so", ".pyd", ".dylib")), None)
    if done.returncode != 0 or made is None:
        raise _cannot_build(_reason(done.stdout + done.stderr))
    return made


def _check_compiler() -> None:
    words = shlex.split(os.environ.get("CXX", "c++"))  # as torch chooses it
    if os.name == "posix" and words and shutil.which(words[0]) is None:
        raise _cannot_build(f"no {words[0]}")


def _cannot_build(reason: str) -> KernelBuildError:
    return KernelBuildError(
        "compiling the kernels needs a C++ compiler, Python's headers and ninja (pip install ninja): found\n"
        f"{reason}\nLayers work without kernels; only small ones are slower."
    )


def _path_with_tools() -> str:
    """The search path, with the folder where pip puts ninja beside this interpreter."""
    path = os.environ.get("PATH", os.defpath)
    return path if shutil.which("ninja") else os.pathsep.join([str(Path(sys.executable).parent), path])


def _reason(output: str) -> str:
    """The lines that matter of what the compiler said."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return "\n".join((errors or lines)[-5:])
