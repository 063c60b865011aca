"""prompts.py: what files say, the order of an epoch, and prompts that GenEval's evaluator can score."""

import json
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import evaluate
import sample
from formats.folders import load_pipeline
from infra.downloads import DOWNLOADS
from infra.prompts import prompts_hash, prompts_of_update, read_entries, read_prompts, rows_of_rank
from sample import encode, truncation_warning
from tools import prompts
from tools.prompts import COLORS, NUMBERS, PLURAL, RATIO, TASKS, compose, generate

ROOT = Path(__file__).parent.parent


def prompt_file(folder: Path, text: str, name: str = "prompts.txt") -> Path:
    file = folder / name
    file.write_bytes(text.encode())
    return file


# ---------------------------------------------------------------------------------------------- files


def test_a_line_of_text_is_a_prompt_unless_it_is_blank_or_a_comment(tmp_path):
    file = prompt_file(tmp_path, "a cat\n\n  # no\n\t a café \r\n#1 dad mug\n## no\n#\nb # c\n")
    assert read_prompts(file) == ["a cat", "a café", "#1 dad mug", "b # c"]


def test_invisible_characters_are_removed_but_not_the_joiners_of_emoji(tmp_path):
    family = "\U0001f468\u200d\U0001f469"
    file = prompt_file(tmp_path, f"\ufeffa\u200b cat\u2060\n\u200b\n\ufeff{family}\n")
    assert read_prompts(file) == ["a cat", family]


@pytest.mark.parametrize("name", ["prompts.txt", "prompts", "prompts.md"])
@pytest.mark.parametrize(
    "lines",
    [
        ['{"prompt": "a cat"}', "a dog"],
        ['[{"prompt": "a cat"}, "a dog"]'],
        ["{{{masterpiece}}}, 1girl", "{broken"],
        ["[masterpiece]", "a cat [blurred]"],
        ["prompt, text", "a dog", "a hat, with a feather, red"],
        ["Prompt\tCategory", "a cat\tanimals"],
        ['"a cat"', "a\x85dog", "a \u2028hat"],
    ],
)
def test_a_text_has_a_prompt_a_line_whatever_the_lines_look_like(lines, name, tmp_path):
    assert read_prompts(prompt_file(tmp_path, "\n".join(lines), name)) == lines


@pytest.mark.parametrize(
    "lines, format_name, line",
    [
        (["a cat", '{"prompt": "a dog"}', '{"prompt": "a hat"}'], "JSON lines", '{"prompt": "a dog"}'),
        (["a cat", "a dog --w 512 --h 512", "a hat --n bad"], "a kohya prompt file", "a dog --w 512 --h 512"),
        (["prompts:", "  - a cat"], "YAML", "prompts:"),
        (["- a cat", "- a dog"], "YAML", "- a cat"),
    ],
)
def test_a_text_that_looks_like_another_format_is_warned_of_once(
    lines, format_name, line, tmp_path, capsys, monkeypatch
):
    file = prompt_file(tmp_path, "# a note\n" + "\n".join(lines))
    assert len(read_prompts(file)) == len(lines)
    warning = f"warning: {file} looks like {format_name}, and this is read as a prompt: {line}\n"
    assert capsys.readouterr().err == warning
    monkeypatch.setenv("RANK", "1")
    read_prompts(file)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "lines", [["a cat", "- a dog"], ["{{a}}, 1girl", "[b]"], ["state-of-the-art -- a photo", "a cat --"]]
)
def test_a_text_of_prompts_is_read_without_a_warning(lines, tmp_path, capsys):
    read_prompts(prompt_file(tmp_path, "\n".join(lines)))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["jsonl", "json", "JSONL"])
