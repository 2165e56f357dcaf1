"""Hostile folders in one scan: each a row, nothing executed, nothing unescaped.

    python tests/fuzz_folders.py [--count 200] [--seed 0] [--json FILE]

Makes folders that are damaged, mistaken or malicious, scans all of them by one command
and looks at what that wrote: exit with 0 only if every folder has a row, no string of
theirs reached the terminal, the log or the page unescaped, and nothing was executed.
"""

from __future__ import annotations

import argparse
import html.parser
import io
import json
import os
import pathlib
import pickle
import platform
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import unicodedata
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy
from tiny_config import TINY, draw_params

from puredif_jax.formats import diffusers as convert
from puredif_jax.formats.base import Model, Spec
from puredif_jax.formats.scheduling import Scheduling
from puredif_jax.formats.weight_sets import INDEX, PICKLE, WEIGHTS
from puredif_jax.stages import scan
from puredif_jax.stages.experiment import Scan
from puredif_jax.types import InputError

ANSI = "\x1b[2J\x1b[31m"
MARKUP = "</td></table><script>alert(1)</script><img src=x onerror=alert(2)>"
BIDI = "\u202e\u2066x\u200b"
TEXTS = (
    ANSI,
    MARKUP,
    BIDI,
    "a\nclean: all models are clean\n",
    "\ud800",
    "\0",
    "x" * 5000,
)
VALUES: tuple[Any, ...] = (
    *TEXTS,
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    10**400,
    float("nan"),
    float("inf"),
    [],
    {},
    [[[]]],
    [MARKUP],
    {"a": ANSI},
    [1] * 1000,
)
NAMES = (
    b"plain",
    b"ansi\x1b[2J\x1b[31mred",
    b"line\nclean: all models are clean",
    b"bytes\xff\xfe\x80",
    b"<script>alert(1)<",
    b"<img src=x onerror=alert(2)>",
    "\u202edlrow".encode(),
    b"n" * 230,
    "\u00e9".encode() * 110,
    b"report.html",
    b"-rf",
    b"'\"`$(touch executed)",
    b"a,b",
    b"%s%n{0}",
    b"\ttab\r",
)

Spoil = Callable[[pathlib.Path, random.Random], None]


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _config(folder: pathlib.Path, rng: random.Random) -> pathlib.Path:
    return folder / rng.choice(
        ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"]
    )


def change_a_field(folder, rng) -> None:
    path = _config(folder, rng)
    found = json.loads(path.read_text())
    found[rng.choice([*found, "_use_default_values", "surprise"])] = rng.choice(VALUES)
    path.write_text(json.dumps(found))


def change_a_name(folder, rng) -> None:
    path = _config(folder, rng)
    found = json.loads(path.read_text())
    found[rng.choice(TEXTS)] = rng.choice(VALUES)
    path.write_text(json.dumps(found))


def no_json(folder, rng) -> None:
    path = _config(folder, rng)
    path.write_bytes(
        rng.choice(
            [
                b"",
                b"[" * 100_000,
                b"{" + b'"a":' * 1000,
                b"\xef\xbb\xbf{}",
                '{"a": 1}'.encode("utf-16"),
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
                b"<!DOCTYPE html><html>",
                b" " * 11_000_000,
                rng.randbytes(500),
                b"nan",
                b'"' + ANSI.encode() + b'"',
            ]
        )
    )


def cut(folder, rng) -> None:
    path = folder / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[: rng.choice([0, 1, 7, 8, 100, 2000])])


def no_weights(folder, rng) -> None:
    (folder / "unet" / WEIGHTS).write_bytes(
        rng.choice(
            [
                b"version https://git-lfs.github.com/spec/v1\n",
                b"<html>404</html>",
                rng.randbytes(4000),
                struct.pack("<Q", 2**60) + b"{}",
                struct.pack("<Q", 2) + b"[]",
                struct.pack("<Q", 9) + b'{"a": 10}',
                pickle.dumps(Bomb(folder / "executed")),
            ]
        )
    )


def header(folder, rng) -> None:
    text = json.dumps(
        {
            rng.choice([MARKUP, ANSI, "x", "conv_in.weight"]): {
                "dtype": rng.choice(["F32", "F8", MARKUP]),
                "shape": rng.choice([[2**40], [1], [-1]]),
                "data_offsets": rng.choice([[0, 2**42], [0, 4], [4, 0]]),
            }
        }
    ).encode()
    (folder / "unet" / WEIGHTS).write_bytes(
        struct.pack("<Q", len(text)) + text + b"0000"
    )


