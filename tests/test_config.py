"""config: files, typed overrides, the JSON form, and what each error says."""

from __future__ import annotations

import abc
import dataclasses
import functools
import json
import math
import typing
from collections.abc import Callable
from typing import Any, Literal, Optional

import pytest
from absl import app, flags

from puredif_jax.runs.command_line import from_flags
from puredif_jax.runs.config import ConfigError, check, override, to_dict
from puredif_jax.runs.sources import load

if typing.TYPE_CHECKING:
    from decimal import Decimal

PROGRAM = "main.py"


def adam() -> str:
    return "adam"


class Sampler(typing.Protocol):
    def step(self, x: float) -> float: ...


@dataclasses.dataclass(frozen=True)
class Ddim:
    eta: float = 0.0

    def step(self, x: float) -> float:
        return x * self.eta

    def __call__(self) -> float:
        return self.eta


@dataclasses.dataclass(frozen=True)
class Ddpm(Sampler):
    """It says which protocol it follows; others, such as Ddim, need not."""

    def step(self, x: float) -> float:
        return x


@dataclasses.dataclass(frozen=True)
class Trigger:
    size: int = 9
    shape: tuple[int, int] = (3, 3)


@dataclasses.dataclass(frozen=True)
class BadDiffusion:
    trigger: Trigger = Trigger()


@dataclasses.dataclass(frozen=True)
class VillanDiffusion:
    trigger: Trigger = Trigger()
    psi: float = 1.0


@dataclasses.dataclass(frozen=True)
class Detector:
    threshold: float = 0.5


@dataclasses.dataclass(frozen=True)
class Inversion:
    steps: int = 10
    name: str = "base"
    rate: float = 0.1
    ema: bool = False
    timesteps: tuple[int, ...] = (1, 2)
    weights: tuple[float, ...] = (0.5,)
    tags: tuple[str, ...] = ()
    limit: int | None = None
    label: Optional[str] = "x"  # noqa: UP045  (the older form is read too)
    schedule: Literal["linear", "cosine"] = "linear"
    order: Literal[0, 1] = 1
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    chunk: int | tuple[int, ...] | str = 1
    quoted: "int" = 3  # noqa: UP037  (a string in a string, with the import above)
    optimiser: Callable[[], Any] = adam
    decay: Callable[[int], float] | float = 0.0
    grid: tuple[tuple[int, int], ...] = ((1, 2),)
    derived: int = dataclasses.field(default=0, init=False)

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be\npositive, not {self.steps}.")


@dataclasses.dataclass(frozen=True)
class Experiment:
    attack: BadDiffusion | VillanDiffusion = VillanDiffusion()
    inversion: Inversion = Inversion()
    sampler: Sampler = Ddim()
    detector: Detector | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Unresolved:
    price: Decimal | None = None


class Hypothesis(abc.ABC):
    """A base that says what its kinds do; kinds are found by their names."""

    @abc.abstractmethod
    def shift(self) -> float: ...


@dataclasses.dataclass(frozen=True)
class Fading(Hypothesis):
    rate: float = 0.5

    def shift(self) -> float:
        return self.rate


@dataclasses.dataclass(frozen=True)
class SlowFading(Fading):
    rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class NoiseShift(Hypothesis):
    def shift(self) -> float:
        return 1.0


@dataclasses.dataclass(frozen=True)
class Learned(Hypothesis):
    """It needs an argument."""

    path: str

    def shift(self) -> float:
        return float(len(self.path))


@dataclasses.dataclass(frozen=True)
class Unstable(Hypothesis):
    """It does not take its own defaults."""

    rate: float = 2.0

    def __post_init__(self):
        if self.rate > 1:
            raise ValueError(f"rate must be\nat most 1, not {self.rate}.")

    def shift(self) -> float:
        return self.rate


@dataclasses.dataclass(frozen=True)
class Unfinished(Hypothesis):
    """It does not say what its kind does."""


@dataclasses.dataclass(frozen=True)
class _Private(NoiseShift):
    """Not for a user."""


class Plain(Hypothesis):
    """No dataclass, so nothing that a configuration holds."""

    def shift(self) -> float:
        return 0.0