def test_json_lines_are_objects_or_strings_and_objects_keep_their_fields(suffix, tmp_path):
    text = '{"prompt": "a cat", "tag": "single_object"}\n\n# note\n"a \\"dog\\""\n{"prompt": "é \u2028a"}\n'
    file = prompt_file(tmp_path, text, f"prompts.{suffix}")
    first, second, third = read_entries(file)
    assert first == {"prompt": "a cat", "tag": "single_object"}
    assert second == {"prompt": 'a "dog"'}
    assert third == {"prompt": "é \u2028a"}


def test_a_json_array_such_as_hpdv2s_has_objects_or_strings(tmp_path):
    file = prompt_file(tmp_path, '[\n {"prompt": "a cat", "rank": [1, 2]},\n "a dog"]', "test.json")
    assert read_entries(file) == [{"prompt": "a cat", "rank": [1, 2]}, {"prompt": "a dog"}]


@pytest.mark.parametrize("key", ["text", "caption", "Prompt", "TEXT"])
def test_a_prompt_may_have_another_key_in_any_case_and_gets_its_usual_one(key, tmp_path):
    file = prompt_file(tmp_path, json.dumps({key: "a cat"}), "p.jsonl")
    assert read_entries(file) == [{key: "a cat", "prompt": "a cat"}]
    file = prompt_file(tmp_path, json.dumps({"prompt": "a cat", key: "a dog"}), "p.jsonl")
    assert read_prompts(file) == ["a cat"]


# As published: PartiPrompts.tsv has letters and curly quotes and empty notes, DrawBench.csv prompts with commas.
PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    '"bond" or "no bond"\tAbstract\tBasic\tBiology-inspired concepts\n'
    'a sign that says "Hello, # you"\tArtifacts\tWriting & Symbols\t\n'
    "a conductor\u2019s hat \tAnimals\tStyle & Format\t\n"
)
DRAWBENCH = (
    "Prompts,Category\r\n"
    "A red colored car.,Colors\r\n"
    '"A zebra, underneath a ""broccoli"".",Conflicting\r\n'
    "# one,Text\r\n"
)


def test_a_tab_separated_table_is_read_by_its_header(tmp_path):
    file = prompt_file(tmp_path, PARTI, "PartiPrompts.tsv")
    prompts_read = ['"bond" or "no bond"', 'a sign that says "Hello, # you"', "a conductor\u2019s hat"]
    assert read_prompts(file) == prompts_read
    assert read_entries(file)[1]["Category"] == "Artifacts"


def test_a_comma_separated_table_is_read_by_its_header(tmp_path):
    file = prompt_file(tmp_path, DRAWBENCH, "DrawBench.csv")
    assert read_prompts(file) == ["A red colored car.", 'A zebra, underneath a "broccoli".', "# one"]
    file = prompt_file(tmp_path, 'caption\n"a cat, a dog"\n\na hat\n', "one.csv")
    assert read_prompts(file) == ["a cat, a dog", "a hat"]


@pytest.mark.parametrize("suffix, separator", [("tsv", "\t"), ("csv", ",")])
def test_a_table_that_pandas_wrote_with_its_index_is_read(suffix, separator, tmp_path):
    text = "\tPrompt\tCategory\n0\ta cat\tsingle\n1\ta dog\ttwo\n".replace("\t", separator)
    assert read_prompts(prompt_file(tmp_path, text, f"table.{suffix}")) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("p.csv", "id,sentence\n1,a cat\n", """line 2 has no "prompt": {'id': '1', 'sentence': 'a cat'}"""),
        ("p.csv", "prompt,id\na cat, a dog,1\n", "line 2: more cells than columns"),
        ("p.csv", "prompt,id\na cat,1\n,2\n", 'line 3 has no "prompt"'),
        ("p.csv", 'prompt,id\n"a" cat,1\n', "line 2: "),
        ("p.csv", 'prompt,id\n"a cat,1\na dog,2\n', "line 3: unexpected end"),
        ("p.csv", "prompt,id\n", "holds no prompt"),
        ("p.json", '[\n"a cat"', "line 2 column 8"),
        ("p.json", '[\n"a cat", {"words": "a dog"}]', """line 2 has no "prompt": {'words': 'a dog'}"""),
        ("p.json", "[3]", 'line 1 has no "prompt": 3'),
        ("p.json", "[]", "holds no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n\n{broken\n', "line 3 is not JSON"),
        ("p.jsonl", "a cat\n", "line 1 is not JSON"),
        ("p.jsonl", '{"words": "a cat"}', """line 1 has no "prompt": {'words': 'a cat'}"""),
        ("p.jsonl", '{"prompt": " "}', 'line 1 has no "prompt"'),
        ("p.jsonl", '{"prompt": 3}', 'line 1 has no "prompt"'),
        ("p.txt", "", "holds no prompt"),
        ("p.txt", "# only this\n", "holds no prompt"),
    ],
)
def test_a_bad_file_is_an_error_that_names_it_and_the_line(name, text, words, tmp_path):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        read_prompts(prompt_file(tmp_path, text, name))
    assert str(tmp_path / name) in str(error.value)


