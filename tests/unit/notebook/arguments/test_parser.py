"""Magic lines: options, the prompt, and error messages."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_magic.backends import registry
from llm_magic.config.settings import GenerationConfig, Settings
from llm_magic.errors import OptionError
from llm_magic.notebook.arguments import HelpRequested
from llm_magic.notebook.arguments.parser import (
    Parsed,
    assignments,
    parse,
    parse_with_cell,
    parse_with_prompt,
    split_line,
)
from llm_magic.notebook.arguments.unknown_options import DASHES

PROMPT_START = st.characters(exclude_categories=["Cs"], exclude_characters=["-", *DASHES])


def given_values(parsed: Parsed) -> dict[str, Any]:
    """Return the arguments that were on the line."""
    return {name: value for name, value in parsed.items() if value is not None}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", []),
        ("a  b\t c", ["a", "b", "c"]),
        ("-s 'two words' \"it's\"", ["-s", "two words", "it's"]),
        (r"C:\models\new C:\Users\me\x.gguf", [r"C:\models\new", r"C:\Users\me\x.gguf"]),
        ("a#b # c", ["a#b", "#", "c"]),
        ("--stop ''", ["--stop", ""]),
        ("--stop=a' 'b", ["--stop=a b"]),
        ("größe 日本", ["größe", "日本"]),
    ],
)
def test_line_is_split_at_spaces_outside_quotes(line: str, expected: list[str]) -> None:
    assert split_line(line) == expected


@pytest.mark.parametrize("line", ["it's", '-s "open', "-s 'a\" b"])
def test_unclosed_quote_is_an_option_error(line: str) -> None:
    with pytest.raises(OptionError, match="Missing closing quote"):
        split_line(line)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", []),
        ("a b", ["a", "b"]),
        ("# all of it", []),
        ("a  # why", ["a"]),
        ("a\t#why # and more", ["a"]),
        ("model#2 '# 1' \"#2\" x'#'# #", ["model#2", "# 1", "#2", "x##"]),
        ("a\xa0#b \f#c # why", ["a\xa0#b", "\f#c"]),
    ],
)
def test_a_comment_ends_a_line(line: str, expected: list[str]) -> None:
    assert parse("llm_config", line)["changes"] == expected


def test_a_number_sign_in_a_value_starts_no_comment() -> None:
    assert parse("llm", "--stop '#' # it's a comment").options == {"stop": ("#",)}
    params = parse("llm", '-p x={"a": "#1 \\" # 2"} # "why').options["extra"]
    assert params == {"x": {"a": '#1 " # 2'}}


def test_a_comment_is_no_argument() -> None:
    assert given_values(parse("llm_unload", "tiny # for now")) == {"name": "tiny"}
    assert parse_with_prompt("llm", "-t 0 What is # in Python?").prompt == "What is # in Python?"


# -- the prompt of a line ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "options", "prompt"),
    [
        ("Hello", {}, "Hello"),
        ("-t 0 What's 'this'?", {"temperature": "0"}, "What's 'this'?"),
        ("-t 0   two  spaces  kept ", {"temperature": "0"}, "two  spaces  kept"),
        ("--temperature=0 a --b -t", {"temperature": "0"}, "a --b -t"),
        ("-- Hello -t 0.2", {}, "Hello -t 0.2"),
        ("What does docker stop -t 1 do?", {}, "What does docker stop -t 1 do?"),
        ("sort -t", {}, "sort -t"),
        ("tail -f log.txt", {}, "tail -f log.txt"),
        ("a-t 0.2", {}, "a-t 0.2"),
        ("Say `-t 0.2`", {}, "Say `-t 0.2`"),
        ("-t0.5 x", {"temperature": "0.5"}, "x"),
        ("  -t 0 -- -- dash first", {"temperature": "0"}, "-- dash first"),
        ("-- -5 + 3?", {}, "-5 + 3?"),
        ('--top-k 3 "quoted" stays', {"top_k": "3"}, '"quoted" stays'),
        (r"-t 0 C:\new {x} \n", {"temperature": "0"}, r"C:\new {x} \n"),
        ("-t 0 été — 日本\u00a0ok", {"temperature": "0"}, "été — 日本\u00a0ok"),
        ("-t 0", {"temperature": "0"}, ""),
        ("-t -0.5 x", {"temperature": "-0.5"}, "x"),
    ],
)
def test_text_after_options_is_the_prompt(line: str, options: dict[str, Any], prompt: str) -> None:
    parsed = parse_with_prompt("llm", line)
    assert (parsed.options, parsed.prompt, parsed.notes) == (options, prompt, ())


@pytest.mark.parametrize(
    "end",
    [
        "-t 0.2",
        "-t0.2",
        "--temperature=0.2",
        "-t 0 --max-new-tokens 5",
        "-s 'Be brief.' -t 0",
        "--dry-run",
        "-f json",
        "--bg -o answer",
        "--stop '\\n'",
    ],
)
def test_options_after_the_prompt_are_an_error(end: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_with_prompt("llm", f"--quiet It's a test: {end}")
    assert str(caught.value) == (
        f"{end} follows the prompt. Write options before the prompt: %llm --quiet {end} PROMPT."
        " To send it as text: %llm -- PROMPT"
    )
    assert parse_with_prompt("llm", f"-- It's a test: {end}").prompt == f"It's a test: {end}"


def test_dry_run_below_the_first_line_is_an_error() -> None:
    with pytest.raises(OptionError) as caught:
        parse_with_cell("llm", "-t 0", "--dry-run\nHello")
    assert str(caught.value) == (
        "--dry-run follows the first line. To use options, write them on the first line: %%llm --dry-run"
    )
    assert parse_with_cell("llm", "-t 0", "-t 0\nHello").notes


def test_options_before_an_unknown_one_after_the_prompt_are_an_error() -> None:
    with pytest.raises(OptionError) as caught:
        parse_with_prompt("llm", "What is 2+2? -t 0 --max-tokens 10")
    assert str(caught.value) == (
        "-t 0 follows the prompt. Write options before the prompt: %llm -t 0 PROMPT. %llm has no option"
        ' --max-tokens. Did you mean "--max-new-tokens"? To send it as text: %llm -- PROMPT'
    )
    with pytest.raises(OptionError, match="PROMPT") as caught:
        parse_with_prompt("llm", "--quiet What is 2+2? -t 0 --max-tokens 10")
    assert "before the prompt: %llm --quiet -t 0 PROMPT. %llm has no option" in str(caught.value)


@pytest.mark.parametrize("end", ["-c 5", "-m pip", "-o out.txt", "-s x -o y", "-p a=1", "-t 3"])
def test_what_may_be_an_option_after_the_prompt_gets_a_note(end: str) -> None:
    parsed = parse_with_prompt("llm", f"Explain this: tail {end}")
    assert parsed.prompt == f"Explain this: tail {end}"
    assert parsed.notes == (
        f"{end} is sent as part of the prompt. Write options before the prompt: %llm {end} PROMPT",
    )
    assert parse_with_prompt("llm", f"-- Explain this: tail {end}").notes == ()


@pytest.mark.parametrize(
    ("end", "advice"),
    [
        ("--json", 'Did you mean "-f json"?'),
        ("--temprature 0", 'Did you mean "--temperature"?'),
        ("--n=3", "To limit the answer, use --max-new-tokens"),
        ("-temperature 0", 'Did you mean "--temperature"?'),
        ("--temperature", "Write options before the prompt. See %llm -h"),
        ("--force", ""),
        ("-rf", ""),
        ("--oneline -5", ""),
    ],
)
def test_unknown_option_after_the_prompt_gets_a_note_if_one_of_ours_is_meant(
    end: str, advice: str
) -> None:
    notes = parse_with_prompt("llm", f"Explain this: git log {end}").notes
    assert len(notes) == bool(advice)
    for note in notes:
        assert note.startswith(f"{end} is sent as part of the prompt. {advice}")


def test_quoted_value_may_look_like_an_option() -> None:
    parsed = parse_with_prompt("llm", """-s "You're -t 1" --literal --stop=' x' it's me""")
    assert (parsed["system"], parsed["literal"], parsed.prompt) == ("You're -t 1", True, "it's me")
    assert parsed.options == {"stop": (" x",)}