def arrays(folder, rng) -> None:
    path = folder / "unet" / WEIGHTS
    tensors = safetensors.numpy.load_file(path)
    name = rng.choice([*tensors])
    how = rng.choice(["nan", "shape", "dtype", "gone", "more", "twice"])
    if how == "nan":
        tensors[name] = np.full_like(tensors[name], rng.choice([np.nan, np.inf]))
    elif how == "shape":
        tensors[name] = np.zeros((1, 2, 3), np.float32)
    elif how == "dtype":
        tensors[name] = tensors[name].astype(rng.choice([np.int8, np.int64, np.bool_]))
    elif how == "gone":
        del tensors[name]
    elif how == "more":
        tensors[rng.choice([MARKUP, ANSI, "a" * 3000])] = np.zeros(1, np.float32)
    else:
        tensors["down_blocks.0.attentions.0.query.weight"] = np.zeros(1, np.float32)
        tensors["down_blocks.0.attentions.0.to_q.weight"] = np.zeros(1, np.float32)
    safetensors.numpy.save_file(tensors, path)


def index(folder, rng) -> None:
    (folder / "unet" / WEIGHTS).unlink()
    name = rng.choice(
        [
            "../../secret.safetensors",
            "/etc/passwd",
            "x" * 5000 + ".safetensors",
            PICKLE,
            MARKUP,
            ANSI,
            WEIGHTS,
            "..",
            "",
            7,
            None,
        ]
    )
    places = rng.choice([{"conv_in.weight": name}, {}, [], name, {ANSI: name}])
    (folder / "unet" / INDEX).write_text(json.dumps({"weight_map": places}))


def pickled(folder, rng) -> None:
    (folder / "unet" / WEIGHTS).unlink()
    path = folder / "unet" / PICKLE
    bomb = pickle.dumps(Bomb(folder / "executed"))
    if rng.random() < 0.3:
        path.write_bytes(bomb)
        return
    packed = rng.random() < 0.5
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as file:
        file.writestr("archive/data.pkl", bomb)
        file.writestr("archive/version", "3")
        file.writestr("archive/data/0", bytes(5_000_000 if packed else 8))


def odd_files(folder, rng) -> None:
    path = rng.choice([folder / "unet" / WEIGHTS, _config(folder, rng)])
    path.unlink()
    how = rng.choice(["fifo", "loop", "zero", "random", "folder", "nowhere", "passwd"])
    if how == "fifo":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    else:
        path.symlink_to(
            {
                "loop": path,
                "zero": "/dev/zero",
                "random": "/dev/random",
                "nowhere": "/no/such",
                "passwd": "/etc/passwd",
            }[how]
        )


def links(folder, rng) -> None:
    target = rng.choice([folder, folder / "unet", folder.parent])
    (folder / rng.choice(["unet", "more", "scheduler2"]) / "loop").parent.mkdir(
        exist_ok=True
    )
    (folder / "loop").symlink_to(target)


def loose(folder, rng) -> None:
    for name in rng.sample(
        ["a.pkl", "b.onnx", "c.npz", "d.ckpt", "e.zip", f"f{ANSI}.bin", "g<b>.pt"], 3
    ):
        (folder / name).write_bytes(pickle.dumps(Bomb(folder / "executed")))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("images.npy", bytes(5_000_000))
    (folder / "images.npz").write_bytes(file.getvalue())


def checkpoint(folder, rng) -> None:
    """A file that looks like one of the DDIM code, in place of the model."""
    shutil.rmtree(folder / "unet")
    (folder / "model_index.json").unlink()
    names = b"temb.dense.0.weight conv_in.weight"
    bomb = pickle.dumps([names.decode(), Bomb(folder / "executed")])
    path = folder / rng.choice(["ckpt.pth", "a.ckpt", f"b{ANSI}.pt", "c<b>.PTH"])
    path.write_bytes(bomb + rng.randbytes(rng.choice([0, 100])))
    if rng.random() < 0.5:
        kind = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_LZMA])
        with zipfile.ZipFile(path, "w", kind) as file:
            file.writestr("archive/data.pkl", bomb + bytes(rng.choice([0, 9_000_000])))
            file.writestr("archive/version", "3")
    if rng.random() < 0.3:
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    (folder / "config.yml").write_text(f"data:\n  image_size: {rng.choice(TEXTS[:4])}")


def truth(folder, rng) -> None:
    """A whole model, whose truth file is none."""
    (folder / "truth.safetensors").write_bytes(rng.randbytes(50))


def parts(folder, rng) -> None:
    path = folder / "model_index.json"
    found = json.loads(path.read_text())
    found[rng.choice([MARKUP, ANSI, "vae", "vqvae", "unet"])] = rng.choice(
        [
            ["os", "system"],
            ["diffusers", MARKUP],
            [ANSI, "UNet2DModel"],
            [["diffusers"], "UNet2DModel"],
            ["diffusers", "UNet2DConditionModel"],
            ["diffusers"],
        ]
    )
    path.write_text(json.dumps(found))


def removed(folder, rng) -> None:
    path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    path.unlink()