def test_a_file_that_is_not_there_is_said_in_words(tmp_path):
    with pytest.raises(ValueError, match=r"^cannot read .*nope\.txt \(there is no such file\): write prompts as UTF-8"):
        read_prompts(tmp_path / "nope.txt")


def test_the_fingerprint_is_that_of_the_prompts_and_of_their_order():
    assert prompts_hash(["a", "b"]) == prompts_hash(("a", "b")) and len(prompts_hash(["a"])) == 8
    assert len({prompts_hash(p) for p in (["a", "b"], ["b", "a"], ["a", "b", "b"], ["ab"], ["a b"])}) == 5


def test_the_prompts_that_ship_are_read():
    assert len(set(read_prompts(ROOT / "prompts.txt"))) > 20
    assert len(read_prompts(ROOT / "shapes" / "eval-prompts.txt")) == 360


# --------------------------------------------------------------------------------- what the encoders read


def test_prompts_that_are_cut_are_told_with_the_numbers_of_each_encoder():
    pipe = load_pipeline(ROOT / "shapes" / "tiny-flux")
    short, long = "a photo of a circle", "a photo of " + "a circle and " * 9 + "a square"
    assert truncation_warning(pipe, [short] * 3) is None
    clip, t5 = (len(tokenizer(long).input_ids) for tokenizer in pipe.tokenizers)
    assert truncation_warning(pipe, [short, long, short]) == (
        f"warning: prompts are truncated: CLIP reads 12 tokens, 1 of 3 have more, up to {clip}; "
        f"T5 (--text-length) reads 12 tokens, 1 of 3 have more, up to {t5}"
    )
    assert (encode(pipe, [long]).txt == encode(pipe, [long + " and a cross"]).txt).all()  # it is what `encode` cuts


