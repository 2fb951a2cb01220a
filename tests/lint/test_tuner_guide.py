"""docs/keras_tuner.md names what is searched."""

from tests.docs_code import ROOT
from tests.test_tuner import NAMES, keras_tuner, search_space


def test_the_guide_lists_what_is_searched():
    text = (ROOT / "docs" / "keras_tuner.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("| `kfac_")
    ]
    documented = {
        name.split("`")[1]: values.replace("`", "").replace(";", ",")
        for name, values in rows
    }
    hp = keras_tuner.HyperParameters()
    search_space(hp)
    expected = {}
    for each in hp.space:
        if each.name in NAMES:
            rest = [value for value in each.values if value != each.default]
            expected[each.name] = [str(v) for v in [each.default, *rest]]
    assert set(documented) == {
        *("kfac_damping_constant", "kfac_momentum_value", *expected)
    }
    for name, values in expected.items():
        assert documented[name].split(", ") == values
