"""Where compiled programs are kept, so that a later run does not compile them again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import platform
import time
import warnings

import jax

DAYS = 30  # after which a program is removed, and compiled again where it is needed


def keep_programs(workdir: str) -> None:
    """Says where JAX keeps compiled programs; comes before the first one.

    JAX_COMPILATION_CACHE_DIR counts first. Several processes of one program share the
    workdir, so theirs are in its folder `compiled`. A process alone has them in
    `puredif_jax/` of the user's cache folder, which is XDG_CACHE_HOME or ~/.cache: so
    runs in other workdirs find them, too. There, each kind of processor has a folder of
    its own, for a program is machine code. Where that cannot be written, the workdir
    has them.

    On a full disk they are not kept, without a word for each: the run itself says so.
    """
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache")
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    own = None if given or jax.process_count() > 1 else _of_user()
    folder = given or own or f"{workdir}/compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Else the name of the folder is a part of the key of each program.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _of_user() -> pathlib.Path | None:
    """The folder of this user and processor, made and tidied; None without one."""
    try:
        home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        folder = home.expanduser() / "puredif_jax" / _processor()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK) or folder.stat().st_uid != os.getuid():
            return None
        kept = list(folder.iterdir())
    except (OSError, RuntimeError):  # a home that is not there or not known
        return None
    oldest = time.time() - DAYS * 24 * 3600
    for path in kept:
        with contextlib.suppress(OSError):  # another run has removed it
            if path.stat().st_mtime < oldest:
                path.unlink()
    return folder


def _processor() -> str:
    """A name for what programs are compiled for: kind and features of the processor."""
    about = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
        about += sorted({line for line in lines if line.startswith(names)})
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
