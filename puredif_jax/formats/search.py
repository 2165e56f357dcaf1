"""The search of a folder for models, to any depth and through links.

Each network's folder gives a row, and so does each further set of weights in it that
holds other arrays. Files that may be weights and have no configuration are a row with
the reason. A link's target is searched once.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors.numpy

from puredif_jax.files.whole import KINDS, shortened
from puredif_jax.formats import diffusers as convert
from puredif_jax.formats import diffusers_layout as layout
from puredif_jax.formats.base import Format
from puredif_jax.formats.diffusers_config import ConvertError
from puredif_jax.formats.entries import entries, same
from puredif_jax.formats.known import format_of
from puredif_jax.formats.opening import listed, of_system, read_json, unreadable
from puredif_jax.formats.state_dict import to_torch
from puredif_jax.formats.weight_sets import (
    LARGE,
    TRUTH,
    TRUTH_IMAGES,
    TRUTH_TABLES,
    WeightSet,
    choose,
    may_hold,
    weight_sets,
)
from puredif_jax.types import InputError

NAMED = 20  # files of a folder that are named, at most
MOST_LINKED = 10_000  # folders outside of the searched one, to which links lead
MOST_COPIED = 2**31  # bytes of a file that is compared with a model

# What a training with accelerate leaves beside a model: no network is in it.
_STATES = re.compile(
    r"(optimizer|scheduler|scaler|sampler|random_states|training_args|dl_state|"
    r"custom_checkpoint)[\w-]*\.(bin|pt|pth|pkl)"
)
_LEFT = ("checkpoints", "results", "compiled")  # folders that our runs write


class Search:
    """The search of one folder.

    Attributes:
      top: the folder.
      variant: of the weights to scan; None for those that diffusers loads.
      rows: a name, and a path that a format knows or what is wrong.
      notes: sentences on what is not scanned and need not be.
    """

    def __init__(self, top: pathlib.Path, variant: str | None) -> None:
        self.top, self.variant = top, variant
        self.rows: list[tuple[str, pathlib.Path | InputError]] = []
        self.notes: list[str] = []
        self._seen: dict[str, pathlib.Path] = {}
        self._home = os.path.realpath(top)
        self._outside = 0
        self._claimed: set[pathlib.Path] = set()  # networks that have a row
        self._ours: set[pathlib.Path] = set()  # folders that a run of ours writes
        self._prefix = ""

    def run(self) -> None:
        """Visits every folder once, those above before those below."""
        waiting = [self.top]
        while waiting:
            folder = waiting.pop()
            try:
                if not self._enters(folder):
                    continue
                inside = listed(folder)
                below = [each for each in inside if os.path.isdir(each)]
                waiting += reversed(below)
                self._visit(folder, inside, below)
            except Exception as error:  # whatever a stranger's folder leads to
                self.rows.append((self._name(folder), _reason(folder, error)))

    def _enters(self, folder: pathlib.Path) -> bool:
        """Whether to visit a folder; notes why not."""
        real = os.path.realpath(folder)
        if real in self._seen:
            self.notes.append(
                f"{folder} leads to {self._seen[real]}, which is searched once"
            )
            return False
        linked = folder != self.top and folder.is_symlink()
        if linked and (
            pathlib.Path(self._home).is_relative_to(real) or of_system(folder)
        ):
            self.notes.append(f"{folder} leads to {real}, which is not searched")
            return False
        if not pathlib.Path(real).is_relative_to(self._home):
            self._outside += 1
            if self._outside > MOST_LINKED:
                if self._outside == MOST_LINKED + 1:
                    raise ConvertError(
                        f"links in {self.top} lead to more than {MOST_LINKED} folders: "
                        "the others are not searched, so give them by themselves"
                    )
                return False
        self._seen[real] = folder
        return True

    def _name(self, folder: pathlib.Path, part: str = "") -> str:
        """The name of a row: the way from the top, or the top's own name."""
        way = [*folder.relative_to(self.top).parts]
        if way and way[-1] == convert.FOLDER:  # of a run
            way.pop()
        if not way:
            way = [_own_name(self.top)]
        elif self._prefix:
            way.insert(0, self._prefix)
        return ".".join([*way, *([part] if part else [])])

    def _visit(
        self,
        folder: pathlib.Path,
        inside: Sequence[pathlib.Path],
        below: Sequence[pathlib.Path],
    ) -> None:
        """Adds the rows of one folder."""
        if folder in self._ours:
            self._ours.update(below)
        elif _is_run(folder):
            self._ours.update(each for each in below if each.name in _LEFT)
        used: set[str] = set()
        if folder in self._claimed:
            name = self._name(folder.parent)
            used = self._further(folder, name)
            if extra := layout.own_process(folder):
                error = ConvertError(
                    f"{extra} makes {folder} a pipeline of its own, beside the one "
                    "above it: remove the file, or scan a copy of the folder"
                )
                self.rows.append((f"{name}.{folder.name}", error))
        elif (kind := format_of(folder)) is not None and not _is_diffusers(kind):
            self._name_top(folder)
            used = self._whole(folder, kind)
        elif _has_parts(folder):
            self._name_top(folder)
            used = self._model(folder)
        self._lone(folder, inside, used)

    def _name_top(self, folder: pathlib.Path) -> None:
        """If the top is a model itself, makes the rows below it bear its name, too."""
        if folder == self.top:
            self._prefix = _own_name(self.top)

    def _whole(self, folder: pathlib.Path, kind: Format) -> set[str]:
        """The row of a folder that is one model; claims the folders of its parts."""
        found: pathlib.Path | InputError = folder
        if self.variant is not None:
            found = ConvertError(
                f"{folder} is {kind.name}, which has no variants such as "
                f"{self.variant!r}: scan it without --config.variant"
            )
        self.rows.append((self._name(folder), found))
        try:
            files = kind.files(folder)
        except InputError:  # who reads the model finds it
            return set()
        self._claimed.update(file.parent for file in files if file.parent != folder)
        return {file.name for file in files if file.parent == folder}

    def _model(self, folder: pathlib.Path) -> set[str]:
        """The rows of a model's folder; returns the files that are accounted for."""
        name = self._name(folder)
        try:
            network = layout.network_folder(folder)
        except InputError:  # who reads the model finds it
            self.rows.append((name, folder))
            self._claimed.add(folder / "unet")
            return set()
        place: pathlib.Path | InputError = folder
        alone = True
        try:
            chosen = choose(network, self.variant)
            if self.variant is not None:
                place = chosen.principal
        except InputError as error:
            if self.variant is not None:
                place = error
            else:  # several variants have a row each
                alone = len(weight_sets(network)) < 2
        if alone:
            self.rows.append((name, place))
        if network != folder:
            self._claimed.add(network)
            return set()
        return self._further(folder, name)

    def _further(self, network: pathlib.Path, name: str) -> set[str]:
        """Rows for weights beside those that are scanned, if they hold other arrays.

        Returns the names of all files of weights.
        """
        sets = weight_sets(network)
        try:
            chosen = choose(network, self.variant)
        except InputError:  # who reads the model finds it
            chosen = None
        used = set()
        for each in sets:
            used.add(each.principal.name)
            try:
                used.update(path.name for path in each.files())
            except InputError:
                pass
            if each == chosen or (chosen is None and len(sets) == 1):
                continue
            if chosen is None or not self._same(each, chosen):
                self.rows.append((f"{name}.{each.label()}", each.principal))
        return used

    def _same(self, each: WeightSet, chosen: WeightSet) -> bool:
        try:
            equal = same(chosen, each)
        except Exception:  # who scans it finds why
            return False
        if equal:
            self.notes.append(
                f"{each.principal} holds the weights of {chosen.principal.name}"
            )
        return equal

    def _alone(self, path: pathlib.Path) -> bool:
        """Adds the row of a file that is a model by itself, if a format knows it."""
        try:
            kind = format_of(path)
        except ConvertError as error:
            self.rows.append((self._name(path.parent, path.name), error))
            return True
        if kind is None or _is_diffusers(kind):
            return False
        self.rows.append((self._name(path.parent, path.name), path))
        return True

    def _lone(
        self, folder: pathlib.Path, inside: Sequence[pathlib.Path], used: set[str]
    ) -> None:
        """A row for files that may be weights and have no configuration."""
        found: list[str] = []
        states: list[str] = []
        ours = folder in self._ours
        for path in inside:
            if path.name in used or os.path.isdir(path):
                continue
            kind = may_hold(path)
            try:
                if self._alone(path) or kind is None:
                    continue
            except OSError as fault:  # such as a link of too long a name
                self.rows.append(
                    (self._name(folder, path.name), unreadable(path, fault))
                )
                continue
            if path.name.endswith(TRUTH) and _is_truth(path):
                continue
            left = ours and kind in ("arrays", "Orbax", "unknown")
            if left or _STATES.fullmatch(path.name) or _is_copy(path):
                states.append(path.name)
            elif kind == "unknown" and _is_blob(path):
                continue
            else:
                found.append(f"{path.name} ({kind})")
        if states:
            what = "a run by this program" if ours or _is_run(folder) else "a training"
            self.notes.append(f"{folder} has files of {what}: {shortened(states)}")
        if found:
            more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
            error = ConvertError(
                f"{folder} has files that may be weights, without a configuration, so "
                f"they are not scanned: {', '.join(found[:NAMED])}{more}; a model is a "
                "folder with unet/config.json"
            )
            self.rows.append((self._name(folder, "loose"), error))


