# SPDX-License-Identifier: Apache-2.0
"""The help that an error message gives for an unknown name."""

from ipg_hf.names import nearest


def test_a_typing_error_is_named():
    assert nearest("digts", ["waterbirds", "digits", "celeba"]) == " Did you mean 'digits'?"


def test_few_names_are_all_listed():
    assert nearest("xyz", ["digits", "celeba"]) == " Known: celeba, digits."
    assert nearest("xyz", []) == ""


def test_of_many_names_the_nearest_are_listed():
    layers = ["classifier.weight", *(f"blocks.{number}.mlp.weight" for number in range(20))]
    text = nearest("class", layers)
    assert text.startswith(" Nearest: classifier.weight, ")
    assert text.count(",") == 2
