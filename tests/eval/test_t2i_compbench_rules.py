"""T2I-CompBench's rules and words: truth tables of positions, counts, the 3-in-1, and what is read out of prompts."""

from __future__ import annotations

import re

import pytest

from diffalign.eval.t2i_compbench_prompts import detector_name, read_kinds, read_lines, read_vocabulary
from diffalign.eval.t2i_compbench_rules import (
    attribute_score,
    count_score,
    merge_objects,
    position_score,
    spatial_score,
    three_in_one,
)
from diffalign.eval.t2i_compbench_words import Rules, Spacy, clean_question, counts, locality, singular_names
from tests.reward_models.judge_files import data_folder

LEFT, RIGHT = (0, 0, 100, 100), (300, 0, 400, 100)
HIGH, LOW = (0, 0, 100, 100), (0, 300, 100, 400)
OVER = (200 / 3, 0, 500 / 3, 100)
"""Overlaps LEFT by a third of its width: IoU (1/3) / (5/3) = 0.2."""


@pytest.fixture(scope="module")
def data():
    return data_folder("t2i_compbench", "color_val.txt", "complex_val.txt", "new_objects.txt")


def test_golden_spatial_scores():
    # A left of B, IoU 0.2, further apart in x than in y: 0.5. With scores .8 and .6: 0.2 + 0.15 + 0.25.
    assert position_score("on the left of", LEFT, OVER) == pytest.approx(0.5)
    found = [("cat", 0.8, LEFT), ("dog", 0.6, OVER)]
    assert spatial_score("on the left of", ("cat", "dog"), found) == pytest.approx(0.60)
    assert spatial_score("on the right of", ("cat", "dog"), found) == 0.0  # 0.35 is below 0.5


@pytest.mark.parametrize(
    ("relation", "first", "second", "score"),
    [
        ("on the left of", LEFT, RIGHT, 1), ("on the left of", RIGHT, LEFT, 0), ("on the left of", HIGH, LOW, 0),
        ("on the right of", RIGHT, LEFT, 1), ("on the right of", LEFT, RIGHT, 0), ("on the right of", LOW, HIGH, 0),
        ("on the top of", HIGH, LOW, 1), ("on the top of", LOW, HIGH, 0), ("on the top of", LEFT, RIGHT, 0),
        ("on the bottom of", LOW, HIGH, 1), ("on the bottom of", HIGH, LOW, 0),
        ("on the right of", OVER, LEFT, 0.5),
        ("on the left of", LEFT, LEFT, 0),  # no distance at all
        ("on the left of", (0, 0, 10, 10), (50, 50, 60, 60), 0),  # as far in y as in x
        ("near", LEFT, (149, 500, 249, 600), 1),  # close along one axis
        ("near", LEFT, (150, 150, 250, 250), 1),  # 150 / 150
        ("next to", LEFT, (300, 200, 400, 300), 0.5),
        ("on side of", LEFT, (600, 200, 700, 300), 0.25),
        ("on top of", HIGH, LOW, 0),  # is looked for, and has no rule
        (None, LEFT, RIGHT, 0),
    ],
)  # fmt: skip
def test_positions(relation, first, second, score):
    assert position_score(relation, first, second) == pytest.approx(score)


@pytest.mark.parametrize(
    ("objects", "found", "score"),
    [
        (("cat", "dog"), [], 0),
        (("cat", "dog"), [("cat", 1.0, LEFT)], 0),  # a quarter at most
        (("cat", "dog"), [("cat", 0.9, LEFT), ("dog", 0.7, RIGHT)], 0.225 + 0.175 + 0.5),
        (("cat", "dog"), [("cat", 0.9, LEFT), ("cat", 0.8, RIGHT), ("dog", 0.7, RIGHT)], 0.9),  # the first cat
        (("girl", "boy"), [("person", 0.9, LEFT)], 0),  # both are the same person
        (("woman", "dog"), [("person", 1.0, LEFT), ("dog", 1.0, RIGHT)], 1.0),
        (None, [("cat", 1.0, LEFT)], 0),
    ],
)
def test_spatial_scores(objects, found, score):
    assert spatial_score("on the left of", objects, found) == pytest.approx(score)


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ((0, 0, 100, 100), 1), ((0, 0, 100, 95), 1), ((40, 40, 50, 50), 1),  # equal, nearly so, inside
        ((0, 0, 100, 200), 1),  # covers it
        ((30, 0, 130, 100), 2), ((500, 500, 600, 600), 2),
    ],
)  # fmt: skip
def test_detections_of_one_thing_are_merged(box, kept):
    assert len(merge_objects([("cat", 0.9, LEFT), ("cat", 0.8, box)])) == kept
    assert len(merge_objects([("cat", 0.9, LEFT), ("dog", 0.8, box)])) == 2