class Defense(abc.ABC):
    """A base whose kinds are all defined elsewhere."""

    @abc.abstractmethod
    def inspect(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Defended:
    one: Defense | None = None
    all: tuple[Defense, ...] = ()
    either: Trigger | Defense | None = None


NAMED = "Fading, SlowFading, NoiseShift, Learned(path), Unstable"


@dataclasses.dataclass(frozen=True)
class Audit:
    first: Hypothesis = Fading()
    all: tuple[Hypothesis, ...] = (Fading(),)
    pair: tuple[Hypothesis, int] = (Fading(), 3)
    none: Hypothesis | None = None
    attack: BadDiffusion | VillanDiffusion = VillanDiffusion(psi=3.0)
    clip: Detector | float | None = None
    text: Detector | str = "x"
    by_name: dict[str, Hypothesis] = dataclasses.field(default_factory=dict)
    learned: Learned | None = None
    steps: Callable[[], Hypothesis] = Fading


def message_of(call: Callable[[], Any], *parts: str) -> str:
    """The text of the ConfigError that `call` raises: one line that holds `parts`."""
    with pytest.raises(ConfigError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and not message.endswith(".")
    for part in parts:
        assert part in message
    return message


def write(folder, text, name="run.py") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


FILE = '''"""A config file with its own class and postponed annotations."""
from __future__ import annotations
import dataclasses

@dataclasses.dataclass(frozen=True)
class Trigger:
    size: int = 9

@dataclasses.dataclass(frozen=True)
class Run:
    trigger: Trigger = Trigger()
    steps: int = 10
    ema: bool = False

def get_config():
    return Run(steps=20)
'''


# --- load ---------------------------------------------------------------------------


def test_load_returns_the_tree(tmp_path):
    config = load(write(tmp_path, FILE))
    assert (type(config).__name__, config.steps, config.trigger.size) == ("Run", 20, 9)


def test_types_of_a_file_resolve_in_that_file(tmp_path):
    (tmp_path / "other").mkdir()
    first = load(write(tmp_path, FILE))
    load(write(tmp_path / "other", FILE.replace("size: int = 9", "size: str = 'a'")))
    assert override(first, "trigger.size", "11").trigger.size == 11


def test_load_names_a_missing_file_and_the_closest(tmp_path):
    write(tmp_path, FILE, "smoke.py")
    path = str(tmp_path / "smok.py")
    message_of(lambda: load(path), path, "did you mean 'smoke.py'?", "get_config()")


@pytest.mark.parametrize("name", ["run.txt", "run", ""])
def test_load_takes_only_python_files(tmp_path, name):
    path = write(tmp_path, FILE, name) if name else str(tmp_path)
    message_of(lambda: load(path), path, "not an existing .py file")


@pytest.mark.parametrize(
    "text, found",
    [
        ("x = 1", "does not define get_config()"),
        ("get_config = 3", "does not define get_config()"),
        ("def get_config(): return {'a': 1}", "returns a dict from get_config()"),
        ("def get_config(): pass", "returns a NoneType from get_config()"),
        (FILE.replace("Run(steps=20)", "Run"), "returns a type from get_config()"),
    ],
)
def test_load_wants_a_frozen_dataclass_from_get_config(tmp_path, text, found):
    path = write(tmp_path, text)
    message_of(lambda: load(path), path, found, "an instance of a frozen dataclass")


def test_load_rejects_an_unfrozen_dataclass(tmp_path):
    text = (
        "import dataclasses\n@dataclasses.dataclass\nclass Run:\n    a: int = 1\n"
        "def get_config(): return Run()\n"
    )
    path = write(tmp_path, text)
    message_of(lambda: load(path), path, "returns a Run", "of a frozen dataclass")


@pytest.mark.parametrize(
    "bad, parts",
    [
        ({"seed": "1"}, ("config.seed", "'1'", "int")),
        ({"seed": True}, ("config.seed", "True", "int")),
        ({"attack": "VillanDiffusion"}, ("config.attack", "BadDiffusion")),
        ({"detector": Ddim()}, ("config.detector", "type Ddim", "Detector")),
        ({"inversion": Inversion(schedule="sine")}, ("config.inversion.schedule",)),
        ({"inversion": Inversion(tags="ab")}, ("config.inversion.tags", "'ab'")),
        ({"inversion": Inversion(timesteps=[1])}, ("config.inversion.timesteps",)),
        ({"inversion": Inversion(grid=((1, 2, 3),))}, ("config.inversion.grid",)),
        ({"inversion": Inversion(mesh={"a": "b"})}, ("config.inversion.mesh",)),
    ],
)
def test_values_of_another_type_are_named(bad, parts):
    message_of(lambda: check(Experiment(**bad)), *parts)


@pytest.mark.parametrize(
    "bad, parts",
    [
        ({"first": Detector()}, ("config.first", "Detector", f"(classes: {NAMED})")),
        ({"first": Fading}, ("config.first", "Fading", "expected Hypothesis")),
        ({"first": "Fading"}, ("config.first cannot be 'Fading'", NAMED)),
        ({"all": (Fading(), 3)}, ("config.all", "expected tuple[Hypothesis, ...]")),
        ({"first": Fading("much")}, ("config.first.rate cannot be 'much'", "float")),
    ],
)
def test_values_of_another_class_are_named(bad, parts):
    message_of(lambda: check(Audit(**bad)), *parts)


def test_a_class_that_nobody_has_listed_fits_its_base():
    """Also one that needs arguments, or is no dataclass: it is made in a file."""

    @dataclasses.dataclass(frozen=True)
    class _Mine(Hypothesis):
        size: int

        def shift(self) -> float:
            return self.size

    check(Audit(first=_Mine(3), all=(_Mine(1), Fading()), none=Plain()))
    message_of(lambda: check(Audit(all=(_Mine("3"),))), "config.all.size cannot be '3'")


def test_values_that_fit_pass():
    """Protocols, functions and types that do not resolve are not judged."""
    check(Experiment())
    check(Experiment(inversion=Inversion(rate=1, limit=3, chunk=(1, 2), decay=2)))
    check(Experiment(attack=BadDiffusion(), detector=Detector()))
    check(Unresolved())


def test_a_file_with_a_value_of_another_type_is_refused(tmp_path):
    path = write(tmp_path, FILE.replace("steps=20", "steps='many'"))
    message_of(lambda: load(path), "config.steps cannot be 'many'", "int")


@pytest.mark.parametrize(
    "text, kind",
    [
        ("def f(:", SyntaxError),
        ("import no_such_module_here", ModuleNotFoundError),
        ("def get_config(): raise ValueError('two\\nlines.')", ValueError),
        ("def get_config(size): pass", TypeError),
    ],
)
def test_load_chains_an_error_in_the_file(tmp_path, text, kind):
    path = write(tmp_path, text)
    message_of(lambda: load(path), path, kind.__name__)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert type(caught.value.__cause__) is kind and isinstance(caught.value, ValueError)


# --- override: values -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, value",
    [
        *[("ema", text, True) for text in ("true", "True", "1", "yes")],
        *[("ema", text, False) for text in ("false", "FALSE", "0", "no")],
        ("steps", "50", 50),
        ("steps", "1_000", 1000),
        ("steps", "1e3", 1000),
        ("steps", "2.0", 2),
        ("steps", "9007199254740993", 2**53 + 1),
        ("quoted", "-4", -4),
        ("rate", "1e-3", 0.001),
        ("rate", "3", 3.0),
        ("rate", "inf", math.inf),
        ("name", "none", "none"),
        ("name", "", ""),
        ("name", " a=b ", " a=b "),
        ("timesteps", "1,2,3", (1, 2, 3)),
        ("timesteps", "(1, 2, 3)", (1, 2, 3)),
        ("timesteps", "(5,)", (5,)),
        ("timesteps", "5", (5,)),
        ("timesteps", "()", ()),
        ("weights", "1,0.5", (1.0, 0.5)),
        ("tags", "a,b", ("a", "b")),
        ("tags", "('a', \"b\")", ("a", "b")),
        ("tags", "'a, b','c'", ("a, b", "c")),
        ("tags", "models (v2)", ("models (v2)",)),
        ("tags", "it's", ("it's",)),
        ("limit", "none", None),
        ("limit", "None", None),
        ("limit", "7", 7),
        ("label", "none", None),
        ("label", "y", "y"),
        ("schedule", "cosine", "cosine"),
        ("order", "0", 0),
        ("mesh", "{'candidate':4}", {"candidate": 4}),
        ("mesh", "candidate:4,batch:2", {"candidate": 4, "batch": 2}),
        ("mesh", "{}", {}),
        ("chunk", "4", 4),
        ("chunk", "4,5", (4, 5)),
        ("chunk", "auto", "auto"),
        ("decay", "0.5", 0.5),
    ],
)
def test_override_reads_text_as_the_declared_type(name, text, value):
    changed = override(Experiment(), f"inversion.{name}", text)
    found = getattr(changed.inversion, name)
    assert found == value and type(found) is type(value)
    kept = dataclasses.replace(changed.inversion, **{name: getattr(Inversion(), name)})
    assert dataclasses.replace(changed, inversion=kept) == Experiment()


def test_override_of_a_fixed_tuple_and_of_the_root():
    config = override(Experiment(), "attack.trigger.shape", "(4,5)")
    assert config.attack.trigger.shape == (4, 5)
    assert override(config, "seed", "3") == dataclasses.replace(config, seed=3)
    assert Experiment().seed == 0


def test_the_current_class_of_a_union_or_protocol_decides_the_names():
    assert override(Experiment(), "attack.psi", "2").attack == VillanDiffusion(psi=2.0)
    assert override(Experiment(), "sampler.eta", "1").sampler == Ddim(1.0)
    bad = Experiment(attack=BadDiffusion())
    message_of(
        lambda: override(bad, "attack.psi", "2"),
        "config.attack has no field 'psi'",
        "names of BadDiffusion are trigger",
    )


def test_an_optional_dataclass_can_be_set_to_none():
    config = Experiment(detector=Detector())
    assert override(config, "detector.threshold", "1").detector == Detector(1.0)
    assert override(config, "detector", "none").detector is None


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("first", "NoiseShift", NoiseShift()),
        ("first", " SlowFading ", SlowFading()),
        ("first", "Fading", Fading()),
        ("all", "Fading,NoiseShift", (Fading(), NoiseShift())),
        ("all", "(SlowFading, Fading)", (SlowFading(), Fading())),
        ("all", "NoiseShift", (NoiseShift(),)),
        ("all", "()", ()),
        ("pair", "NoiseShift,4", (NoiseShift(), 4)),
        ("none", "Fading", Fading()),
        ("none", "none", None),
        ("attack", "BadDiffusion", BadDiffusion()),
        ("attack", "VillanDiffusion", VillanDiffusion()),
        ("clip", "Detector", Detector()),
        ("clip", "0.5", 0.5),
        ("clip", "none", None),
        ("text", "Detector", Detector()),
        ("text", "Detektor", "Detektor"),
        ("by_name", "a:Fading,b:NoiseShift", {"a": Fading(), "b": NoiseShift()}),
    ],
)
def test_the_name_of_a_class_sets_one_of_its_defaults(name, text, value):
    changed = override(Audit(), name, text)
    assert getattr(changed, name) == value
    assert dataclasses.replace(changed, **{name: getattr(Audit(), name)}) == Audit()


