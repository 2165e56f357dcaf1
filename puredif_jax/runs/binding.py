"""What a run folder is bound to: one configuration, and the weights that were read.

config.json        the configuration; another one is refused in the same folder
inputs.json        digests of the weights and images that were read; others are
                   refused, too
report.json        the end of a run; it names its configuration
"""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from absl import logging

from puredif_jax.files.sealed import DamagedError, read_json
from puredif_jax.files.whole import KINDS, write_whole
from puredif_jax.runs import parallel
from puredif_jax.runs.config import without
from puredif_jax.types import InputError

# What does not change what else a run finds.
PLACE = ("workdir", "devices", "save_every", "screen", "repair")
SPARING = ("together", "remat")
BEGUN = ("checkpoints", "results", "report.json")


class RunError(InputError):
    """A run folder that cannot be used; says why."""


def make_folder(folder: pathlib.Path) -> None:
    """Makes a folder, unless there is one.

    Raises:
      RunError: it cannot be made, or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunError(
            f"{folder} is no folder that can be written to ({error.strerror}): give "
            "another --config.workdir"
        ) from error


def begun(folder: pathlib.Path) -> bool:
    """Whether a run has computed anything."""
    return any((folder / part).exists() for part in BEGUN)


def is_run(folder: pathlib.Path, config: Mapping[str, Any]) -> bool:
    """Whether a folder holds a run of this configuration; False if it holds none.

    These may change while a run goes on: where it lies, how many devices it has, how
    memory is spared, by which detector it is judged, which starting noise is screened,
    and how the model is repaired. A configuration binds nothing if nothing was begun
    under it, because what it names was wrong.

    Raises:
      RunError: it holds a run of another one, a scan or a sweep, or a file that is no
        configuration.
    """
    found = _configuration(folder, "Experiment")
    if found is None:
        return False
    old, new = _binding(found), _binding(config)
    if _beside(found) == _beside(config) != "":
        old["weights"] = new["weights"]  # of another run of a sweep that was moved
    changed = _changed(old, new)
    if changed and not begun(folder):
        return False
    if changed:
        raise RunError(
            f"{folder} holds a run with another {changed}: give another "
            "--config.workdir, or remove the folder to start again"
        )
    return True


def _beside(config: Mapping[str, Any]) -> str:
    """Where the weights lie, as seen from the run's folder; "" without either."""
    weights, workdir = config.get("weights"), config.get("workdir")
    if not (isinstance(weights, str) and isinstance(workdir, str)):
        return ""
    return os.path.relpath(weights, workdir)


def bind_sweep(folder: pathlib.Path) -> None:
    """Binds a folder to a sweep, whose runs are each bound by themselves.

    Raises:
      RunError: it holds a run or a scan, or cannot be written to.
    """
    make_folder(folder)
    if _configuration(folder, "Sweep") is None and parallel.is_host_zero():
        write_whole(folder / "config.json", json.dumps({"type": "Sweep"}).encode())


