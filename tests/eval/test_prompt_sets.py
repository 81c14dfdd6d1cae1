"""Prompts from every kind of file and from copies of benchmarks, and one readable line for every bad one."""

import json

import pytest

from qgen.eval.prompt_sets import load_prompts

LINES = ["a red fox", "🦉 בומה, \"ירוקה\"", "x" * 2**20]  # fmt: skip


@pytest.mark.parametrize("kind", ["txt", "json", "jsonl", "csv", "objects", "nested"])
def test_files_agree(tmp_path, kind):
    path = tmp_path / f"p.{'json' if kind in ('objects', 'nested') else kind}"
    quoted = ['"' + line.replace('"', '""') + '"' for line in LINES]
    path.write_text(
        {
            "txt": "\ufeff" + "\n\n".join(LINES) + "\n",
            "json": json.dumps(LINES),
            "jsonl": "\n".join(json.dumps({"caption": line}) for line in LINES) + "\n",
            "csv": "id,Prompt\n" + "".join(f"{i},{line}\n" for i, line in enumerate(quoted)),
            "objects": json.dumps({str(i): {"text": line} for i, line in enumerate(LINES)}),
            "nested": json.dumps({"prompts": LINES}),
        }[kind],
        encoding="utf-8",
    )
    found = load_prompts(path)
    assert list(found.prompts) == LINES
    assert load_prompts(str(path), 1).prompts == ("a red fox",)
    assert len(found.digest) == 12 and found.digest != load_prompts(path, 2).digest


def test_built_in_sets_say_their_licence():
    assert len(load_prompts("builtin").prompts) == 128
    assert load_prompts("demo", 4).licence == load_prompts("builtin").licence == "Apache-2.0"


def test_copies_of_benchmarks(tmp_path):
    (tmp_path / "meta_data.json").write_text(
        json.dumps({"b": {"category": "food", "prompt": "two"}, "a": {"prompt": "one"}})
    )
    assert load_prompts(f"mjhq:{tmp_path}").prompts == ("one", "two")
    notes = [(7, 2, "late"), (3, 9, "c"), (7, 1, "early")]
    coco = {"annotations": [{"image_id": i, "id": k, "caption": c} for i, k, c in notes]}
    (tmp_path / "captions_val2014.json").write_text(json.dumps(coco))
    assert load_prompts(f"coco:{tmp_path}").prompts == ("c", "early")
    (tmp_path / "PartiPrompts.tsv").write_text(
        'Prompt\tCategory\tNote\na sign that says "stop\tArts\t\nan owl\tAnimals\t\n'
    )
    assert load_prompts(f"parti:{tmp_path}").prompts == ('a sign that says "stop', "an owl")
    for kind, words in (("mjhq", "none stated"), ("coco", "captions CC-BY-4.0"), ("parti", "Apache-2.0, says")):
        licence = load_prompts(f"{kind}:{tmp_path}").licence
        assert licence.startswith(words) and "https://" in licence, "a licence is stated with its source"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.json", "{", "no json of prompts"),
        ("a.json", "3", "a list of prompts wanted"),
        ("a.json", "[3]", "found 3"),
        ("a.csv", "id,words\n1,x\n", "a column called prompt"),
        ("a.csv", "", "found nothing"),
        ("a.jsonl", '"x"\n{', "no jsonl"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prompts(tmp_path / name)


def test_bad_names(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'builtin'"):
        load_prompts("buildin")
    with pytest.raises(ValueError, match=r"no meta_data\.json in"):
        load_prompts(f"mjhq:{tmp_path}")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="no UTF-8"):
        load_prompts(tmp_path / "b.txt")
    (tmp_path / "c.json").write_text('{"annotations": [{"id": 1}]}')
    with pytest.raises(ValueError, match="COCO's annotations"):
        load_prompts(f"coco:{tmp_path / 'c.json'}")