@given(PROMPT_START, st.text())
def test_prompt_without_options_is_unchanged(first: str, following: str) -> None:
    prompt = (first + following).strip()
    if not prompt.startswith("-"):
        assert parse_with_prompt("llm", first + following).prompt == prompt


@given(PROMPT_START, st.text())
def test_prompt_after_options_is_unchanged(first: str, following: str) -> None:
    prompt = (first + following).strip()
    if not prompt.startswith("-"):
        parsed = parse_with_prompt("llm", f"-t 0 -s 'a b' --literal {prompt}")
        assert parsed.prompt == prompt
        assert (parsed["system"], parsed["literal"], parsed.options) == (
            "a b", True, {"temperature": "0"},
        )  # fmt: skip


@given(st.text())
def test_two_dashes_end_the_options(prompt: str) -> None:
    assert parse_with_prompt("llm", f"--literal -- {prompt}").prompt == prompt.strip()


def test_unclosed_quote_before_the_prompt_is_an_option_error() -> None:
    with pytest.raises(
        OptionError, match=r"Missing closing quote\. Add it or remove the opening one: 'open"
    ):
        parse_with_prompt("llm", "-t 0 -s 'open")


# -- every option of the product ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("org/model", {"model": "org/model"}),
        (r"C:\models\x.gguf", {"model": r"C:\models\x.gguf"}),
        ("--name qwen", {"name": "qwen"}),
        ("--keep --bg", {"keep": True, "bg": True}),
    ],
)
def test_the_arguments_of_llm_load(line: str, values: dict[str, Any]) -> None:
    parsed = parse("llm_load", line)
    assert given_values(parsed) == values
    assert parsed.options == {}


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("-b local", {"backend": "local"}),
        ("--backend local", {"backend": "local"}),
        ("-d cuda:1", {"device": "cuda:1"}),
        ("--device cpu", {"device": "cpu"}),
        ("-q 4bit", {"quantization": "4bit"}),
        ("--quantization=8bit", {"quantization": "8bit"}),
        ("--dtype bf16", {"dtype": "bf16"}),
        ("--revision v1.0", {"revision": "v1.0"}),
        ("--trust-remote-code", {"trust_remote_code": True}),
        ("--attn sdpa", {"attn": "sdpa"}),
    ],
)
def test_the_loading_options_make_a_load_config(line: str, options: dict[str, Any]) -> None:
    parsed = parse("llm_load", f"m {line}")
    assert parsed.options == options
    assert parsed["model"] == "m"
    assert registry.load_config(Settings(), parsed.options)


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("-m a", {"model": "a"}),
        ("--model a", {"model": "a"}),
        ("-s 'be {tone}'", {"system": "be {tone}"}),
        ("--system x", {"system": "x"}),
        ("-c c1", {"chat": "c1"}),
        ("--chat c1", {"chat": "c1"}),
        ("-o r", {"output": "r"}),
        ("--output r", {"output": "r"}),
        *((f"-f {form}", {"format": form}) for form in ("markdown", "text", "code", "json")),
        ("--format=json", {"format": "json"}),
        ("--literal --dry-run", {"literal": True, "dry_run": True}),
        ("--plain --quiet", {"plain": True, "quiet": True}),
    ],
)
def test_the_arguments_of_llm(line: str, values: dict[str, Any]) -> None:
    for parsed in (parse("llm", line), parse_with_prompt("llm", f"{line} prompt")):
        assert given_values(parsed) == values
        assert parsed.options == {}


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("-t 0", {"temperature": "0"}),
        ("--temperature 0", {"temperature": "0"}),
        ("--top-p 0.5", {"top_p": "0.5"}),
        ("--top-k none", {"top_k": "none"}),
        ("--max-new-tokens=9", {"max_new_tokens": "9"}),
        ("--repetition-penalty 1", {"repetition_penalty": "1"}),
        ("--seed 7", {"seed": "7"}),
        ("--stop A --stop 'B C'", {"stop": ("A", "B C")}),
        (r"--stop '\n\n' --stop=a\tb", {"stop": ("\n\n", "a\tb")}),
        ("-p min_p=0.1 --param x=y", {"extra": {"min_p": 0.1, "x": "y"}}),
    ],
)
def test_the_generation_options_make_a_generation_config(
    line: str, options: dict[str, Any]
) -> None:
    for parsed in (parse("llm", line), parse_with_prompt("llm", f"{line} prompt")):
        assert parsed.options == options
        GenerationConfig().replace(**parsed.options)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("1.5", 1.5), ("true", True), ("null", None), ("[1,2]", [1, 2]), ("'{\"a\": 1}'",
     {"a": 1}), ("True", "True"), ("a=b", "a=b"), ("", "")],
)  # fmt: skip
def test_values_of_params_are_json_where_they_can_be(text: str, value: object) -> None:
    assert parse("llm", f"-p key={text}").options["extra"] == {"key": value}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(JSON, st.booleans(), st.sampled_from([None, 1]))