def test_fields_of_a_class_that_was_named_are_set_by_dots():
    config = override(Audit(), "none", "SlowFading")
    assert override(config, "none.rate", "0.3").none == SlowFading(0.3)
    config = override(config, "attack", "VillanDiffusion")
    assert override(config, "attack.trigger.size", "4").attack.trigger.size == 4
    assert override(Audit(clip=Detector()), "clip", "2").clip == 2.0


OWN = f"""
import dataclasses
from {__name__} import Defended, Defense

@dataclasses.dataclass(frozen=True)
class Mine(Defense):
    power: int = 2

    def inspect(self):
        return "mine"

@dataclasses.dataclass(frozen=True)
class Yours(Mine):
    pass

def get_config():
    return Defended()
"""


def test_a_class_of_the_users_file_is_named_in_a_command(tmp_path):
    argv = [PROGRAM, f"--config={write(tmp_path, OWN)}", "--config.all=Mine,Yours"]
    config, _ = from_flags([*argv, "--config.one", "Yours", "--config.one.power=3"])
    assert [type(x).__name__ for x in config.all] == ["Mine", "Yours"]
    assert to_dict(config)["one"] == {"type": "Yours", "power": 3}
    argv[-1] = "--config.all=Mine,Theirs"
    message_of(lambda: from_flags(argv), "cannot be 'Mine,Theirs'", "Mine, Yours")


