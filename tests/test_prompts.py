"""prompts.py: what files say, the order of an epoch, and prompts that GenEval's evaluator can score."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import evaluate
import sample
from formats.folders import load_pipeline
from infra.prompts import prompts_hash, prompts_of_update, read_entries, read_prompts, rows_of_rank
from sample import encode, truncation_warning
from tools import prompts
from tools.prompts import COLORS, NUMBERS, PLURAL, RATIO, TASKS, compose, generate

ROOT = Path(__file__).parent.parent


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_bytes(text.encode())
    return file


# ---------------------------------------------------------------------------------------------- files


def test_lines_are_prompts_but_blanks_and_comments(tmp_path):
    file = written(tmp_path, "\ufeffa cat\n\n  # no\n\t a café \r\n#1 dad mug\n## no\n#\nb # c\n")
    assert read_prompts(file) == ["a cat", "a café", "#1 dad mug", "b # c"]


def test_what_was_read_as_a_comment_is_told_in_a_line_once(tmp_path, capsys, monkeypatch):
    file = written(tmp_path, "# no\na cat\n#1 dad mug\n# nor this\n")
    read_prompts(file)
    monkeypatch.setenv("RANK", "1")
    read_prompts(file)
    said = capsys.readouterr().err
    assert said == f"{file}: 2 of 4 lines start with # and a space: read as comments\n"
    monkeypatch.delenv("RANK")
    read_prompts(written(tmp_path, "a cat\n\na dog\n"))
    assert not capsys.readouterr().err


def test_json_lines_are_read_for_their_prompt_and_keep_the_rest(tmp_path):
    file = written(tmp_path, '{"prompt": "a cat", "tag": "single_object"}\n\n# note\na dog\n{"prompt": "é"}\n')
    assert read_entries(file) == [{"prompt": "a cat", "tag": "single_object"}, {"prompt": "a dog"}, {"prompt": "é"}]
    assert read_prompts(written(tmp_path, '{"prompt": "a \u2028cat"}\na\x85dog\n')) == ["a \u2028cat", "a\x85dog"]


def test_json_lines_may_be_strings_where_the_file_is_called_so(tmp_path):
    (file := tmp_path / "strings.jsonl").write_text('"a cat"\n"a \\"dog\\""\n')
    assert read_prompts(file) == ["a cat", 'a "dog"']
    assert read_prompts(written(tmp_path, '"a cat"\n')) == ['"a cat"']


def test_a_json_array_such_as_hpdv2s_is_read_too(tmp_path):
    file = written(tmp_path, '[\n {"prompt": "a cat", "rank": [1, 2]},\n "a dog"]')
    assert read_entries(file) == [{"prompt": "a cat", "rank": [1, 2]}, {"prompt": "a dog"}]


@pytest.mark.parametrize("key", ["text", "caption", "Prompt", "Prompts"])
def test_a_prompt_may_be_called_otherwise_and_is_given_its_name(key, tmp_path):
    assert read_entries(written(tmp_path, json.dumps({key: "a cat"}))) == [{key: "a cat", "prompt": "a cat"}]
    both = written(tmp_path, json.dumps({key: "a dog", "prompt": "a cat"}))
    assert read_prompts(both) == ["a cat"]


@pytest.mark.parametrize(
    "lines",
    [
        ["{{{masterpiece}}}, 1girl", "a cat"],
        ["{broken", "a cat"],
        ["[photo] a cat", "a [dog]"],
        ["[masterpiece]", "a cat [blurred]"],
        ["a cat, text, high detail", "a dog"],
        ["prompt, text", "a dog", "a hat, with a feather, red"],
        ["prompt", "a dog"],
    ],
)
def test_only_what_is_json_or_a_table_is_read_as_such(lines, tmp_path):
    assert read_prompts(written(tmp_path, "\n".join(lines))) == lines


# As published: PartiPrompts.tsv has letters and curly quotes and empty notes, DrawBench.csv prompts with commas.
PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tBiology-inspired concepts\n"
    'a sign that says "Hello, # you"\tArtifacts\tWriting & Symbols\t\n'
    "a conductor\u2019s hat \tAnimals\tStyle & Format\t\n"
)
DRAWBENCH = (
    "Prompts,Category\r\n"
    "A red colored car.,Colors\r\n"
    '"A zebra, underneath a ""broccoli"".",Conflicting\r\n'
    "# one,Text\r\n"
)


@pytest.mark.parametrize("suffix", ["txt", "tsv"])
def test_a_tab_separated_table_is_read_by_its_header(suffix, tmp_path):
    (file := tmp_path / f"PartiPrompts.{suffix}").write_bytes(PARTI.encode())
    assert read_prompts(file) == ["bond", 'a sign that says "Hello, # you"', "a conductor\u2019s hat"]
    assert read_entries(file)[1]["Category"] == "Artifacts"
    file.write_bytes(PARTI.replace("bond", '"bond" or "no bond"').encode())  # quotes that are no table's
    assert read_prompts(file)[0] == '"bond" or "no bond"'


@pytest.mark.parametrize("suffix", ["txt", "tsv"])
def test_a_table_that_pandas_wrote_with_its_index_is_read(suffix, tmp_path):
    (file := tmp_path / f"table.{suffix}").write_text("\n\tPrompt\tCategory\n0\ta cat\tsingle\n1\ta dog\ttwo\n")
    assert read_prompts(file) == ["a cat", "a dog"]


@pytest.mark.parametrize("suffix", ["txt", "csv"])
def test_a_comma_separated_table_is_read_by_its_header(suffix, tmp_path):
    (file := tmp_path / f"DrawBench.{suffix}").write_bytes(DRAWBENCH.encode())
    assert read_prompts(file) == ["A red colored car.", 'A zebra, underneath a "broccoli".', "# one"]
    (file := tmp_path / "one.csv").write_text('caption\n"a cat, a dog"\n\na hat\n')
    assert read_prompts(file) == ["a cat, a dog", "a hat"]


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("p.csv", "id,sentence\n1,a cat\n", "no column of its header is called prompt or prompts or text or caption"),
        ("p.csv", "prompt,id\na cat, a dog,1\n", "line 2: 3 cells under 2 columns"),
        ("p.csv", "prompt,id\n,1\n", 'line 2: it has no "prompt"'),
        ("p.csv", 'prompt,id\n"a" cat,1\n', "line 2: no row of a table"),
        ("p.json", '[\n"a cat"', "no JSON"),
        ("p.jsonl", "a\n{broken\n", "line 2: no JSON"),
        ("p.txt", "", "holds no prompt"),
        ("p.txt", "# only this\n", "holds no prompt"),
        ("p.txt", '{"prompt": "a"}\n{broken\n', "line 2: no JSON"),
        ("p.txt", '[{"prompt": "a"},\n{"prom', "no JSON"),
        ("p.txt", '{"words": "a cat"}', 'line 1: it has no "prompt", but words'),
        ("p.txt", '{"prompt": " "}', 'line 1: it has no "prompt"'),
        ("p.txt", '[\n"a cat", {"words": "a dog"}]', 'entry 1: it has no "prompt", but words'),
        ("p.txt", "[3]", 'entry 0: it has no "prompt", but 3'),
        ("p.txt", '{"prompt": 3}', 'line 1: it has no "prompt"'),
    ],
)
def test_a_bad_file_is_an_error_that_names_it_and_the_line(name, text, words, tmp_path):
    (file := tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        read_prompts(file)
    assert name in str(error.value)


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
    t5, clip = (len(tokenizer(long).input_ids) for tokenizer in (pipe.t5_tokenizer, pipe.clip_tokenizer))
    assert truncation_warning(pipe, [short, long, short]) == (
        f"warning: prompts are cut: T5 (--text-length) reads 12 tokens, 1 of 3 have more, up to {t5}; "
        f"CLIP reads 12 tokens, 1 of 3 have more, up to {clip}"
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
    file = written(tmp_path, "a photo of " + "a circle and " * 9 + "a square\n")
    monkeypatch.setattr(sys, "argv", ["command", "--prompts", str(file), "--device", "cpu", *flags])
    command.main()
    assert capsys.readouterr().err.count("warning: prompts are cut") == 1


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


def test_prompts_can_be_left_out():
    every = frozenset(e["prompt"] for e in generate(2000, (0, 0, 0, 0, 0, 1), seed=0))
    some = frozenset(sorted(every)[:40])
    assert {e["prompt"] for e in generate(2000, (0, 0, 0, 0, 0, 1), seed=0, without=some)} == every - some
    with pytest.raises(ValueError, match="--without leaves no prompt of the task single_object"):
        generate(10, (0, 0, 0, 0, 0, 1), seed=0, without=every)


def test_however_many_prompts_are_asked_for_those_that_may_be_are_found():
    every = sorted({e["prompt"] for e in generate(5000, (0, 1, 0, 0, 0, 0), seed=0)})
    few = set(every[:24])  # nine of ten that are composed are refused, in all more than when the search gives up
    entries = generate(1500, (0, 1, 0, 0, 0, 0), seed=1, without=frozenset(every) - few)
    assert len(entries) == 1500 and {e["prompt"] for e in entries} == few


def test_a_prompt_is_left_out_by_what_it_asks_for_however_it_is_worded(tmp_path):
    benches = {"tag": "counting", "include": [{"class": "bench", "count": 3}], "prompt": "a photo of three benchs"}
    without = frozenset([benches["prompt"], prompts.meaning(benches)])
    texts = {e["prompt"] for e in generate(5000, (0, 1, 0, 0, 0, 0), seed=0, without=without)}
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
    out, without = tmp_path / "deep" / "p.jsonl", tmp_path / "without.txt"
    without.write_text("a photo of a cat\n")
    monkeypatch.setattr(sys, "argv", ["prompts.py", "--out", str(out), "--num", "34", "--without", str(without)])
    prompts.main()
    assert [e["tag"] for e in read_entries(out)].count("position") == 14 and str(out) in capsys.readouterr().out
    assert all(json.loads(line)["include"] for line in out.read_text().splitlines())


@pytest.mark.parametrize(
    "arguments",
    [["--num", "0"], ["--ratio", "0", "0", "0", "0", "0", "0"], ["--without", "no.txt"], ["--out", f"{__file__}/p"]],
)
def test_a_bad_flag_is_named(arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["prompts.py", "--out", str(tmp_path / "p"), *arguments])
    with pytest.raises(SystemExit) as exit_:
        prompts.main()
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and (arguments[0] in said or "no.txt" in said)