def test_json_value_of_param_arrives_as_that_value(
    value: object, ascii_only: bool, indent: int | None
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    for option in ("-p x=", "--param x=", "-px=", "--param=x=", "-p  \tx="):
        line = f"-t 0 {option}{text} --stop 'a b' -p y=1"
        for parsed in (parse("llm", line), parse_with_prompt("llm", f"{line} it's {{it}}")):
            assert parsed.options["extra"] == {"x": value, "y": 1}
            assert type(parsed.options["extra"]["x"]) is type(value)
            assert parsed.options["stop"] == ("a b",)
    assert parsed.prompt == "it's {it}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"type":"json_object"}', {"type": "json_object"}),
        ('{"type": "json_object", "a": [1, {"b": "c d"}]}',
         {"type": "json_object", "a": [1, {"b": "c d"}]}),
        ('\'{"a": "it is"}\'', {"a": "it is"}),
        ('"two words"', "two words"),
        ("'two words'", "two words"),
        ('"true"', "true"),
        ("true", True),
        ("null", None),
        ("1.5", 1.5),
        ("1.5.3", "1.5.3"),
        ('"a\\nb"', "a\nb"),
        ('"a"b', "ab"),
        ("[a-z]+", "[a-z]+"),
        ("[[:alpha:]]{3}", "[[:alpha:]]{3}"),
        ("{3}", "{3}"),
        ("{name}", "{name}"),
        # No JSON, though Python's parser takes them: no server would.
        ("NaN", "NaN"),
        ("-Infinity", "-Infinity"),
        ("1e400", "1e400"),
        ("9" * 5000, "9" * 5000),
    ],
)  # fmt: skip
def test_value_of_param_is_read_as_json_before_quotes_go(text: str, value: object) -> None:
    extra = parse("llm", f"-p key={text} -t 0").options["extra"]
    assert extra == {"key": value}
    assert type(extra["key"]) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1', '-p key: invalid JSON: {"a": 1 (Expecting'),
        ("{'a': 1}", "double quotes"),
        ("['a', 'b']", "double quotes"),
        ("'{\"a\": }'", "Expecting value"),
        ('{"a": 1}x', "unexpected text after its end"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": [1e400]}', "1e400 is too large"),
        ("[" * 100_000 + '"', "nested too deeply"),
        ('{"a":' * 300 + "1" + "}" * 300, "nested too deeply"),
    ],
)
def test_invalid_json_of_param_is_an_error(text: str, message: str) -> None:
    for read in (parse, parse_with_prompt):
        with pytest.raises(OptionError) as caught:
            read("llm", f"-t 0 -p key={text}")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("magic", "line", "values"),
    [
        ("llm_config", "temperature=0.2 top_k=40", {"changes": ["temperature=0.2", "top_k=40"]}),
        ("llm_config", "--reset", {"reset": True, "changes": []}),
        ("llm_models", "-b local", {"backend": "local"}),
        ("llm_models", "--backend local", {"backend": "local"}),
        ("llm_unload", "tiny", {"name": "tiny"}),
        ("llm_unload", "--all", {"all": True}),
        ("llm_reset", "c1", {"chat": "c1"}),
        ("llm_status", "", {}),
        ("llm_chats", "  ", {}),
    ],
)
def test_the_arguments_of_the_others(magic: str, line: str, values: dict[str, Any]) -> None:
    assert given_values(parse(magic, line)) == values


