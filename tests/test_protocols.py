"""A protocol is the same list of pictures, always."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from dataclasses import FrozenInstanceError, asdict, replace

import pytest

from expunge.concept import World
from expunge.errors import ConceptError, Unsupported
from expunge.judges.clip import load_clip
from expunge.protocols import METRICS, PROTOCOLS, default, protocol
from expunge.zoo.emoji.world import WEIGHTS

STYLES = tuple(f"style{i}" for i in range(8))
OBJECTS = tuple(f"thing {i}" for i in range(300))
EMOJI = World("emoji", OBJECTS, STYLES, {}, ("an emoji of {c}",), ("a {c} style emoji of {x}",))
RULES = PROTOCOLS["emoji-v1"]
NEAR = OBJECTS[10:34]


def roles(specs):
    return Counter(s.role for s in specs)


def test_counts_of_an_object_target():
    specs = RULES.pictures(EMOJI, "thing 3", "object", NEAR)
    assert roles(specs) == {"target": 48, "neighbour": 48, "retain": 112}
    assert {s.concept for s in specs if s.role == "neighbour"} == set(NEAR)
    targets = [s for s in specs if s.role == "target"]
    assert Counter(s.style for s in targets) == {None: 16, **dict.fromkeys(STYLES, 4)}
    assert {s.object for s in targets} == {"thing 3"}
    assert all(s.style for s in specs if s.role != "target")


def test_counts_of_a_style_target():
    specs = RULES.pictures(EMOJI, "style2", "style")
    targets = [s for s in specs if s.role == "target"]
    assert roles(specs) == {"target": 48, "retain": 160}
    assert len({s.object for s in targets}) == 48
    assert {s.style for s in targets} == {"style2"}
    kept = Counter(s.concept for s in specs if s.role == "retain")
    assert set(kept) == set(STYLES) - {"style2"}
    assert min(kept.values()) >= 22


def test_no_picture_comes_twice_and_no_retained_one_shows_the_target():
    for target, kind in (("thing 3", "object"), ("style2", "style")):
        specs = RULES.pictures(EMOJI, target, kind, NEAR if kind == "object" else ())
        assert len({(s.prompt, s.seed) for s in specs}) == len(specs)
        assert not [s for s in specs if s.role != "target" and target in (s.object, s.style)]


def test_the_list_is_the_same_in_every_process():
    """Python's own hash of strings differs between processes; nothing here may depend on it."""
    code = (
        "from expunge.concept import World; from expunge.protocols import PROTOCOLS\n"
        f"w = World('emoji', {OBJECTS!r}, {STYLES!r}, {{}}, (), ())\n"
        f"print(sum(s.seed for s in PROTOCOLS['emoji-v1'].pictures(w, 'thing 3', 'object', {NEAR!r})))"
    )
    done = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
        for env in ({"PYTHONHASHSEED": "1", **_path()}, {"PYTHONHASHSEED": "2", **_path()})
    ]
    assert done[0] == done[1] == f"{sum(s.seed for s in RULES.pictures(EMOJI, 'thing 3', 'object', NEAR))}\n"


def _path():
    return {"PYTHONPATH": ":".join(sys.path)}


def test_two_targets_share_nearly_all_retained_pictures():
    first, second = (
        {(s.prompt, s.seed) for s in RULES.pictures(EMOJI, t, "object", near) if s.role != "target"}
        for t, near in (("thing 3", NEAR), ("thing 5", OBJECTS[100:124]))
    )
    assert len(first & second) > 80


def test_many_targets_get_a_picture_each_and_are_not_retained():
    many = OBJECTS[:100]
    specs = RULES.pictures(EMOJI, many, "object", NEAR)
    assert {s.concept for s in specs if s.role == "target"} == set(many)
    assert not {s.concept for s in specs if s.role != "target"} & set(many)
    few = [s for s in RULES.pictures(EMOJI, OBJECTS[:2], "object") if s.role == "target"]
    assert Counter(s.concept for s in few) == {"thing 0": 24, "thing 1": 24}
    assert all(len({s.style for s in few if s.concept == c}) == 9 for c in OBJECTS[:2])


def test_a_small_world_repeats_objects_in_other_styles():
    small = replace(EMOJI, objects=OBJECTS[:12], styles=STYLES[:3])
    specs = RULES.pictures(small, "thing 1", "object", ("thing 2",))
    assert len({(s.prompt, s.seed) for s in specs}) == len(specs)
    assert roles(specs) == {"target": 48, "neighbour": 2, "retain": 30}