def twin(module: str, size: int, base: type = Defense) -> type:
    # make_dataclass names the module of its caller, from Python 3.12 on.
    made = type(
        "Twin",
        (base,),
        {
            "__module__": module,
            "__annotations__": {"size": int},
            "size": size,
            "inspect": lambda self: module,
        },
    )
    return dataclasses.dataclass(frozen=True)(made)


def test_classes_of_one_name_go_by_their_modules_too():
    first = twin("a", 1)
    assert override(Defended(), "one", "Twin").one == first()
    again = twin("a", 2)
    assert override(Defended(), "one", "Twin").one == again(), "defined again"
    other = twin("b", 3)
    message_of(
        lambda: override(Defended(), "one", "Twin"),
        "config.one cannot be 'Twin': expected Defense | None",
        "a.Twin, b.Twin",
    )
    changed = override(Defended(), "all", "a.Twin,b.Twin")
    assert changed.all == (again(), other())
    third = twin("c", 4, Trigger)
    assert override(Defended(), "either", "c.Twin").either == third()
    assert override(Defended(), "either", "a.Twin").either == again()
    message_of(lambda: override(Defended(), "either", "Twin"), "c.Twin", "a.Twin")


# --- override: errors -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("ema", "maybe", "bool (written true or false)"),
        ("steps", "1.5", "expected int"),
        ("steps", "1e30", "expected int"),
        ("steps", "inf", "expected int"),
        ("steps", "true", "expected int"),
        ("steps", "", "expected int"),
        ("rate", "fast", "expected float"),
        ("timesteps", "1,x", "tuple[int, ...] (written A,B or ())"),
        ("timesteps", "1,,2", "tuple[int, ...]"),
        ("timesteps", "", "tuple[int, ...]"),
        ("tags", "(a,b", "tuple[str, ...]"),
        ("tags", "((a,b),c)", "tuple[str, ...]"),
        ("limit", "many", "expected int | None (written none)"),
        ("schedule", "sine", "expected one of ['linear', 'cosine']"),
        ("mesh", "candidate", "dict[str, int] (written KEY:VALUE,KEY:VALUE or {})"),
        ("mesh", "candidate:x", "dict[str, int]"),
        ("mesh", "candidate:1:2", "dict[str, int]"),
        ("decay", "slow", "float"),
    ],
)
def test_wrong_type_says_field_text_and_expected_type(name, text, expected):
    path = f"inversion.{name}"
    found = f"config.{path} cannot be {text!r}"
    message_of(lambda: override(Experiment(), path, text), found, expected)


