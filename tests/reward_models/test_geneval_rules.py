"""GenEval's rules: truth tables of each, and all of them against a second implementation on random objects."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from diffalign.reward_models.geneval_prompts import (
    COLORS,
    OBJECT_NAMES,
    RELATIONS,
    TAGS,
    Wanted,
    by_prompt,
    read_metadata,
    read_names,
)
from diffalign.reward_models.geneval_rules import (
    Rules,
    dense_score,
    judge,
    keep_objects,
    overlap,
    relations,
)
from tests.reward_models.geneval_files import box, geneval_data

RULES = Rules()
NAMES = ("cat", "dog", "cow")


def wanted(*include, tag="two_object", exclude=()):
    return Wanted.from_dict({"tag": tag, "prompt": "p", "include": list(include), "exclude": list(exclude)})


def three_cats():
    return wanted({"class": "cat", "count": 3}, tag="counting", exclude=[{"class": "cat", "count": 4}])


def no_colors(name, found):
    raise AssertionError(f"asked for the colours of {len(found)} {name}")


def cats(number):
    return {"cat": [box(0, 0.99 - k / 100) for k in range(number)]} if number else {}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 0, 10, 10), (20, 0, 30, 10), {"left of"}),
        ((0, 0, 10, 10), (20, 20, 30, 30), {"left of", "above"}),
        ((0, 0, 10, 10), (1, 0, 11, 10), set()),
        ((0, 0, 40, 40), (30, 30, 70, 70), {"left of", "above"}),
        ((0, 0, 40, 40), (25, 25, 65, 65), set()),
        ((0, 0, 100, 20), (40, 60, 60, 160), {"above"}),
        ((5, 5, 9, 9), (5, 5, 9, 9), set()),
    ],
)
def test_relations_are_the_golden_ones_and_turn_with_the_boxes(first, second, expected):
    opposite = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
    assert relations(first, second) == expected
    assert relations(second, first) == {opposite[r] for r in expected}


def test_without_the_margin_smaller_shifts_are_relations():
    assert relations((0, 0, 10, 10), (1, 0, 11, 10), margin=0.0) == {"left of"}


@pytest.mark.parametrize(("tag", "least"), [("two_object", 0.3), ("colors", 0.3), ("counting", 0.9)])
def test_a_score_must_exceed_the_tasks_threshold(tag, least):
    above = math.nextafter(least, 1) + 1e-6
    assert keep_objects([box(0, least)], NAMES, tag, RULES) == {}
    assert len(keep_objects([box(0, above)], NAMES, tag, RULES)["cat"]) == 1
    single = torch.tensor(least, dtype=torch.float32).item()  # what a detector in single precision calls 0.3
    assert keep_objects([box(0, single)], NAMES, tag, RULES) == {}


def test_at_most_sixteen_of_a_class_count_and_the_surest_come_first():
    found = [box(0, 0.5 + k / 100) for k in range(17)] + [box(1, 0.4)]
    objects = keep_objects(found, NAMES, "two_object", RULES)
    assert [round(d.score, 2) for d in objects["cat"]] == [round(0.66 - k / 100, 2) for k in range(16)]
    assert list(objects) == ["cat", "dog"]  # classes without objects are left out
    assert len(keep_objects(found, NAMES, "two_object", Rules(max_objects=3))["cat"]) == 3


def test_overlapping_boxes_both_count_unless_a_limit_is_set():
    found = [box(0, 0.8, (0, 0, 9, 9)), box(0, 0.9, (0, 0, 9, 4)), box(1, 0.7, (0, 0, 9, 9))]
    assert overlap(found[0].box, found[1].box) == 0.5  # 100 and 50 pixels: corners belong to their boxes
    assert overlap((0, 0, 9, 9), (0, 0, 4, 4)) == 0.25
    assert overlap((0, 0, 4, 4), (9, 9, 12, 12)) == 0

    def kept(limit):
        objects = keep_objects(found, NAMES, "two_object", Rules(max_overlap=limit))
        return [d.score for d in objects["cat"]], len(objects["dog"])

    assert kept(1.0) == ([0.9, 0.8], 1)
    assert kept(0.51) == ([0.9, 0.8], 1)
    assert kept(0.5) == ([0.9], 1)  # reaching it is enough; another class has nothing to do with it


@pytest.mark.parametrize(
    ("number", "official", "strict"),
    [
        (0, "expected cat>=3, found 0", "expected cat==3, found 0"),
        (2, "expected cat>=3, found 2", "expected cat==3, found 2"),
        (3, None, None),
        (4, "expected cat<4, found 4", "expected cat==3, found 4\nexpected cat<4, found 4"),
    ],
)
def test_counting(number, official, strict):
    for mode, reason in (("official", official), ("strict", strict)):
        verdict = judge(three_cats(), cats(number), no_colors, RULES, mode)
        assert (verdict.correct, "\n".join(verdict.reasons)) == (reason is None, reason or "")


def test_further_objects_hurt_the_strict_verdict_only():
    one = wanted({"class": "cat", "count": 1}, tag="single_object")
    assert judge(one, cats(5), no_colors, RULES).correct
    assert not judge(one, cats(5), no_colors, RULES, "strict").correct
    others = cats(1) | {"dog": [box(1, 0.9)]}
    assert judge(one, others, no_colors, RULES, "strict").correct  # of other classes nothing is said


def test_one_thing_may_serve_as_two_classes():
    both = wanted({"class": "cat", "count": 1}, {"class": "dog", "count": 1})
    same = (3.0, 3.0, 9.0, 9.0)
    objects = {"cat": [box(0, 0.8, same)], "dog": [box(1, 0.4, same)]}
    assert judge(both, objects, no_colors, RULES, "strict").correct
    assert not judge(both, {"cat": objects["cat"]}, no_colors, RULES).correct


def test_only_the_surest_objects_are_asked_for_their_colour():
    red_cat = wanted({"class": "cat", "count": 1, "color": "red"}, tag="colors")
    asked = []

    def name_colors(name, found):
        asked.append((name, [round(d.score, 2) for d in found]))
        return ["red" if d.score > 0.98 else "blue" for d in found]

    assert judge(red_cat, cats(3), name_colors, RULES).correct
    assert asked == [("cat", [0.99])]
    late = {"cat": [box(0, 0.95), box(0, 0.5)]}
    assert judge(red_cat, late, lambda _, found: ["blue", "red"][: len(found)], RULES).reasons == (
        "expected red cat>=1, found 0 red; and 1 blue",
    )


def test_all_objects_of_a_clause_need_its_colour():
    two = wanted({"class": "cat", "count": 2, "color": "red"})
    verdict = judge(two, cats(2), lambda *_: ["red", "pink"], RULES)
    assert verdict.reasons == ("expected red cat>=2, found 1 red; and 1 red, 1 pink",)
    assert judge(two, cats(2), lambda *_: ["red", "red"], RULES).correct


def test_a_clause_that_fails_does_not_stop_the_next():
    both = wanted(
        {"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}, tag="color_attr"
    )
    verdict = judge(both, {"dog": [box(1, 0.9)]}, lambda *_: ["green"], RULES)
    assert verdict.reasons == ("expected cat>=1, found 0", "expected blue dog>=1, found 0 blue; and 1 green")


def left_of():
    return wanted({"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]})


@pytest.mark.parametrize(
    ("objects", "reasons"),
    [
        ({"cat": (50, 0, 60, 10), "dog": (0, 0, 10, 10)}, ()),
        ({"cat": (0, 0, 10, 10), "dog": (50, 0, 60, 10)}, ("expected dog left of target, found right of target",)),
        (
            {"cat": (0, 0, 10, 10), "dog": (0, 0, 10, 10)},
            ("expected dog left of target, found no relation to the target",),
        ),
        ({"dog": (0, 0, 10, 10)}, ("expected cat>=1, found 0", "no target for dog to be left of")),
        ({"cat": (0, 0, 10, 10)}, ("expected dog>=1, found 0",)),
        ({}, ("expected cat>=1, found 0", "expected dog>=1, found 0")),
    ],
)
def test_positions(objects, reasons):
    found = {name: [box(NAMES.index(name), 0.9, corners)] for name, corners in objects.items()}
    verdict = judge(left_of(), found, no_colors, RULES)
    assert (verdict.correct, verdict.reasons) == (not reasons, reasons)


def test_every_object_must_have_the_relation_to_every_target():
    pairs = wanted({"class": "cat", "count": 2}, {"class": "dog", "count": 2, "position": ["above", 0]})
    low, high, lower = (0, 50, 10, 60), (0, 0, 10, 10), (0, 99, 10, 109)
    dogs = {"dog": [box(1, 0.9, high), box(1, 0.8, high)]}
    assert judge(pairs, dogs | {"cat": [box(0, 0.9, low), box(0, 0.8, lower)]}, no_colors, RULES).correct
    assert not judge(pairs, dogs | {"cat": [box(0, 0.9, low), box(0, 0.8, high)]}, no_colors, RULES).correct


@pytest.mark.parametrize(("number", "expected"), [(0, 0.0), (1, 1 / 3), (3, 1.0), (4, 2 / 3), (9, -1.0)])
def test_dense_counting_is_linear_and_can_be_negative(number, expected):
    assert dense_score(three_cats(), cats(number), no_colors, RULES) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("number", "colors", "expected"),
    [
        (2, ["red", "red"], (1 + 1) / 2),
        (2, ["red", "blue"], (1 + 0.5) / 2),
        (2, ["blue", "blue"], (1 + 0) / 2),
        (1, None, (0.5 + 0) / 2),  # a wrong number: colours are not looked at, and count 0
        (3, None, (0.5 + 0) / 2),
    ],
)
def test_dense_colours(number, colors, expected):
    two = wanted({"class": "cat", "count": 2, "color": "red"})
    found = dense_score(two, cats(number), no_colors if colors is None else lambda *_: colors, RULES)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("objects", "expected", "released"),
    [
        ({"cat": (50, 0, 60, 10), "dog": (0, 0, 10, 10)}, 3 / 3, 3 / 3),
        ({"cat": (0, 0, 10, 10), "dog": (50, 0, 60, 10)}, 2 / 3, 3 / 4),  # the released 1 after the 0
        ({"dog": (0, 0, 10, 10)}, 1 / 3, 1 / 3),  # nothing to be left of: a single 0 in both
        ({"cat": (0, 0, 10, 10)}, 1 / 3, 1 / 3),
    ],
)
def test_dense_positions_with_and_without_the_released_quirk(objects, expected, released):
    found = {name: [box(NAMES.index(name), 0.9, corners)] for name, corners in objects.items()}
    assert dense_score(left_of(), found, no_colors, RULES) == pytest.approx(expected)
    assert dense_score(left_of(), found, no_colors, RULES, released_position=True) == pytest.approx(released)


def test_dense_without_clauses_is_zero():
    assert dense_score(wanted(), cats(2), no_colors, RULES) == 0.0


def second_opinion(row, objects, colors, strict):
    """The verdict once more, from the description: sets of facts instead of a walk with early ends."""
    groups, right = [], True
    for clause in row["include"]:
        everything = objects.get(clause["class"], [])
        chosen = everything[: clause["count"]]
        holds = len(everything) == clause["count"] if strict else len(everything) >= clause["count"]
        if "color" in clause:
            holds = holds and all(colors[id(d)] == clause["color"] for d in chosen)
        if "position" in clause:
            relation, target = clause["position"]
            sign, axis = (-1 if relation in ("left of", "above") else 1), int(relation in ("above", "below"))
            holds = holds and groups[target] is not None
            for a in chosen if holds else []:
                for b in groups[target]:
                    off = [(a.box[k] + a.box[k + 2] - b.box[k] - b.box[k + 2]) / 2 for k in (0, 1)]
                    cut = 0.1 * (a.box[axis + 2] - a.box[axis] + b.box[axis + 2] - b.box[axis])
                    holds = holds and off[axis] * sign - cut > 0.5 * math.hypot(*off)
        groups.append(chosen if holds else None)
        right = right and holds
    return right and all(len(objects.get(c["class"], [])) < c["count"] for c in row.get("exclude", []))


def test_both_verdicts_equal_a_second_implementation_on_random_objects():
    draw = random.Random(0)
    rights = {"official": 0, "strict": 0}
    for _ in range(1500):
        include = []
        for number in range(draw.randint(1, 2)):
            clause = {"class": NAMES[number], "count": draw.randint(1, 2)}
            if draw.random() < 0.3:
                clause["color"] = draw.choice(COLORS[:2])
            if number and draw.random() < 0.5:
                clause["position"] = [draw.choice(RELATIONS), 0]
            include.append(clause)
        row = {"tag": "position", "prompt": "p", "include": include}
        if draw.random() < 0.3:
            row["exclude"] = [{"class": "cat", "count": draw.randint(2, 3)}]
        objects = {}
        for label, name in enumerate(NAMES[:2]):
            places = [(draw.randint(0, 60), draw.randint(0, 60)) for _ in range(draw.randint(0, 3))]
            found = [box(label, 0.9 - k / 10, (x, y, x + 20, y + 15)) for k, (x, y) in enumerate(places)]
            objects |= {name: found} if found else {}
        colors = {id(d): draw.choice(COLORS[:2]) for found in objects.values() for d in found}
        parsed = Wanted.from_dict(row)
        for mode in rights:
            verdict = judge(parsed, objects, lambda _, found, c=colors: [c[id(d)] for d in found], RULES, mode)
            assert verdict.correct == second_opinion(row, objects, colors, mode == "strict"), (row, objects, mode)
            assert verdict.correct == (not verdict.reasons)
            rights[mode] += verdict.correct
    assert 100 < rights["strict"] < rights["official"] < 1400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"include": None}, "include must be a list of clauses"),
        ({"include": [{"class": "cat"}]}, "needs a class and a count of at least 1"),
        ({"include": [{"class": "cat", "count": 0}]}, "needs a class and a count of at least 1"),
        ({"include": [{"class": "cat", "count": True}]}, "needs a class and a count of at least 1"),
        ({"include": [{"class": "cat", "count": 1, "color": "grey"}]}, "unknown colour 'grey'"),
        ({"include": [{"class": "cat", "count": 1, "position": ["left of", 0]}]}, "number of an earlier clause"),
        ({"include": [{"class": "cat", "count": 1, "position": ["near", 0]}]}, "number of an earlier clause"),
        ({"prompt": 3}, "tag and prompt must be texts"),
    ],
)
def test_malformed_rows_are_refused(change, message):
    row = {"tag": "colors", "prompt": "p", "include": [{"class": "cat", "count": 1}]} | change
    with pytest.raises(ValueError, match=message):
        Wanted.from_dict(row)
    with pytest.raises(ValueError, match="found no tag, prompt"):
        Wanted.from_dict({"include": []})


@pytest.mark.parametrize(
    "options", [{"threshold": 1.5}, {"max_overlap": -0.1}, {"max_objects": 0}, {"position_threshold": -1}]
)
def test_impossible_rules_are_refused(options):
    with pytest.raises(ValueError, match="must lie in|expected max_objects"):
        Rules(**options)


def test_metadata_files_name_the_line_that_is_wrong(tmp_path):
    good = {"tag": "colors", "prompt": "p", "include": [{"class": "cat", "count": 1}]}
    file = tmp_path / "metadata.jsonl"
    for second, message in [
        ("no json", r"metadata.jsonl, line 3: Expecting value"),
        ("[1]", r"line 3: expected a JSON object"),
        (json.dumps(good | {"include": [{"class": "zebu", "count": 1}]}), r"line 3: .* no class 'zebu'"),
    ]:
        file.write_text(f"{json.dumps(good)}\n\n{second}\n")
        with pytest.raises(ValueError, match=message):
            read_metadata(file, NAMES)
    file.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        read_metadata(file)
    with pytest.raises(ValueError, match="there is no file"):
        read_metadata(tmp_path / "other.jsonl")
    rows = [Wanted.from_dict(good), Wanted.from_dict(good | {"tag": "counting"})]
    assert by_prompt(rows[:1] * 2) == {"p": rows[0]}
    with pytest.raises(ValueError, match="ask for different things"):
        by_prompt(rows)


def test_the_published_metadata_is_read_completely():
    folder = geneval_data()
    names = read_names(folder)
    assert (len(names), names[0], names[64], names[79]) == (80, "person", "computer mouse", "toothbrush")
    rows = read_metadata(names=names, folder=folder)
    lines = [json.loads(line) for line in (folder / "evaluation_metadata.jsonl").read_text().splitlines()]
    assert [json.dumps(row.to_dict()) for row in rows] == [json.dumps(line) for line in lines]
    counts = {tag: sum(row.tag == tag for row in rows) for tag in TAGS}
    assert counts == dict(zip(TAGS, (80, 99, 80, 94, 100, 100), strict=True))
    assert len(by_prompt(rows)) == 553
    assert len(read_metadata(folder / "test_metadata.jsonl", names)) == 2212
    assert OBJECT_NAMES.sha256.startswith("608f6a0e")