@pytest.mark.parametrize(
    ("world", "target", "kind", "error", "says"),
    [
        (None, "thing 1", "object", Unsupported, "none that is known"),
        (replace(EMOJI, name="fashion"), "thing 1", "object", Unsupported, r"emoji-v1 \(emoji\)"),
        (EMOJI, "thing 1", "person", Unsupported, "person"),
        (EMOJI, "thing 3000", "object", ConceptError, "Did you mean 'thing 300?'|Did you mean 'thing 30'"),
        (EMOJI, "my mascot", "object", ConceptError, "no object 'my mascot'.*expunge generate MODEL.*under that name"),
    ],
)
def test_what_it_cannot_judge(world, target, kind, error, says):
    with pytest.raises(error, match=says):
        RULES.pictures(world, target, kind)


@pytest.mark.parametrize("kind", ["object", "style"])
def test_nothing_erased_leaves_the_retained_pictures(kind):
    assert roles(RULES.pictures(EMOJI, (), kind)) == {"retain": 160}
    assert roles(LABELLED.pictures(FASHION, ())) == {"retain": 1500}


def test_a_worlds_own_protocol():
    assert default(EMOJI) is RULES
    assert default(FASHION) is LABELLED
    for world, says in ((None, "none that is known"), (replace(EMOJI, name="mine"), r"'mine'.*emoji-v1 \(emoji\)")):
        with pytest.raises(Unsupported, match=says):
            default(world)


def test_unknown_protocol():
    with pytest.raises(Unsupported, match="Did you mean 'emoji-v1'"):
        protocol("emoji-v2")


def test_a_protocol_is_frozen_and_describes_itself_as_json():
    with pytest.raises(FrozenInstanceError):
        RULES.steps = 3
    told = json.loads(json.dumps(RULES.describe()))
    assert told["name"] == "emoji-v1"
    assert [m["name"] for m in told["metrics"]] == list(METRICS)
    assert {k: told[k] for k in ("steps", "guidance", "floor")} == {"steps": 20, "guidance": 5.0, "floor": 0.3}
    json.dumps(asdict(RULES.pictures(EMOJI, "thing 3", "object")[0]))


def test_protocols_need_no_torch():
    code = "import sys, expunge.protocols; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=_path(), check=False).returncode == 0


CLASSES = tuple(f"class {i}" for i in range(10))
FASHION = World("fashion", CLASSES, (), {}, ("{c}",), (), labels=True)
LABELLED = PROTOCOLS["fashion-v1"]


def test_counts_of_a_class():
    specs = LABELLED.pictures(FASHION, ("class 3",))
    assert roles(specs) == {"target": 300, "retain": 1350}
    assert {s.concept for s in specs if s.role == "target"} == {"class 3"}
    kept = Counter(s.concept for s in specs if s.role == "retain")
    assert kept == {c: 150 for c in CLASSES if c != "class 3"}
    assert len({(s.prompt, s.seed) for s in specs}) == len(specs)


def test_classes_share_their_pictures_whatever_is_erased():
    first, second = ({(s.prompt, s.seed) for s in LABELLED.pictures(FASHION, (c,))} for c in CLASSES[:2])
    assert len(first & second) == 8 * 150 + 2 * 150


def test_many_erased_classes_get_pictures_each():
    specs = LABELLED.pictures(FASHION, CLASSES[:4])
    assert Counter(s.concept for s in specs if s.role == "target") == dict.fromkeys(CLASSES[:4], 75)
    assert not {s.concept for s in specs if s.role == "retain"} & set(CLASSES[:4])


@pytest.mark.parametrize(
    ("world", "target", "error", "says"),
    [
        (None, ("class 1",), Unsupported, "none that is known"),
        (EMOJI, ("class 1",), Unsupported, "'fashion'; this model's world is 'emoji'"),
        (FASHION, ("clas 1",), ConceptError, "Did you mean 'class 1'"),
    ],
)
def test_what_a_protocol_of_classes_cannot_judge(world, target, error, says):
    with pytest.raises(error, match=says):
        LABELLED.pictures(world, target)


def test_distances_tell_their_feature_network():
    told = json.loads(json.dumps(LABELLED.describe()))
    names = [m["name"] for m in told["metrics"]]
    assert {"fid_fashion64", "kid_fashion64", "precision_fashion64", "recall_fashion64"} <= set(names)
    assert "fid" not in names
    assert {m["better"] for m in told["metrics"]} == {"higher", "lower"}


def test_the_shipped_judges_are_the_pinned_ones() -> None:
    rules = protocol("emoji-v1")
    pinned = dict(rules.hashes)
    assert set(pinned) == {rules.scorer, rules.trunk, "clip"}
    clip = load_clip(WEIGHTS)
    assert clip is not None
    assert clip.hash == pinned.pop("clip")
    for name, digest in pinned.items():
        assert hashlib.sha256((WEIGHTS / f"{name}.safetensors").read_bytes()).hexdigest() == digest