@pytest.mark.parametrize(
    ("wanted", "found", "score"),
    [
        ([("cat", 2)], ["cat", "cat"], 1), ([("cat", 2)], ["cat"], 0.5), ([("cat", 2)], ["cat"] * 3, 0.5),
        ([("cat", 2)], ["dog"], 0), ([("cat", 1), ("dog", 2)], ["cat"], 0.5), ([("cat", 1), ("dog", 2)], ["dog"], 0.25),
        ([("girl", 2)], ["person", "person"], 1), ([("ship", 1)], ["boat"], 1), ([("painting", 1)], ["picture"], 1),
        ([("phone", 2)], ["cell phone", "telephone"], 1),  # a part of the name is enough
        ([("cat", 1)], ["cat", "wildcat"], 1),  # unless the name itself is there
    ],
)  # fmt: skip
def test_counts_score(wanted, found, score):
    assert count_score(wanted, found) == pytest.approx(score)


def test_a_prompt_that_counts_nothing_has_no_score():
    with pytest.raises(ValueError, match="must count something"):
        count_score([], ["cat"])


def test_attribute_scores_are_products_of_rounded_probabilities():
    assert attribute_score([0.5, 0.5]) == 0.25
    assert attribute_score([0.33333, 0.33333]) == 0.1111
    assert attribute_score([0.00004, 1.0]) == 0.0
    assert attribute_score([]) == 1.0


@pytest.mark.parametrize(
    ("kind", "parts", "score"),
    [
        ("spatial", (0.4, 0.8, None), 0.6), ("action", (0.4, None, 0.3), 0.35),
        ("spatialaction", (0.4, 0.8, 0.3), 0.5), ("spatialaction", (0.4, None, 0.3), None),
        ("spatial", (0.4, None, 1.0), None), ("action", (0.4, 1.0, None), None),
    ],
)  # fmt: skip
def test_the_three_in_one(kind, parts, score):
    assert three_in_one(kind, *parts) == (None if score is None else pytest.approx(score))


# --- words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("a green bench and a red car", ["a green bench", "a red car"]),
        ("rubber sole shoes and fluffy clouds", ["rubber sole shoes", "fluffy clouds"]),
        ("A black and white cat in a white sink.", ["A black and white cat", "a white sink"]),
        ("A black and a white cat", ["a white cat"]),
        ("A long, narrow yellow kitchen", ["A long, narrow yellow kitchen"]),
        ("a cubic block and a cylindrical soda can", ["a cubic block", "a cylindrical soda can"]),
        ("an oblong squash and a teardrop plum", ["an oblong squash", "a teardrop plum"]),
        ("a round pizza and a square slice of bread", ["a round pizza", "a square slice", "bread"]),
        ("a cat on the left and a dog at the side", ["a cat", "a dog"]),  # places are no things
        ("The glass bottle and metallic opener hold the wooden beer for the fluffy party.",
         ["The glass bottle", "metallic opener", "the wooden beer", "the fluffy party"]),
        ("a a1, b, c, d, e, f, g, h, i", ["a a1", "b", "c", "d", "e", "f", "g", "h"]),  # eight at most
    ],
)  # fmt: skip
def test_noun_phrases_by_rules(prompt, phrases):
    assert [p for p in Rules().noun_phrases(prompt) if p != "A black"] == phrases


def test_rules_find_both_things_in_every_prompt_of_the_common_pattern(data):
    checked = 0
    for category in ("color", "shape", "texture"):
        for prompt in read_lines(f"{category}_val", data):
            assert Rules().noun_phrases(prompt), prompt
            if re.fullmatch(r"(an? )?[a-z' -]+ and (an? )?[a-z' -]+", prompt) and not re.search(
                r" (of|with|on) ", prompt
            ):
                assert Rules().noun_phrases(prompt) == prompt.split(" and "), prompt
                checked += 1
    assert checked > 600


