"""An error fails its cell with one line and the next step, and changes nothing."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests import tiny_models
from tests.kernels import ROOT, Kernel, Ran, kernel

MODEL = "SmolLM2-135M-Instruct"

MISTAKES = {
    "%llm_load SmolLM2-135M-Instrukt": ("LoadFailed", f'Did you mean "{MODEL}"'),
    "%llm_load HuggingFaceTB/SmolLM2-135M-Instrukt": ("LoadFailed", f'Did you mean "{MODEL}"?'),
    "%llm_load ./nowhere": ("ModelNotFound", "There is no file or folder './nowhere'."),
    "%llm_load -d cuda": ("DeviceUnavailable", "CUDA is not available: {build}. Use -d cpu."),
    "%llm_load -d cuda:7": ("DeviceUnavailable", "Use -d cpu"),
    "%llm_load -d mps": ("DeviceUnavailable", "Use -d cpu"),
    "%llm_load -d gpu": (
        "OptionError",
        "device=gpu is invalid. Use auto, cpu, cuda, cuda:N or mps.",
    ),
    "%llm_load -q 3bit": (
        "OptionError",
        "quantization=3bit is invalid. Use none, 8bit, 4bit, bnb-8bit or bnb-4bit.",
    ),
    "%llm_load --dtype int8": ("OptionError", "dtype=int8 is invalid. Use"),
    "%llm_load -b olama": ("OptionError", "There is no backend 'olama'. Did you mean \"ollama\"?"),
    "%llm_load one two": ("OptionError", "%llm_load: unexpected argument 'two'."),
    "%llm_load --kep": ("OptionError", '%llm_load has no option --kep. Did you mean "--keep"'),
    "%%llm --temprature 1\nx": ("OptionError", 'Did you mean "--temperature"'),
    "%%llm -t hot\nx": ("OptionError", "temperature=hot is not a number. It must be 0 to 2."),
    "%%llm -t 3\nx": ("OptionError", "temperature=3 is out of range. It must be 0 to 2."),
    "%%llm -t nan\nx": ("OptionError", "temperature=nan is out of range. It must be"),
    "%%llm --top-k 0\nx": ("OptionError", "top_k=0 is out of range. It must be 1 or more."),
    "%%llm --top-k 1.5\nx": (
        "OptionError",
        "top_k=1.5 is not a whole number. It must be 1 or more.",
    ),
    "%%llm --top-p\nx": ("OptionError", "--top-p"),
    "%%llm -f pdf\nx": (
        "OptionError",
        "--format pdf is invalid. Use markdown, text, code or json.",
    ),
    "%%llm -m a -m b\nx": ("OptionError", "-m, --model is given twice. Keep one of them."),
    "%%llm --schema S\nx": ("OptionError", "--schema S: S is not defined."),
    "%%llm -q 4bit\nx": ("OptionError", "has no option -q. It is an option of %llm_load."),
    "%%llm -n 20\nx": ("OptionError", "To limit the answer, use --max-new-tokens NUMBER."),
    "%llm_unload --force": ("OptionError", "To stop them first, run %llm_stop."),
    "%llm_stop --all": ("OptionError", "%llm_stop stops all jobs, %llm_stop JOB only one."),
    "%%llm -m other-70b\nx": (
        "ModelNotLoaded",
        f"other-70b is not loaded. Loaded models: {MODEL}. Run %llm_load other-70b.",
    ),
    "%%llm -p min_q=1\nx": ("OptionError", "no generation option 'min_q'. Did you mean"),
    "%%llm -p num_beams=4\nx": (
        "OptionError",
        "-p num_beams cannot be used with a streamed answer.",
    ),
    "%%llm -p min_p\nx": ("OptionError", "-p min_p has no value. Write -p key=value."),
    "%%llm -o class\nx": (
        "OptionError",
        "-o class: class is a keyword of Python. Choose another name.",
    ),
    "%%llm -o 1st\nx": ("OptionError", "-o 1st: this is not a valid variable name."),
    "%%llm -o 'my answer'\nx": (
        "OptionError",
        "not a valid variable name. Did you mean my_answer?",
    ),
    "%%llm -o 'a class'\nx": ("OptionError", "not a valid variable name. Did you mean a_class?"),
    "%%llm -o r_{c}\nx": ("OptionError", "for each c: answers[c] = %llm …"),
    "%%llm -o my answer\nx": ("OptionError", "has no spaces: -o my_answer."),
    "%%llm -o df['answer']\nx": ("OptionError", "Use a plain name, such as answer, and assign its"),
    "%%llm -t 0 \\\nx": (
        "OptionError",
        "A backslash continues no line. Write all options of %%llm",
    ),
    "%%llm --version\nx": ("OptionError", "%%llm has no option --version. See %%llm -h"),
    "%%llm -m gpt-4\nx": ("ModelNotLoaded", "Run %llm_load gpt-4 -b openai."),
    "%llm_config reset": ("OptionError", 'Did you mean "--reset"?'),
    "%%llm -o get_ipython\nx": (
        "OptionError",
        "-o get_ipython: Python or IPython uses this name. Choose another.",
    ),
    "%%llm -o In\nx": ("OptionError", "-o In: Python or IPython uses this name. Choose another."),
    "%%llm -o __builtins__\nx": (
        "OptionError",
        "-o __builtins__: Python or IPython uses this name. Choose another.",
    ),
    "%%llm -o _i12\nx": (
        "OptionError",
        "-o _i12: Python or IPython uses this name. Choose another.",
    ),
    "%%llm -s 'open\nx": (
        "OptionError",
        "Missing closing quote. Add it or remove the opening one: 'open",
    ),
    "%%llm -c my chat\nx": (
        "OptionError",
        "'chat' is not an option of %%llm. Put a value with spaces in quotes: -c \"my chat\".",
    ),
    "%%llm -t 0 -s \u201cBe brief.\u201d -o x\ny": (
        "OptionError",
        'Put a value with spaces in straight quotes: -s "Be brief.".',
    ),
    "%llm_chats my chat": ("OptionError", 'spaces in quotes: %llm_chats "my chat".'),
    "%%llm \u2013t 0.5\nx": (
        "OptionError",
        "\u2013t starts with a dash. Options start with a hyphen: -t.",
    ),
    "%llm -t 0 \u2014seed 3 Hi": (
        "OptionError",
        "Options start with a hyphen: --seed. To send it as text: %llm -- PROMPT",
    ),
    "%llm_config \u2013t 0.5": ("OptionError", "Options start with a hyphen: -t."),
    "%%llm hello\nx": ("OptionError", "Put the prompt below the first line"),
    "%%llm -m nobody\nx": ("ModelNotLoaded", "nobody is not loaded. Loaded models: "),
    f"%%llm -m {MODEL[:-1]}\nx": ("ModelNotLoaded", f'Did you mean "{MODEL}"?'),
    "%llm": ("OptionError", "The prompt is empty. Write it after %llm, or below %%llm."),
    "%llm -t 0": ("OptionError", "The prompt is empty. Write it after %llm, or below %%llm."),
    "%%llm\n{value.nope}": ("PromptError", "Correct the name nope"),
    "%llm_config temperture=1": ("OptionError", 'Did you mean "temperature"?'),
    "%llm_config temperature high": (
        "OptionError",
        "temperature=high is not a number. It must be 0 to 2.",
    ),
    "%llm_config temperature=9 top_k=3": (
        "OptionError",
        "temperature=9 is out of range. It must be 0 to 2.",
    ),
    "%llm_config --reset top_k=3": ("OptionError", "--reset and new values cannot be combined."),
    "%llm_unload nobody": ("ModelNotLoaded", f"nobody is not loaded. Loaded models: {MODEL}."),
    "%llm_unload nobody --all": (
        "OptionError",
        "--all and the name of a model cannot be combined.",
    ),
    "%llm_reset nobody": ("OptionError", "There is no chat 'nobody'"),
    "%llm_models -b nowhere": ("OptionError", "There is no backend 'nowhere'."),
    "%llm_status now": ("OptionError", "%llm_status: unexpected argument 'now'."),
    "%llm_status {now}": ("OptionError", "%llm_status: unexpected argument '{now}'."),
    "llm.generate('x', temperature=3)": (
        "OptionError",
        "temperature=3 is out of range. It must be 0 to 2.",
    ),
    "llm.generate('x', temprature=1)": ("OptionError", 'Did you mean "temperature"'),
    "llm.generation.top_k = 0": ("OptionError", "top_k=0 is out of range. It must be 1 or more."),
    "llm.load('x', quantisation='4bit')": ("OptionError", 'Did you mean "quantization"'),
}


def assert_one_line(ran: Ran, ename: str, message: str) -> None:
    assert ran.status == "error"
    assert (ran.ename, len(ran.traceback)) == (ename, 1), ran.text
    assert "\n" not in ran.traceback[0]
    assert ran.error in ran.traceback[0]
    assert message in ran.error


@pytest.mark.parametrize("code", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(loaded: Kernel, code: str) -> None:
    loaded.ok("value, before = 1, (llm.generation.top_k, llm.status().models, llm.last)")
    ename, message = MISTAKES[code]
    build = loaded.value(
        "'no GPU was found' if __import__('torch').version.cuda else 'this torch is built for the CPU only'"
    )
    assert_one_line(loaded.run(code), ename, message.replace("{build}", build))
    assert loaded.value("before == (llm.generation.top_k, llm.status().models, llm.last)")


def test_earlier_model_answers_after_failed_load(loaded: Kernel) -> None:
    ran = loaded.run("%llm_load nope/nope")
    assert ran.ename in {"ModelNotFound", "LoadFailed"}
    assert ran.error.endswith(f" {MODEL} is still active.")
    assert "nope/nope" in loaded.ok("%llm_status").text
    assert loaded.value("llm.status().status") == "Ready"
    loaded.ok("%llm -t 0 --max-new-tokens 2 Hello")
    assert loaded.value("llm.last.model") == MODEL


def test_mistyped_model_name_has_the_nearest_name_and_no_advice_about_the_hub(
    loaded: Kernel,
) -> None:
    ran = loaded.run(f"%llm_load {MODEL[:-2]}t")
    assert "Did you mean" in ran.error
    assert "hub cannot be reached" not in ran.error
    assert ran.error.endswith(f" {MODEL} is still active.")


def test_empty_answer_names_the_stop_text(loaded: Kernel) -> None:
    loaded.ok("%llm -t 0 --max-new-tokens 2 Say hello")
    first = loaded.value("llm.last[0]")
    shown = loaded.ok(f"%llm -t 0 --stop {first} Say hello").text
    assert f"is empty: it begins with the stop text {json.dumps(first)}, or " in shown
    assert "Change --stop or the prompt." in shown


def test_a_prompt_that_is_too_long_is_counted(loaded: Kernel) -> None:
    loaded.ok("long = 'fox ' * 9000")
    ran = loaded.run("%llm {long}")
    assert_one_line(
        ran, "PromptTooLong", f"tokens, but {MODEL} reads at most 8,192. Shorten it by at least "
    )
    loaded.ok("%llm -t 0 --max-new-tokens 2 Hello")


def test_failed_generation_shows_reason_and_model_stays_loaded(loaded: Kernel) -> None:
    ran = loaded.run("%llm -p min_p=7 Hello")
    assert_one_line(ran, "GenerationFailed", f"{MODEL} failed while it was answering: ValueError: ")
    loaded.ok("%llm -t 0 --max-new-tokens 2 Hello")


def test_quantization_without_bitsandbytes(loaded: Kernel) -> None:
    loaded.ok("import sys; held = sys.modules.pop('bitsandbytes', 0)")
    loaded.ok("sys.modules['bitsandbytes'] = None")
    ran = loaded.run("%llm_load -q bnb-4bit")
    assert_one_line(ran, "MissingDependency", "Run: pip install bitsandbytes")
    loaded.ok("del sys.modules['bitsandbytes']")


def test_a_model_that_does_not_fit_names_the_figures(loaded: Kernel, tmp_path: Path) -> None:
    size = 10**12
    header = {"w": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + size)  # a hole, which takes no space
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    ran = loaded.run(f"%llm_load {tmp_path}")
    assert_one_line(ran, "OutOfMemory", " on cpu, ")
    assert "GB is free. Try a smaller model" in ran.error


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_models.pickle_only, "only pickle files"),
        (tiny_models.truncated_weights, "damaged"),
        (tiny_models.remote_code, "--trust-remote-code"),
    ],
)
def test_folders_that_cannot_be_loaded(
    loaded: Kernel, tmp_path: Path, make: object, message: str
) -> None:
    assert callable(make)
    make(tmp_path / "model")
    assert_one_line(loaded.run(f"%llm_load {tmp_path}/model"), "LoadFailed", message)
    assert loaded.value("llm.status().active_model") == MODEL


def test_nothing_is_loaded_and_wrong_settings() -> None:
    with kernel(DEFAULT_LLM_TEMPERATURE="9") as k:
        k.ok("%load_ext llm_magic")
        for code in ("%llm_status", "%llm_load", "%llm_config"):
            assert_one_line(
                k.run(code),
                "SettingsError",
                "DEFAULT_LLM_TEMPERATURE=9 is out of range. It must be 0 to 2.",
            )
        k.ok("import os; os.environ['DEFAULT_LLM_TEMPERATURE'] = '0.5'")
        assert_one_line(k.run("%llm Hello"), "ModelNotLoaded", "Run %llm_load")
        assert_one_line(k.run("%llm_unload"), "ModelNotLoaded", "Run %llm_load")
        assert k.ok("%llm_unload --all").text == "No model was loaded."


def test_run_all_stops_at_a_failed_magic() -> None:
    cells = ["%load_ext llm_magic", "%llm_config temperature=9", "reached = True"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    client = NotebookClient(notebook, resources={"metadata": {"path": str(ROOT)}})
    with pytest.raises(
        CellExecutionError, match=r"temperature=9 is out of range\. It must be 0 to 2"
    ):
        client.execute()
    assert [o["output_type"] for o in notebook.cells[1].outputs] == ["error"]
    assert notebook.cells[1].outputs[0]["ename"] == "OptionError"
    assert not notebook.cells[2].outputs