def test_optional_is_named_with_its_way_to_be_none():
    @dataclasses.dataclass(frozen=True)
    class Old:
        size: Optional[int] = None  # noqa: UP045

    message_of(lambda: override(Old(), "size", "x"), "Optional[int] (written none)")


@pytest.mark.parametrize("text", ["1", "1,2,3", "()"])
def test_a_fixed_tuple_has_a_fixed_length(text):
    message_of(
        lambda: override(Experiment(), "attack.trigger.shape", text),
        f"config.attack.trigger.shape cannot be {text!r}",
        "tuple[int, int]",
    )


def test_a_misspelt_name_gets_the_closest_and_all_names():
    message_of(
        lambda: override(Experiment(), "inversion.stesp", "5"),
        "config.inversion has no field 'stesp'",
        "did you mean 'steps'?",
        "of Inversion are steps, name, rate",
    )
    message = message_of(
        lambda: override(Experiment(), "zzz.steps", "5"),
        "config has no field 'zzz': ",
        "of Experiment are attack, inversion, sampler, detector, seed",
    )
    assert "did you mean" not in message


@pytest.mark.parametrize("path", ["", "inversion.", "inversion..steps"])
def test_an_empty_name_is_no_field(path):
    message_of(lambda: override(Experiment(), path, "5"), "has no field ''")


def test_a_derived_field_is_no_valid_name():
    message = message_of(
        lambda: override(Experiment(), "inversion.derived", "5"), "no field 'derived'"
    )
    assert "grid" in message and ", derived" not in message


def test_a_nested_dataclass_lists_its_fields():
    message_of(
        lambda: override(Experiment(), "attack", "TrojDiff"),
        "config.attack cannot be 'TrojDiff', it is of type VillanDiffusion: expected "
        "BadDiffusion | VillanDiffusion, or set one of its fields",
        "config.attack.NAME with NAME one of trigger, psi",
    )
    message_of(
        lambda: override(Experiment(), "sampler", "none"),
        "config.sampler cannot be 'none', it is of type Ddim: set one of its fields",
        "NAME one of eta",
    )