def test_omitted_argument_is_none() -> None:
    parsed = parse("llm", "")
    assert given_values(parsed) == {}
    assert parsed.options == {}


# -- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("magic", "line", "message"),
    [
        ("llm", "--temprature 0", '%llm has no option --temprature. Did you mean "--temperature"'),
        ("llm_load", "m --quantisation 4bit", 'Did you mean "--quantization"'),
        ("llm", "--temp 0", "%llm has no option --temp."),
        ("llm", "-T 0", '%llm has no option -T. Did you mean "-t"?'),
        ("llm_chats", "--export", "--export needs a value: --export FILE."),
        (
            "llm",
            "-max_new_tokens 30",
            'no option -max_new_tokens. Did you mean "--max-new-tokens"?',
        ),
        ("llm", "temperature 0", "Write options with hyphens: --temperature."),
        ("llm", "-model x", '%llm has no option -model. Did you mean "--model"?'),
        (
            "llm_load",
            "x -quantization=4bit",
            '%llm_load has no option -quantization. Did you mean "--',
        ),
        ("llm_unload", "--al", '%llm_unload has no option --al. Did you mean "--all"?'),
        ("llm", "hello", "'hello' is not an option of %%llm. Put the prompt below the first line"),
        ("llm", "-b", "%llm has no option -b. It is an option of %llm_load."),
        (
            "llm_load",
            "x -t 0",
            "%llm_load has no option -t. It is an option of %llm."
            " To set it for all prompts, run %llm_config temperature=T.",
        ),
        ("llm_status", "--all", "It is an option of %llm_unload."),
        ("llm", "-f raw", "--format raw is invalid. Use markdown, text, code or json."),
        ("llm", "-f jsn", '--format jsn is invalid. Did you mean "json"?'),
        ("llm", "-t", "%llm: -t needs a value: -t T. See %llm -h"),
        (
            "llm_load",
            "--trust-remote-code=yes",
            "%llm_load: --trust-remote-code takes no value. Write --trust-remote-code or omit it.",
        ),
        ("llm", "--bg=false", "%llm: --bg takes no value. Write --bg or omit it."),
        ("llm", "-s --quiet", "%llm: -s needs a value: -s TEXT. See %llm -h"),
        ("llm", "--choice -1,0,1 -o x", 'LABELS. Put it in quotes: --choice "-1,0,1".'),
        ("llm", "-p x", "-p x has no value. Write -p key=value."),
        ("llm", "-p =5", "-p =5 has no key. Write -p key=value."),
        ("llm", "-p x=1 -p x=2", "-p x is given twice. Keep one of them."),
        ("llm", "-m a --model b", "%llm: -m, --model is given twice. Keep one of them."),
        ("llm", "-t 0 -t 1", "%llm: -t, --temperature is given twice."),
        ("llm_load", "-b local -b local", "%llm_load: -b, --backend is given twice."),
        ("llm", "--batch rows", '%llm has no option --batch. Did you mean "--over"?'),
        ("llm", "--json-schema S", '%llm has no option --json-schema. Did you mean "--schema"?'),
        ("llm", "--labels a,b", 'Did you mean "--choice"?'),
        ("llm", "--pattern S", 'Did you mean "--regex"?'),
        ("llm", "--image a.png", "%llm has no option --image. A prompt is text;"),
        ("llm", "--tools f", "%llm has no option --tools. The model cannot call functions."),
        ("llm_chats", "--delete zoo", "%llm_reset CHAT deletes the turns of a chat."),
        ("llm", "--cache", "%llm has no option --cache. Answers are not cached;"),
        ("llm", "--template t", "{name} is replaced with the value of name."),
        (
            "llm",
            "--stream",
            "Answers are streamed unless the environment has LLM_MAGIC_STREAM=off.",
        ),
        ("llm", "--no-stream", "LLM_MAGIC_STREAM=off in the environment"),
        ("llm", "--n 3", "use --over DATA"),
        ("llm", "-n 3", "use --over DATA"),
        ("llm", "--file x", "%llm has no option --file. Read the file into a variable"),
        ("llm", "--prompt x", "%llm has no option --prompt. The prompt is the text below %%llm"),
        ("llm_load", "--stream", "%llm_load has no option --stream. See %llm_load -h"),
        (
            "llm_explain",
            "--schema x",
            "%llm_explain has no option --schema. It is an option of %llm.",
        ),
        ("llm_load", "a b", "%llm_load: unexpected argument 'b'. Usage: %llm_load"),
        ("llm_status", "now", "%llm_status: unexpected argument 'now'"),
    ],
)
def test_error_is_one_line_with_next_step(magic: str, line: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse(magic, line)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("magic", "name", "ours"),
    [
        ("llm", "raw", "--literal"),
        ("llm", "background", "--bg"),
        ("llm", "json", "-f json"),
        ("llm", "max-tokens", "--max-new-tokens"),
        ("llm", "temp", "--temperature"),
        ("llm", "system-prompt", "--system"),
        ("llm_load", "no-wait", "--bg"),
        ("llm_load", "load-in-4bit", "-q 4bit"),
        ("llm_load", "url", "--base-url"),
    ],
)
def test_option_of_other_tools_suggests_ours(magic: str, name: str, ours: str) -> None:
    with pytest.raises(OptionError, match=f'has no option --{name}. Did you mean "{ours}"'):
        parse(magic, f"--{name}")


