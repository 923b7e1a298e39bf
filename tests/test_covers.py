import itertools

import pytest
from covers import cover


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_values_of_any_parameters_meet(strength):
    parameters = "abc", range(4), (True, False), "xy"
    cases = cover(*parameters, strength=strength)
    for group in itertools.combinations(range(4), strength):
        met = {tuple(case[place] for place in group) for case in cases}
        assert met == set(itertools.product(*(parameters[place] for place in group)))
    assert len(cases) < 3 * 4 * 2 * 2


def test_cases_are_the_same_each_time():
    assert cover("ab", "cd", "ef") == cover("ab", "cd", "ef")