def test_a_class_that_needs_a_value_is_given_it():
    assert override(Audit(), "learned", "Learned('a b')").learned == Learned("a b")
    message_of(
        lambda: override(Audit(), "learned", "Learned"),
        "config.learned cannot be 'Learned': Learned() raises TypeError",
        "path",
    )
    message_of(
        lambda: override(Audit(), "learned.path", "a"),
        "config.learned is None and has no field 'path'",
        "with CLASS one of Learned(path)",
    )


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("first", "Fading(0.25)", Fading(0.25)),
        ("first", " Fading( rate = 1 ) ", Fading(1)),
        ("first", "Fading()", Fading()),
        ("none", "Learned(path='x(y),z')", Learned("x(y),z")),
        ("all", "(Fading(0.1), NoiseShift)", (Fading(0.1), NoiseShift())),
        ("all", "Fading(0.1),", (Fading(0.1),)),
        ("pair", "Fading(0.1), 7", (Fading(0.1), 7)),
        ("attack", "BadDiffusion(Trigger(4))", BadDiffusion(Trigger(4))),
        (
            "attack",
            "VillanDiffusion(Trigger(shape=(1, 2)), psi=-0.5)",
            VillanDiffusion(Trigger(shape=(1, 2)), -0.5),
        ),
    ],
)
def test_a_class_with_values_is_written_as_in_python(name, text, value):
    assert getattr(override(Audit(), name, text), name) == value


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("first", "Fading(0.1, 0.2)", "Fading takes rate, each once"),
        ("first", "Fading(rat=0.1)", "Fading takes rate, each once"),
        ("first", "Fading(0.1, rate=0.1)", "Fading takes rate, each once"),
        ("first", "Fading(*[1])", "expected Hypothesis"),
        ("first", "Fading(**{})", "Fading takes rate, each once"),
        ("first", "Fading('a')", "Fading.rate cannot be 'a': expected float"),
        ("first", "Unstable(3)", "Unstable(rate=3) raises ValueError: rate must be"),
        ("first", "Fading(print(1))", "expected Hypothesis"),
        ("first", "print(1)", "expected Hypothesis"),
        ("first", "Fading(1", "expected Hypothesis"),
        ("first", "Fading(1).rate", "expected Hypothesis"),
        ("first", "Fading(__import__('os'))", "expected Hypothesis"),
        ("first", "Detector(1)", "expected Hypothesis"),
        ("attack", "BadDiffusion(Detector())", "expected"),
        ("none", "Fading(1) if 1 else 2", "expected Hypothesis"),
    ],
)
def test_a_class_with_values_that_it_does_not_take(name, text, said):
    message_of(lambda: override(Audit(), name, text), f"config.{name} cannot be", said)


def test_a_text_with_brackets_stays_a_text():
    assert override(Audit(), "text", "models/mine(1)").text == "models/mine(1)"
    assert override(Inversion(), "tags", "a(1),b").tags == ("a(1)", "b")
    assert override(Inversion(), "label", "a(1)").label == "a(1)"
    message_of(lambda: override(Audit(), "first", "Fading({[1]: 2})"), "cannot be")


def test_what_cannot_be_set_stays():
    message_of(
        lambda: override(Audit(learned=Learned("a")), "learned", "Detector"),
        "config.learned cannot be 'Detector', it is of type Learned",
    )


def test_a_dataclass_that_is_none_has_no_fields():
    message_of(
        lambda: override(Experiment(), "detector.threshold", "1"),
        "config.detector is None and has no field 'threshold'",
        "set it in a config file, or --config.detector=CLASS first, with CLASS one of "
        "Detector",
    )