@pytest.mark.parametrize(
    "command, flags",
    [
        (sample, ["--num", "1", "--steps", "1", "--out", "g.png"]),
        (evaluate, ["--num", "1", "--steps", "1", "--rewards", "tiny", "--out", "e"]),
    ],
    ids=["sample", "evaluate"],
)
def test_the_commands_tell_it_once(command, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = prompt_file(tmp_path, "a photo of " + "a circle and " * 9 + "a square\n")
    monkeypatch.setattr(sys, "argv", ["command", "--prompts", str(file), "--device", "cpu", *flags])
    command.main()
    assert capsys.readouterr().err.count("warning: prompts are truncated") == 1


# ---------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("size", [1, 3, 10, 25])
def test_every_prompt_is_seen_once_an_epoch_whatever_the_batch(size):
    seen = [x for step in range(-(-30 // size)) for x in prompts_of_update(range(10), step, size, seed=0)][:30]
    epochs = [seen[0:10], seen[10:20], seen[20:30]]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3


def test_the_order_is_a_function_of_seed_and_epoch_and_not_of_the_batch_size():
    whole = prompts_of_update(range(10), 0, 10, seed=5)
    assert whole == prompts_of_update(range(10), 0, 5, seed=5) + prompts_of_update(range(10), 1, 5, seed=5)
    assert whole != prompts_of_update(range(10), 0, 10, seed=6)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_the_shards_of_the_ranks_are_the_batch_in_order_and_of_equal_size_within_one(world):
    parts = [rows_of_rank(list(range(12)), rank, world) for rank in range(world)]
    assert [x for part in parts for x in part] == list(range(12)) and max(map(len, parts)) - min(map(len, parts)) <= 1


# ------------------------------------------------------------------------------------------ generator


def test_tasks_come_in_the_papers_ratio():
    counts = Counter(e["tag"] for e in generate(1700, RATIO, seed=0))
    assert counts == {"position": 700, "counting": 500, "color_attr": 300, "colors": 100, "two_object": 100}


def test_any_number_of_prompts_is_met_exactly():
    for num in (1, 5, 16, 100):
        assert len(generate(num, (1, 1, 1, 1, 1, 1), seed=0)) == num


def test_the_same_seed_writes_the_same_prompts_and_another_seed_others():
    assert generate(50, RATIO, 0) == generate(50, RATIO, 0) != generate(50, RATIO, 1)


def test_the_classes_are_those_of_the_detector():
    assert len(PLURAL) == 80 and {"computer mouse", "tv remote", "computer keyboard", "hair drier"} <= PLURAL.keys()
    assert PLURAL["person"] == "people" and PLURAL["bench"] == "benches" and PLURAL["cat"] == "cats"


@pytest.mark.parametrize("task", TASKS)
def test_the_metadata_says_what_the_prompt_says(task):
    """Read as GenEval's evaluator reads it: classes, counts, colors, and positions relative to the first included."""
    for seed in range(100):
        entry = compose(task, np.random.default_rng(seed))
        include, text = entry["include"], entry["prompt"]
        assert entry["tag"] == task and text.startswith("a photo of ")
        assert all((i["class"] in PLURAL and i["class"].split()[0] in text) or i["count"] > 1 for i in include)
        if task == "counting":
            ((thing,), (more,)) = include, entry["exclude"]
            assert f"{NUMBERS[thing['count']]} {PLURAL[thing['class']]}" in text
            assert more == {"class": thing["class"], "count": thing["count"] + 1}
        if task in ("colors", "color_attr"):
            assert all(i["color"] in COLORS and f"{i['color']} {i['class']}" in text for i in include)
            assert "person" not in text
        if task == "position":
            target, thing = include
            relation, index = thing["position"]
            assert index == 0 and text.index(thing["class"]) < text.index(f" {relation} ")
            assert text.endswith(target["class"])
        assert len(include) == (2 if task in ("two_object", "color_attr", "position") else 1)
        assert len({i["class"] for i in include}) == len(include)


def plain_entries(texts: set[str]) -> list[dict[str, str]]:
    """Texts as read_entries gives the lines of a .txt file."""
    return [dict(prompt=text) for text in sorted(texts)]


def test_prompts_can_be_left_out():
    every = plain_entries({e["prompt"] for e in generate(2000, (0, 0, 0, 0, 0, 1), seed=0)})
    texts = {e["prompt"] for e in generate(2000, (0, 0, 0, 0, 0, 1), seed=0, without=every[:40])}
    assert texts == {e["prompt"] for e in every[40:]}
    with pytest.raises(ValueError, match="--without leaves no prompt of the task single_object"):
        generate(10, (0, 0, 0, 0, 0, 1), seed=0, without=every)


def test_however_many_prompts_are_asked_for_those_that_may_be_are_found():
    every = plain_entries({e["prompt"] for e in generate(5000, (0, 1, 0, 0, 0, 0), seed=0)})
    # Nine of ten that are composed are refused, in all more than when the search gives up.
    entries = generate(1500, (0, 1, 0, 0, 0, 0), seed=1, without=every[24:])
    assert len(entries) == 1500 and {e["prompt"] for e in entries} == {e["prompt"] for e in every[:24]}


def test_a_prompt_is_left_out_by_what_it_asks_for_however_it_is_worded(tmp_path):
    benches = {"tag": "counting", "include": [{"class": "bench", "count": 3}], "prompt": "a photo of three benchs"}
    texts = {e["prompt"] for e in generate(5000, (0, 1, 0, 0, 0, 0), seed=0, without=[benches])}
    assert "a photo of three benches" not in texts and len(texts) == 239


def of_two(tag: str, first: dict, second: dict) -> str:
    return prompts.meaning(dict(tag=tag, include=[first, second], prompt=""))


def test_two_things_mean_the_same_whichever_comes_first():
    cat, dog = ({"class": name, "count": 1} for name in ("cat", "dog"))
    red, blue = dict(cat, color="red"), dict(dog, color="blue")
    assert of_two("two_object", cat, dog) == of_two("two_object", dog, cat)
    assert of_two("color_attr", red, blue) == of_two("color_attr", blue, red)
    assert of_two("color_attr", red, blue) != of_two("color_attr", dict(cat, color="blue"), dict(dog, color="red"))
    for relation, mirrored in (("left of", "right of"), ("above", "below")):
        said = of_two("position", cat, dict(dog, position=[relation, 0]))  # a dog left of a cat
        assert said == of_two("position", dog, dict(cat, position=[mirrored, 0]))
        assert said != of_two("position", cat, dict(dog, position=[mirrored, 0]))


def test_the_command_writes_a_file_that_is_read_back(tmp_path, monkeypatch, capsys):
    file, without = tmp_path / "deep" / "p.jsonl", tmp_path / "without.txt"
    without.write_text("a photo of a cat\n")
    monkeypatch.setattr(sys, "argv", ["prompts.py", "--file", str(file), "--num", "34", "--without", str(without)])
    prompts.main()
    assert [entry["tag"] for entry in read_entries(file)].count("position") == 14
    assert str(file) in capsys.readouterr().out
    assert all(json.loads(line)["include"] for line in file.read_text().splitlines())


def test_the_prompts_of_a_preset_are_written_as_it_reads_them(tmp_path, monkeypatch):
    """The command that a missing download prints writes a .txt, which train.py reads as a prompt per line."""
    words = shlex.split(DOWNLOADS["weights/train-prompts.txt"][-1])
    file, without = tmp_path / Path(words[words.index("--file") + 1]).name, tmp_path / "without.txt"
    without.write_text("a photo of a cat\n")
    monkeypatch.setattr(sys, "argv", ["prompts.py", "--file", str(file), "--num", "34", "--without", str(without)])
    prompts.main()
    written = read_prompts(file)
    assert len(written) == 34 and all(prompt.startswith("a photo of ") for prompt in written)


def test_a_file_that_is_there_is_not_written_over(tmp_path, monkeypatch):
    file = tmp_path / "mine.txt"
    file.write_text("a prompt of mine\n")
    monkeypatch.setattr(sys, "argv", ["prompts.py", "--file", str(file)])
    with pytest.raises(SystemExit, match="is there already"):
        prompts.main()
    assert file.read_text() == "a prompt of mine\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--num", "0"],
        ["--seed", "-1"],
        ["--ratio", "0", "0", "0", "0", "0", "0"],
        ["--ratio", "nan", "1", "1", "1", "1", "1"],
        ["--ratio", "inf", "1", "1", "1", "1", "1"],
        ["--without", "no.txt"],
        ["--file", f"{__file__}/p.txt"],
        ["--file", "prompts.csv"],
    ],
)
def test_a_bad_flag_is_named(arguments, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["prompts.py", "--file", str(tmp_path / "p.txt"), *arguments])
    with pytest.raises(SystemExit, match=rf"error: .*({arguments[0]}|no\.txt|{Path(__file__).name})"):
        prompts.main()
    assert not (tmp_path / "p.txt").exists()