def _is_diffusers(kind: Format) -> bool:
    """Whether it is diffusers' format, where each set of weights has a row."""
    return isinstance(kind, convert.DiffusersFolder)


def _reason(folder: pathlib.Path, error: Exception) -> InputError:
    """Why a folder cannot be searched, in a sentence."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, OSError):  # such as a missing permission
        return unreadable(folder, error)
    return ConvertError(f"{folder} cannot be read ({type(error).__name__}: {error})")


def _own_name(folder: pathlib.Path) -> str:
    """The name of a folder that was given: of the run, or of the Hub's model."""
    whole = pathlib.Path(os.path.realpath(folder))
    if whole.name in (convert.FOLDER, "unet"):
        return whole.parent.name
    if whole.parent.name == "snapshots":  # of the Hub's cache
        return whole.parents[1].name
    return whole.name


def _has_parts(folder: pathlib.Path) -> bool:
    """Whether this is a model, or has parts of one, so that it is not passed over."""
    if convert.is_model(folder) or weight_sets(folder):
        return True
    return any(os.path.lexists(folder / part) for part in ("model_index.json", "unet"))


def _is_run(folder: pathlib.Path) -> bool:
    """Whether a run of ours has its configuration here."""
    path = folder / "config.json"
    try:
        return path.is_file() and read_json(path).get("type") in KINDS
    except ConvertError:
        return False