@pytest.mark.parametrize(
    "name, text, expected",
    [
        (
            "first",
            "Fadin",
            f"it is of type Fading: expected Hypothesis (classes: {NAMED}), or set one "
            "of its fields, such as config.first.NAME with NAME one of rate",
        ),
        *[
            ("none", text, f"Hypothesis | None (written none; classes: {NAMED})")
            for text in (
                *("fading", "Hypothesis", "Unfinished", "_Private", "Plain"),
                *("Fading,NoiseShift", "Detector", "Call", "1", ""),
            )
        ],
        *[
            (
                "all",
                text,
                f"tuple[Hypothesis, ...] (written A,B or (); classes: {NAMED})",
            )
            for text in ("Fading,Learnt", "Fading,,NoiseShift", "(Fading", "none", "")
        ],
        ("pair", "Fading", "expected tuple[Hypothesis, int]"),
        ("by_name", "Fading", f"KEY:VALUE,KEY:VALUE or {{}}; classes: {NAMED})"),
        ("detector", "Detektor", "expected Detector | None (written none)"),
        ("clip", "much", "expected Detector | float | None (written none)"),
    ],
)
def test_the_classes_that_are_valid_are_named(name, text, expected):
    config = Experiment() if name == "detector" else Audit()
    start = f"config.{name} cannot be {text!r}"
    message = message_of(lambda: override(config, name, text), start, expected)
    assert f"{__name__}." not in message


def test_a_class_that_refuses_its_defaults_is_named():
    for name, text in (("none", "Unstable"), ("all", "Fading,Unstable")):
        message_of(
            lambda name=name, text=text: override(Audit(), name, text),
            f"config.{name} cannot be {text!r}: Unstable() raises ValueError: rate "
            "must be at most 1, not 2.0",
        )


def test_a_function_that_returns_a_class_is_no_class():
    message = message_of(
        lambda: override(Audit(), "steps", "Fading"), "set it in a config file"
    )
    assert "classes" not in message


def test_a_path_beyond_a_scalar():
    message_of(
        lambda: override(Experiment(), "seed.x", "1"),
        "config.seed is of type int and has no field 'x'",
        "set config.seed itself",
    )


def test_a_function_is_set_in_a_file():
    message_of(
        lambda: override(Experiment(), "inversion.optimiser", "sgd"),
        "config.inversion.optimiser cannot be 'sgd', it is a function",
        "set it in a config file",
        "Callable[[], Any]",
    )


def test_a_nested_tuple_is_set_in_a_file():
    message_of(
        lambda: override(Experiment(), "inversion.grid", "1,2"),
        "config.inversion.grid cannot be '1,2', it is of type tuple",
        "tuple[tuple[int, int], ...]",
    )


def test_a_type_that_does_not_resolve():
    message_of(
        lambda: override(Unresolved(), "price", "1"),
        "config.price cannot be '1', set it in a config file",
        "types of Unresolved",
        "'Decimal' is not defined",
    )


def test_post_init_errors_name_the_field():
    message_of(
        lambda: override(Experiment(), "inversion.steps", "0"),
        "config.inversion.steps cannot be '0'",
        "Inversion raises ValueError: steps must be positive, not 0",
    )


def test_post_init_of_an_outer_dataclass_names_the_inner_field():
    @dataclasses.dataclass(frozen=True)
    class Outer:
        detector: Any = Detector()

        def __post_init__(self):
            if self.detector.threshold > 1:
                raise ValueError("threshold is above 1")

    message_of(
        lambda: override(Outer(), "detector.threshold", "2"),
        "config.detector.threshold cannot be '2'",
        "Outer raises ValueError: threshold is above 1",
    )


# --- from_flags -----------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    return write(tmp_path, FILE)


def test_flags_with_equals_signs_or_spaces(path):
    for argv in (
        [f"--config={path}", "--config.steps=5", "--config.trigger.size=11"],
        ["--config.steps", "5", "--config", path, "--config.trigger.size", "11"],
        ["-config", path, "-config.steps=5", "-config.trigger.size", "11"],
    ):
        config, remaining = from_flags([PROGRAM, *argv])
        assert (config.steps, config.trigger.size, remaining) == (5, 11, [PROGRAM])


def test_flags_apply_in_order_and_keep_later_equals_signs(path):
    argv = [PROGRAM, f"--config={path}", "--config.steps=5", "--config.steps=6"]
    assert from_flags(argv)[0].steps == 6
    argv[-1] = "--config.steps=a=b"
    message_of(lambda: from_flags(argv), "config.steps cannot be 'a=b'")


def test_a_negative_value_after_a_space(path):
    config, _ = from_flags([PROGRAM, "--config", path, "--config.steps", "-5"])
    assert config.steps == -5