@pytest.mark.parametrize("line", ["-h", "--help", "-s x -h", "--nothere --help", "-h --nothere"])
def test_help_is_requested_wherever_it_stands(line: str) -> None:
    for read in (parse, parse_with_prompt):
        with pytest.raises(HelpRequested):
            read("llm", line)


def test_help_in_a_value_or_a_prompt_is_text() -> None:
    for line in ("-s '-h'", '-s "-h" --stop "--" -f text'):
        assert parse("llm", line)["system"] == "-h"
        assert parse_with_prompt("llm", f"{line} x")["system"] == "-h"
    assert parse("llm", "--stop '---'").options == {"stop": ("---",)}
    assert parse_with_prompt("llm", "What does -h do?").prompt == "What does -h do?"


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("temperature=0.2 max-new-tokens=5 stop=a=b",
         {"temperature": "0.2", "max_new_tokens": "5", "stop": "a=b"}),
        ("temperature 0.2 top_k = 5 top_p= 0.3 seed =4",
         {"temperature": "0.2", "top_k": "5", "top_p": "0.3", "seed": "4"}),
        ("temperature=0.2, top_k=5,", {"temperature": "0.2", "top_k": "5"}),
        ("temperature -1", {"temperature": "-1"}),
        ("stop a stop = b", {"stop": ["a", "b"]}),
        ("stop top_p", {"stop": "top_p"}),  # a text
        ("temperature top_k 5", {"top_k": "5"}),  # the first is only named
        ("temperature", {}),
        ("system=\"Be brief, please.\" seed=none", {"system": "Be brief, please.", "seed": "none"}),
        (r'system="two\nlines, C:\\new"', {"system": "two\nlines, C:\\new"}),
        ("system=\"\" seed=1", {"system": "", "seed": "1"}),
        ("extra=none", {"extra": "none"}),
        ("", {}),
    ],
)  # fmt: skip
def test_assignments(line: str, changes: dict[str, object]) -> None:
    assert assignments(split_line(line)) == changes


