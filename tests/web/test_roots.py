"""No spelling of a path leads out of the allowed roots, and the refusal says nothing about what is outside."""

import pytest

from qgen.web.roots import Roots


@pytest.fixture
def tree(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside / "model", outside):
        folder.mkdir(parents=True)
    (outside / "secret.txt").write_text("secret")
    (inside / "notes.txt").write_text("notes")
    (inside / "way-out").symlink_to(outside)
    (inside / "circle").symlink_to(inside / "circle")
    return inside, outside


def test_what_is_inside_is_found(tree):
    inside, _ = tree
    roots = Roots([inside])
    assert roots.existing("notes.txt") == inside / "notes.txt"
    assert roots.existing(str(inside / "model" / ".." / "notes.txt")) == inside / "notes.txt"
    assert roots.model("model") == str(inside / "model")
    assert roots.model(" demo ") == "demo"
    assert roots.inside("new/folder") == inside / "new" / "folder"


@pytest.mark.parametrize(
    "spelling",
    [
        "{outside}/secret.txt",
        "../outside/secret.txt",
        "model/../../outside/secret.txt",
        "way-out/secret.txt",
        "{inside}/way-out",
        "~/x",
        "/etc/passwd",
        "circle",
        "{inside}x",
    ],
)
def test_what_is_outside_is_refused(tree, spelling):
    inside, outside = tree
    with pytest.raises(ValueError, match="outside the folders"):
        Roots([inside]).existing(spelling.format(inside=inside, outside=outside))


def test_refusals_do_not_tell_what_exists(tree):
    inside, outside = tree
    lines = []
    for name in ("secret.txt", "absent.txt"):
        with pytest.raises(ValueError) as caught:
            Roots([inside]).existing(str(outside / name))
        lines.append(str(caught.value).replace(name, "NAME"))
    assert lines[0] == lines[1]


@pytest.mark.parametrize("text", ["", "   ", "a\0b", "x" * 5000, "a\nb", None])
def test_what_is_no_path_is_refused_in_words(tree, text):
    with pytest.raises(ValueError, match="path"):
        Roots([tree[0]]).inside(text)


def test_hub_ids_only_where_allowed(tree):
    inside, _ = tree
    assert Roots([inside], hub=True).model("owner/name") == "owner/name"
    with pytest.raises(ValueError, match="--hub"):
        Roots([inside]).model("owner/name")
    with pytest.raises(ValueError, match="outside"):
        Roots([inside], hub=True).model("../outside")
    (inside / "owner" / "name").mkdir(parents=True)
    assert Roots([inside], hub=True).model("owner/name") == str(inside / "owner" / "name")


def test_no_roots_no_paths(tmp_path):
    with pytest.raises(ValueError, match="--root"):
        Roots([]).inside(str(tmp_path))
    with pytest.raises(ValueError, match="no folder"):
        Roots([tmp_path / "absent"])