def _is_truth(path: pathlib.Path) -> bool:
    """Whether this holds the arrays of a backdoor, and nothing else."""
    if not os.path.isfile(path):  # a pipe would wait
        return False
    try:
        with safetensors.safe_open(path, "numpy") as file:
            found = set(file.keys())
            return {*TRUTH_IMAGES[:2]} <= found <= {*TRUTH_IMAGES, *TRUTH_TABLES}
    except (safetensors.SafetensorError, OSError):
        return path.stat().st_size < LARGE


def _is_blob(path: pathlib.Path) -> bool:
    """Whether this lies in the Hub's cache, where snapshots link to it."""
    return path.parent.name == "blobs" and (path.parents[1] / "snapshots").is_dir()


def _is_copy(path: pathlib.Path) -> bool:
    """Whether this is the second copy of the model that a run of ours keeps."""
    model = path.parent / convert.FOLDER
    if path.name != "weights.safetensors" or not path.is_file():
        return False
    try:
        if not convert.is_model(model) or path.stat().st_size > MOST_COPIED:
            return False
        flat = safetensors.numpy.load_file(path)
        with entries(choose(model / "unet")) as stored:
            theirs = {entry.name: entry.read() for entry in stored}
        ours = to_torch(_nested(flat))
    except Exception:  # then it is no copy, and has a row
        return False
    return ours.keys() == theirs.keys() and all(
        np.array_equal(ours[name], theirs[name]) for name in ours
    )


def _nested(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    """Arrays by names with dots as dictionaries within each other."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *modules, leaf = name.split(".")
        home = nested
        for module in modules:
            home = home.setdefault(module, {})
        home[leaf] = value
    return nested
