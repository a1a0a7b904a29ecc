import sys

import pytest

import nt_kernel
from nt_kernel.house import check_not_shadowed


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder that comes first on sys.path, for the packages that a test writes there."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def package(folder, name):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("raise SystemExit('imported')")
    return folder / name / "__init__.py"


def test_our_own_packages_pass():
    check_not_shadowed(nt_kernel.__file__, ["nt_kernel", "optim", "stability", "studies"])


def test_siblings_pass_wherever_they_are(elsewhere):
    mine = package(elsewhere, "house_mine")
    package(elsewhere, "house_sibling")
    check_not_shadowed(str(mine), ["house_sibling"])
    assert "house_sibling" not in sys.modules


def test_a_sibling_from_elsewhere_is_named_without_importing_it(elsewhere):
    shadow = package(elsewhere, "house_other")
    with pytest.raises(ImportError, match=r"house_other.* hides contraction-stability's own") as error:
        check_not_shadowed(nt_kernel.__file__, ["house_other"])
    assert error.value.path == str(shadow)
    assert error.value.name == "house_other"
    assert str(elsewhere) in str(error.value)


def test_a_single_file_and_a_folder_without_init_shadow_too(elsewhere):
    (elsewhere / "house_file.py").write_text("")
    (elsewhere / "house_folder").mkdir()
    for name, place in (("house_file", "house_file.py"), ("house_folder", "house_folder")):
        with pytest.raises(ImportError) as error:
            check_not_shadowed(nt_kernel.__file__, [name])
        assert error.value.path == str(elsewhere / place)


def test_a_sibling_that_is_already_imported_is_checked_too(elsewhere):
    with pytest.raises(ImportError, match="json"):
        check_not_shadowed(nt_kernel.__file__, ["json"])


def test_a_missing_sibling():
    with pytest.raises(ImportError, match="no_such_package is missing beside"):
        check_not_shadowed(nt_kernel.__file__, ["no_such_package"])