KINDS: tuple[Spoil, ...] = (
    change_a_field,
    change_a_name,
    no_json,
    cut,
    no_weights,
    header,
    arrays,
    index,
    pickled,
    odd_files,
    links,
    loose,
    checkpoint,
    truth,
    parts,
    removed,
)


def make(top: pathlib.Path, count: int, seed: int) -> list[pathlib.Path]:
    """That many hostile folders below one, with what each is, by its number."""
    rng = random.Random(seed)
    params = draw_params(TINY)
    made = []
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        name = os.fsdecode(b"%03d-" % i + NAMES[rng.randrange(len(NAMES))])
        folder = top / name
        spec = Spec(TINY, Scheduling())
        convert.write_folder(folder, Model(spec, params))
        kind(folder, rng)
        made.append(folder)
    return made


class Page(html.parser.HTMLParser):
    """Collects the tags and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)


def unescaped(text: str) -> list[str]:
    """Characters that a terminal or a page obeys, and line breaks left out."""
    return sorted(
        {
            ascii(x)
            for x in text
            if x not in "\n\r\t" and unicodedata.category(x) in ("Cc", "Cf", "Cs")
        }
    )


def judge(home: pathlib.Path, made: list[pathlib.Path], shown: bytes) -> list[str]:
    """What is wrong with what a scan has written, a sentence each."""
    wrong = []
    text = shown.decode("utf-8", "surrogateescape")
    report = json.loads((home / "report.json").read_text("utf-8"))
    page = (home / "report.html").read_text("utf-8")
    rows = report["sections"][0]["table"]
    numbers = {row["model"][:3] for row in rows}
    numbers |= set(re.findall(r"/(\d{3})-[^/]*", text))
    missing = [path.name[:3] for path in made if path.name[:3] not in numbers]
    if missing:
        wrong.append(f"no row for {missing}")
    if "Traceback" in text:
        wrong.append("a traceback")
    for where, what in (("the log", text), ("the page", page)):
        if found := unescaped(what):
            wrong.append(f"{where} has {found}")
    if re.search(r"^(clean|error|backdoored): all models", text, re.M):
        wrong.append("a name has written a line of its own")
    parsed = Page()
    parsed.feed(page)
    if bad := parsed.tags & {"script", "iframe", "object", "embed", "link"}:
        wrong.append(f"the page has the tags {bad}")
    if bad := {x for x in parsed.attributes if x.startswith("on")}:
        wrong.append(f"the page has the attributes {bad}")
    top = made[0].parent
    if ran := [p for place in (top, home) for p in place.rglob("executed")]:
        wrong.append(f"executed: {ran}")
    return wrong


AUDIT = "--config.audit"
SMALL = (
    f"{AUDIT}.inversion.blocks=none",
    f"{AUDIT}.inversion.descent.scout=0",
    f"{AUDIT}.inversion.descent.steps=2",
    f"{AUDIT}.inversion.descent.candidates=1",
    f"{AUDIT}.hypotheses=Fading",
    f"{AUDIT}.inversion.heldout=2",
    "--config.steps=2",
    "--config.draws=2",
)


def run(top: pathlib.Path, home: pathlib.Path) -> tuple[bytes, int, float]:
    """One scan of all, as a user calls it: what it printed, its status, seconds."""
    command = [sys.executable, "-m", "puredif_jax.main", "--config=configs/scan.py"]
    command += [f"--config.model={top}", f"--config.workdir={home}", *SMALL]
    began = time.monotonic()
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=pathlib.Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        timeout=3600,
    )
    return done.stdout, done.returncode, time.monotonic() - began


def slowest(top: pathlib.Path) -> tuple[float, str]:
    """The seconds that the worst folder takes to be read or refused."""
    worst = (0.0, "")
    wanted = Scan("scan", (str(top),))
    for name, path in scan.find_models(wanted).items():
        began = time.monotonic()
        try:
            scan.as_experiment(wanted, name, path)
        except InputError:
            pass
        worst = max(worst, (time.monotonic() - began, name))
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        top, home = pathlib.Path(place, "models"), pathlib.Path(place, "scan")
        made = make(top, options.count, options.seed)
        shown, status, seconds = run(top, home)
        rows = json.loads((home / "report.json").read_text())["sections"][0]["table"]
        worst, name = slowest(top)
        wrong = judge(home, made, shown)
    kinds: dict[str, int] = {}
    for row in rows:
        kinds[row["verdict"]] = kinds.get(row["verdict"], 0) + 1
    found = {
        "command": " ".join(["python", *sys.argv]),
        "folders": options.count,
        "seed": options.seed,
        "rows": len(rows),
        "verdicts": kinds,
        "exit status": status,
        "seconds": round(seconds, 1),
        "seconds to read or refuse the slowest": round(worst, 2),
        "the slowest": name,
        "wrong": wrong,
        "python": platform.python_version(),
        "device": "CPU",
    }
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
