"""`make test-fast` runs part of every folder: tests/fast.txt lists its files."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
FAST = (ROOT / "tests/fast.txt").read_text().split()


def test_the_fast_tests_cover_every_folder() -> None:
    folders = {str(path.parent.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py")}
    assert {str(Path(name).parent) for name in FAST} == folders
    assert sorted(set(FAST)) == FAST
    assert not [name for name in FAST if not (ROOT / name).is_file()]


def test_the_makefile_runs_them() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\ntest-fast: setup\n")[2]
    assert "tests/fast.txt" in recipe.partition("\n\n")[0]
