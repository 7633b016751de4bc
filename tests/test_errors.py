"""The tree of exceptions is the one that its documentation draws, and suggestions are names that are allowed."""

import re
from difflib import SequenceMatcher

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tethertune
import tethertune.theory
from tethertune import errors

BRANCH = re.compile(r"^    ([│ ]*)(?:[├└]── )?([\w.]+Error)(?: \((\w+)\))?(?= |$)", re.MULTILINE)


def drawn():
    """Of each class in the docstring, by its name: the one that it hangs on, and the built-in one in brackets."""
    found, path = {}, []
    for indent, name, also in BRANCH.findall(errors.__doc__):
        del path[1 + len(indent) // 4 if path else 0 :]
        path.append(name.rpartition(".")[2])
        found[path[-1]] = (path[-2] if path[:-1] else "Exception", also)
    return found


def real(*classes):
    """The same of the classes as they are, of all modules that have been imported."""
    found = {}
    for cls in classes or [errors.TethertuneError]:
        parent, *also = (base.__name__ for base in cls.__bases__)
        found[cls.__name__] = (parent, "".join(also))
        if cls.__subclasses__():
            found |= real(*cls.__subclasses__())
    return found


def test_the_tree_in_the_docstring_is_that_of_the_classes():
    parents, own = ({name: parent for name, (parent, _) in tree.items()} for tree in (drawn(), real()))
    assert parents == own


@pytest.mark.parametrize("name", real())
def test_the_docstring_says_which_built_in_exception_a_class_is_as_well(name):
    assert drawn()[name] == real()[name]


def test_every_class_of_the_tree_is_exported_and_documented():
    here = {name for name in real() if hasattr(errors, name)}
    assert set(errors.__all__) == here
    assert set(real()) - here == {"NotCoveredError"}
    assert tethertune.theory.NotCoveredError.__mro__[1] is errors.ConfigurationError


WORDS = st.text("abc_", min_size=1, max_size=8)


@given(WORDS, st.lists(WORDS, max_size=12))
def test_the_closest_allowed_names_are_suggested_once_each_closest_first(given_name, allowed):
    said = errors.did_you_mean(given_name, iter(allowed))
    alike = {name: SequenceMatcher(None, name, given_name).ratio() for name in allowed}
    close = [ratio for ratio in sorted(alike.values(), reverse=True) if ratio >= 0.6][:3]
    if not close:
        assert said == ""
        return
    named = re.fullmatch(r" Did you mean (.+)\?", said)[1].replace("'", "").split(" or ")
    assert len(set(named)) == len(named)
    assert [alike[name] for name in named] == close


def test_how_a_suggestion_reads():
    assert errors.did_you_mean("radus", ["radius", "norm"]) == " Did you mean 'radius'?"
    assert errors.did_you_mean("layer", ["layers", "layer1", "head"]) == " Did you mean 'layers' or 'layer1'?"
    assert errors.did_you_mean("abc", ["abcd", "abcf", "abce", "abc"]).count(" or ") == 2
    assert errors.did_you_mean("x", ["radius"]) == errors.did_you_mean("x", []) == ""