def test_flags_of_absl_are_left_alone(path):
    app.define_help_flags()
    absl = ["--verbosity=1", "--verbosity", "1", "-v", "0", "--nologtostderr", "--help"]
    before = flags.FLAGS["verbosity"].value
    argv = [PROGRAM, *absl[:3], "--config", path, "--config.ema", "yes", *absl[3:]]
    config, remaining = from_flags(argv)
    assert config.ema and remaining == [PROGRAM, *absl]
    assert flags.FLAGS["verbosity"].value == before


def test_what_absl_leaves_is_what_from_flags_takes(path):
    values = flags.FlagValues()
    flags.DEFINE_integer("level", 0, "", flag_values=values)
    argv = [PROGRAM, "--config", path, "--level", "2", "--config.steps", "-5"]
    config, remaining = from_flags(values(argv, known_only=True))
    assert (config.steps, remaining, values.level) == (-5, [PROGRAM], 2)


@pytest.mark.parametrize(
    "argument",
    ["stray", "--steps=5", "--confg=x.py", "--configs.steps=5", "--", "--noverbosity"],
)
def test_unknown_arguments_list_the_valid_forms(path, argument):
    message_of(
        lambda: from_flags([PROGRAM, f"--config={path}", argument]),
        f"unknown argument {argument!r}",
        "--config=FILE.py, --config.NAME=VALUE and absl's flags, such as --verbosity=1",
    )


@pytest.mark.parametrize("argv", [[PROGRAM], [PROGRAM, "--config.steps=5"], []])
def test_a_missing_config_gets_an_example(argv):
    message_of(
        lambda: from_flags(argv),
        "0 config files are given (none)",
        "--config=configs/quickstart.py",
    )


def test_two_configs_are_too_many(path):
    message_of(
        lambda: from_flags([PROGRAM, f"--config={path}", "--config=b.py"]),
        f"2 config files are given ({path}, b.py)",
    )


@pytest.mark.parametrize("tail", [[], ["--config=x.py"]])
@pytest.mark.parametrize("name", ["--config", "--config.steps"])
def test_a_flag_without_value(name, tail):
    message_of(
        lambda: from_flags([PROGRAM, name, *tail]),
        f"{name} has no value: write {name}=VALUE",
    )


# --- to_dict --------------------------------------------------------------------------


def test_round_trip_of_an_overridden_config():
    config = Experiment()
    for dotted, text in (
        ("inversion.steps", "50"),
        ("inversion.timesteps", "3,4"),
        ("inversion.mesh", "candidate:4"),
        ("attack.psi", "inf"),
    ):
        config = override(config, dotted, text)
    found = to_dict(config)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["attack"] == {
        "type": "VillanDiffusion",
        "trigger": {"type": "Trigger", "size": 9, "shape": [3, 3]},
        "psi": "inf",
    }
    assert list(found) == ["type", "attack", "inversion", "sampler", "detector", "seed"]
    assert found["detector"] is None
    inversion = found["inversion"]
    assert (inversion["steps"], inversion["timesteps"]) == (50, [3, 4])
    assert inversion["mesh"] == {"candidate": 4} and inversion["grid"] == [[1, 2]]
    assert inversion["optimiser"] == f"{__name__}.adam" and inversion["ema"] is False


@dataclasses.dataclass(frozen=True)
class Holder:
    value: Any


class Call:
    def __call__(self):
        return None


@pytest.mark.parametrize(
    "value, plain",
    [
        (-math.inf, "-inf"),
        (math.nan, "nan"),
        (Trigger, f"{__name__}.Trigger"),
        (Call(), f"{__name__}.Call"),
        (
            functools.partial(typing.cast(Any, adam), 0.1, adam, b=(1, 2)),
            f"{__name__}.adam(0.1, '{__name__}.adam', b=[1, 2])",
        ),
        ((Detector(),), [{"type": "Detector", "threshold": 0.5}]),
    ],
)
def test_to_dict_of_special_values(value, plain):
    assert to_dict(Holder(value)) == {"type": "Holder", "value": plain}


def test_to_dict_rejects_what_is_no_config_value():
    message_of(
        lambda: to_dict(Holder(Holder({1}))),
        "config.value.value is of type set",
        "dataclasses, scalars, tuples, dicts, functions and None",
    )