@pytest.mark.parametrize(
    ("line", "stop"),
    [
        ("stop=['a','b']", ["a", "b"]),
        ('stop = ["a b", "c\\n"] seed=1', ["a b", "c\n"]),
        ("stop ['a', ]", "a"),
        ("stop=[]", []),
        ("stop=[END]", "[END]"),
        ('stop="[1]" stop=[x', ["[1]", "[x"]),
        ("stop=a=['b']", "a=[b]"),
    ],
)
def test_list_of_stop_strings_is_written_as_in_python(line: str, stop: object) -> None:
    assert assignments(parse("llm_config", line)["changes"])["stop"] == stop


def test_list_is_a_value_of_the_stop_option() -> None:
    assert parse("llm", "--stop ['a', 'b'] --stop c").options == {"stop": ("a", "b", "c")}
    assert parse("llm", "--stop=['a'] -t 0").options["stop"] == ("a",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("temprature 0.2", "'temprature' is not a setting. Did you mean \"temperature\""),
        ("temperature 0.2 0.3", "'0.3' is not a setting"),
        ("temperature: 0.2", "'temperature:' is not a setting. Write temperature=VALUE."),
        ("temperature:0.2", "Write temperature=VALUE."),
        ("=3", "A value has no name. Write NAME=VALUE."),
        ("=", "A value has no name."),
        ("system Be brief.", "'brief.' is not a setting. Put a text in quotes: system=\"…\"."),
        ("top_k=1 top-k 2", "top_k is given twice."),
        ("extra={a:1}", "Write -p KEY=VALUE for each value of extra."),
        ("api_key=sk-1234", "A key in a cell is saved with the notebook."),
    ],
)
def test_wrong_assignment_raises(line: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        assignments(split_line(line))
    assert message in str(caught.value)
    assert "sk-1234" not in str(caught.value)


def test_options_stand_between_settings() -> None:
    parsed = parse("llm_config", "top_k 3 -t 0.2 -p a=1 --stop x seed=4")
    assert parsed["changes"] == ["top_k", "3", "seed=4"]
    assert parsed.options == {"temperature": "0.2", "extra": {"a": 1}, "stop": ("x",)}


@pytest.mark.parametrize(
    ("line", "over", "output"),
    [
        ("--over reviews -o out", "reviews", "out"),
        ("--over df[df.stars < 3] -o x", "df[df.stars < 3]", "x"),
        ('--over "df[df.stars < 3]" -o x', "df[df.stars < 3]", "x"),
        ('--over df["text"] -o df["label"]', 'df["text"]', 'df["label"]'),
        ("--over=df['a b'].head(3) -o x", "df['a b'].head(3)", "x"),
        ("--over range(0, 10)", "range(0, 10)", None),
        ("--over 'a b'.split()", "'a b'.split()", None),
        ('--over "a b".split()[1:] -o x', '"a b".split()[1:]', "x"),
        ("--over='a b'.split() -o x", "'a b'.split()", "x"),
        ("--over 'a b'['x'] -o x", "'a b'['x']", "x"),
        ("--over 'my data' -o x", "my data", "x"),
        ("--over [f(x[0]) for x in {1: '('}] -o x", "[f(x[0]) for x in {1: '('}]", "x"),
        ("--over {reviews}", "{reviews}", None),
        ('--over ["a","b"]*2 -o x', '["a","b"]*2', "x"),
        ('--over ["a", "b"] * 2 -o x', '["a", "b"] * 2', "x"),
        ('--over ["a", "b"] + ["c"] -o x', '["a", "b"] + ["c"]', "x"),
        ('--over=["a", "b"]+more -o x', '["a", "b"]+more', "x"),
        ('--over more + ["c"] -o x', 'more + ["c"]', "x"),
        ('--over df["city"].fillna("none") + "!" -o x', 'df["city"].fillna("none") + "!"', "x"),
        (
            '--over df[df["city"]=="Rome"]["city"]+"!" -o x',
            'df[df["city"]=="Rome"]["city"]+"!"',
            "x",
        ),
        ('--over a=="b" -o x', 'a=="b"', "x"),
        ('--over=a=="b"', 'a=="b"', None),
        ("--over 'xs + ys' -o x", "xs + ys", "x"),
        ("--over xs -o x", "xs", "x"),
        ('--over xs["a"] -o x', 'xs["a"]', "x"),
    ],
)
def test_code_keeps_its_quotes_and_brackets(line: str, over: str, output: str | None) -> None:
    parsed = parse("llm", line, lambda _text: {})
    assert (parsed["over"], parsed["output"]) == (over, output)


def test_labels_lose_their_quotes() -> None:
    assert parse("llm", '--choice "very good",bad')["choice"] == "very good,bad"


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("--over xs + ys", 'in quotes, --over "a + b", or assign it to a variable.'),
        ("-o r1, r2", "One variable stores the answer: -o r1."),
        ("-o my answer", "The name of a variable has no spaces: -o my_answer."),
    ],
)
def test_value_with_spaces_has_advice(line: str, advice: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_with_cell("llm", line, "Hello")
    assert advice in str(caught.value)