def bind_scan(folder: pathlib.Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Binds a folder to a scan, or checks that it is bound, with the same settings.

    The table of a scan has a row of every model that was given since the first was
    begun: more may come, none is dropped.

    Returns:
      The models of the table, first the models of earlier calls.

    Raises:
      RunError: it holds something else, or a scan with other settings.
    """
    make_folder(folder)
    found = _configuration(folder, "Scan")
    new = json.loads(json.dumps(config))
    earlier: list[str] = []
    if found is not None:
        free = ("model", "offline")  # that change no row
        old, now = (
            {k: v for k, v in _binding(x).items() if k not in free}
            for x in (found, new)
        )
        changed = _changed(old, now)
        if changed and any(map(begun, filter(pathlib.Path.is_dir, folder.iterdir()))):
            raise RunError(
                f"{folder} holds a scan with another {changed}: give another "
                "--config.workdir, so that its table stays"
            )
        earlier = [] if changed else [*map(str, found.get("model", []))]
    new["model"] = earlier + [name for name in new["model"] if name not in earlier]
    if parallel.is_host_zero() and new != found:
        write_whole(folder / "config.json", json.dumps(new, indent=2).encode())
    return tuple(new["model"])


def _configuration(folder: pathlib.Path, kind: str) -> dict[str, Any] | None:
    """What a folder's config.json has; None for a folder in which nothing was begun.

    Raises:
      RunError: that is no configuration, or one of another kind of work, or it is
        missing beside what was computed.
    """
    path = folder / "config.json"
    other = "give another --config.workdir"
    if not path.exists():
        if found := [part for part in BEGUN if (folder / part).exists()]:
            raise RunError(
                f"{folder} has {' and '.join(found)}, and no config.json that says of "
                f"what: {other}"
            )
        return None
    try:
        known = dict(json.loads(path.read_text("utf-8")))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise RunError(
            f"{path} is damaged, or is not the configuration of a run: {other}"
        ) from error
    holds = known.get("type", "Experiment")
    if holds != kind and KINDS.get(holds):
        raise RunError(f"{folder} holds a {KINDS[holds]}, not a {KINDS[kind]}: {other}")
    return known


def numbers_of(
    folder: pathlib.Path, config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What the report of a run has in `numbers`, if it was judged in this way.

    A damaged report is named in the log; the run then writes it again.
    """
    path = folder / "report.json"
    if not path.exists():
        return None
    try:
        report = read_json(path)
        same = _judging(report["config"]) == _judging(config)
        return dict(report["numbers"]) if same else None
    except DamagedError as error:
        logging.warning("%s: it is written again", error)
        return None


def _judging(config: Mapping[str, Any]) -> Any:
    """How a run judges: the detectors of its audit and of each defense in it.

    It also has which starting noise it screens, and how it repairs the model.
    """
    audit = config.get("audit") or {}
    defenses = audit.get("baselines") or ()
    detectors = [audit.get("detector"), *(each.get("detector") for each in defenses)]
    return [*detectors, config.get("screen"), config.get("repair")]


def _binding(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration decides what is computed.

    Settings by which memory is spared decide nothing.
    """
    kept = {k: v for k, v in without(config, SPARING).items() if k not in PLACE}
    if isinstance(audit := kept.get("audit"), dict):
        audit = {k: v for k, v in audit.items() if k != "detector"}
        if "baselines" in audit:
            audit["baselines"] = [
                {k: v for k, v in each.items() if k != "detector"}
                for each in audit["baselines"]
            ]
        kept["audit"] = audit
    return kept


def pin(
    folder: pathlib.Path,
    weights: Mapping[str, str],
    others: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Notes the inputs of a run, or checks that they are still the same.

    Args:
      folder: of the run.
      weights: digests of all weights that it reads, by name.
      others: digests of what else it reads. A later repair may add some.

    Raises:
      RunError: the run has begun with others, or it is not known with which.
      WriteError: the note cannot be written.
    """
    path, digests = folder / "inputs.json", {**weights, **others}
    if not begun(folder):
        if parallel.is_host_zero():
            write_whole(path, json.dumps(digests, indent=2).encode())
        return
    if not digests:
        return
    again = "give another --config.workdir, or remove the folder to start again"
    try:
        old = dict(json.loads(path.read_text("utf-8")))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise RunError(
            f"{path} is missing or damaged, so it is not known which weights the run "
            f"has read: {again}"
        ) from error
    new = {name: others[name] for name in others.keys() - old.keys()}
    for name, digest in digests.items():
        if name not in new and old.get(name) != digest:
            raise RunError(
                f"{folder} holds a run of another version of {name}: {again}"
            )
    if new and parallel.is_host_zero():
        write_whole(path, json.dumps(old | new, indent=2).encode())


def _changed(old: Any, new: Any, where: str = "configuration") -> str:
    """The dotted path of the first difference, or ''."""
    new = json.loads(json.dumps(new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            path = key if where == "configuration" else f"{where}.{key}"
            if key not in old or key not in new:
                return path
            found = _changed(old[key], new[key], path)
            if found:
                return found
        return ""
    return "" if old == new else where