def test_sentences_are_left_to_a_parser():
    with pytest.raises(ValueError, match="install spaCy and take language 'spacy'"):
        Rules().without_adjectives("The red hat")
    with pytest.raises(ValueError, match="install spaCy and take language 'spacy'"):
        Rules().objects("The red hat was on top of the rack", is_complex=True)
    with pytest.raises(ValueError, match=r"cannot load spaCy's 'no_such_pipeline' .*pip install spacy"):
        Spacy("no_such_pipeline")


def test_every_spatial_prompt_names_two_objects_and_a_relation(data):
    for prompt in read_lines("spatial_val", data):
        first, last = Rules().objects(prompt, is_complex=False)
        relation = locality(prompt)
        assert prompt == f"{prompt.split()[0]} {first} {relation} {prompt.split()[-2]} {last}"
    assert Rules().objects("a cat", is_complex=False) is None
    assert locality("a cat on top of a dog") == "on top of"
    assert locality("a cat on the top of a dog") == "on the top of"


@pytest.mark.parametrize(
    ("phrase", "question"),
    [
        ("A Red Car", "a red car?"),
        ('the "big" (dog).', "the big dog?"),
        ("a; b: c~*#!", "a b c?"),
        ("a " * 60, " ".join(["a"] * 50)),
    ],
)
def test_questions_are_cleaned_as_the_network_knows_them(phrase, question):
    assert clean_question(phrase) == question


def test_counts_are_read_from_prompts(data):
    singular = singular_names(read_vocabulary(data))
    assert singular["mice"] == "mouse" and singular["people"] == "person"  # noqa: PT018
    assert counts("four tents, two boats and one pig", singular) == [("tent", 4), ("boat", 2), ("pig", 1)]
    assert counts("six people gathered for a picnic", singular) == [("person", 6)]
    assert counts("one fish and three sheep", singular) == [("fish", 1), ("sheep", 3)]
    assert counts("two very old cars and a", singular) == []
    assert all(counts(prompt, singular) for prompt in read_lines("numeracy_val", data))


def test_complex_prompts_are_of_three_kinds(data):
    kinds = list(read_kinds(data).values())
    assert [kinds.count(kind) for kind in ("spatial", "action", "spatialaction")] == [58, 212, 30]


def test_detectors_know_things_under_their_own_names():
    classes = {"person", "tv", "boat", "cat"}
    assert [detector_name(thing, classes) for thing in ("cat", "girl", "television", "ship", "bee")] == [
        "cat", "person", "tv", "boat", None,
    ]  # fmt: skip


def test_the_originals_parser_where_it_is_installed():
    """spaCy on words tagged by hand: the pipeline's own tags are its makers' matter."""
    spacy = pytest.importorskip("spacy")
    text = "The red hat was on top of the brown rack"
    tags = ["DET", "ADJ", "NOUN", "AUX", "ADP", "NOUN", "ADP", "DET", "ADJ", "NOUN"]
    deps = ["det", "amod", "nsubj", "ROOT", "prep", "pobj", "prep", "det", "amod", "pobj"]
    heads = [2, 2, 3, 3, 3, 4, 5, 9, 9, 6]

    def nlp(_):
        return spacy.tokens.Doc(spacy.blank("en").vocab, text.split(), pos=tags, heads=heads, deps=deps)

    language = Spacy(nlp)
    assert language.noun_phrases(text) == ["The red hat", "the brown rack"]  # without "top"
    assert language.without_adjectives(text) == "The hat was on top of the rack"
    assert language.objects(text, is_complex=True) == ("hat", "rack")
    assert language.objects(text, is_complex=False) == ("hat", "rack")
    tags[9] = "PROPN"
    assert language.objects(text, is_complex=True) is None  # nothing follows the name, as in the released code
    tags[2] = "PROPN"
    tags[9] = "NOUN"
    assert language.objects(text, is_complex=True) == ("hat", "rack")
    tags[2] = "VERB"
    assert language.objects(text, is_complex=True) is None
