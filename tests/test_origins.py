"""Where options come from, against what PETSc makes of the same files and words."""

from pathlib import Path

import pytest
from petsc4py import PETSc

from ddml.errors import InputError
from ddml.origins import COMMAND_LINE, VARIABLE, origins, refuse_words

GOOD = {
    "plain": ("-a 1\n-b\n-c -1e-3\n", ["a", "b", "c"]),
    "comments and space": ("# -x 1\n\n   -a 1 # -y 2\n\t-b\t2\n-c x#y\n", ["a", "b", "c"]),
    "prefixes": ("-prefix_push sub_\n-a 1\n-prefix_push sub_\n-b 2\n-prefix_pop\n-prefix_pop\n-c 3\n",
                 ["sub_a", "sub_sub_b", "c"]),
    "two dashes": ("--a 1\n-inf_norm 1\n", ["a", "inf_norm"]),
    "alias": ("alias -m -memory\n-a 1\n", ["a"]),
    "empty": ("", []),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_file_holds_what_petsc_finds_in_it(name: str, tmp_path: Path) -> None:
    text, names = GOOD[name]
    path = tmp_path / "options.txt"
    path.write_text(text)
    found = origins(["-options_file", str(path), "-last", "2"], {})
    assert found.of == {**dict.fromkeys(names, str(path)), "last": COMMAND_LINE}
    of_petsc = PETSc.Options().create()
    of_petsc.insertString(f"-options_file {path} -last 2")
    assert of_petsc.getAll().keys() == found.of.keys()
    of_petsc.destroy()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hello world", "line 1: 'hello world'"), ("-a 1\n-b 2 3", "line 2: '-b 2 3'"), ("-a 1 -b 2", "'-a 1 -b 2'"),
        ("-a -b", "'-a -b'"), ("-1 2", "'-1 2'"), ("alias -m", "'alias -m'"), ("! old comment", "'! old comment'"),
    ],
)  # fmt: skip
def test_a_line_that_petsc_refuses_is_named_with_its_file(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "options.txt"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        origins(["-options_file", str(path)], {})
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    of_petsc = PETSc.Options().create()
    with pytest.raises(PETSc.Error):
        of_petsc.insertString(f"-options_file {path}")
    of_petsc.destroy()


def test_later_ones_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In PETSc's order: home, the working folder, the variable, the command line from left to right."""
    home, here = tmp_path / "home", tmp_path / "here"
    for folder, text in ((home, "-a 1\n-b 1\n-c 1\n-d 1\n"), (here, "-b 2\n-c 2\n-d 2\n")):
        folder.mkdir()
        (folder / ".petscrc").write_text(text)
    (here / "options.txt").write_text("-d 3\n-e 3\n")
    monkeypatch.chdir(here)
    variables = {"HOME": str(home), VARIABLE: "-c 4 -d 4"}
    found = origins(["-e", "5", "-options_file", "options.txt"], variables)
    assert found.of == {
        "a": str(home / ".petscrc"), "b": ".petscrc", "c": VARIABLE, "d": "options.txt", "e": "options.txt"
    }  # fmt: skip
    assert found.around().keys() == {"a", "b", "c"}
    assert origins(["-options_file", "options.txt", "-e", "5"], variables).of["e"] == COMMAND_LINE
    assert origins(["-skip_petscrc"], variables).of == {"c": VARIABLE, "d": VARIABLE, "skip_petscrc": COMMAND_LINE}
    assert origins(["-skip_petscrc", "false"], variables).of["a"] == str(home / ".petscrc")


@pytest.mark.parametrize(
    ("words", "variable", "said"),
    [
        (["-options_file", "nowhere.txt"], "", "cannot read nowhere.txt: No such file"),
        ([], "-options_file nowhere.txt", "-options_file of PETSC_OPTIONS: cannot read nowhere.txt"),
        (["-options_file"], "", "must name a file"),
        (["-options_file", "."], "", "Is a directory"),
        (["width", "8"], "", "'width' is neither"),
        (["-a", "1", "2"], "", "'2' is neither"),
        ([], "width 8", "'width' in PETSC_OPTIONS is neither"),
        ([], "-a 'b c'", "in PETSC_OPTIONS is neither"),
    ],
)
def test_what_nobody_can_have_meant_is_refused(words: list[str], variable: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        origins(words, {VARIABLE: variable})
        refuse_words(words, {VARIABLE: variable})
    assert said in str(caught.value)
