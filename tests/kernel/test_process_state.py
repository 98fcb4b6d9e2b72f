"""``%unload_ext`` undoes every change to the process."""

from __future__ import annotations

from pathlib import Path

from tests.kernels import kernel
from tests.tiny_models import tiny_llama
from tests.until import until

SNAPSHOT = """
import asyncio, logging, os, signal, sys, threading, warnings
import accelerate, aiohttp, huggingface_hub, ipywidgets, torch, tqdm.auto, transformers
from huggingface_hub import constants
from transformers.utils import logging as transformers_logging

def logger_state(logger):
    return logger.level, logger.propagate, logger.disabled, logger.handlers[:], logger.filters[:]

def tqdm_hook():
    hook = transformers_logging.set_tqdm_hook(None)
    transformers_logging.set_tqdm_hook(hook)
    return hook

def snapshot():
    shell = get_ipython()
    kernel = shell.kernel
    loggers = {name: logging.getLogger(name) for name in list(logging.root.manager.loggerDict)}
    default = logger_state(logging.Logger("default"))
    return {
        "environment": dict(os.environ),
        "loggers": {
            name: state for name, logger in {**loggers, "": logging.root}.items()
            if (state := logger_state(logger)) != default
        },
        "warning filters": [entry[:3] for entry in warnings.filters],
        "showwarning": warnings.showwarning,
        "huggingface_hub": {n: v for n, v in vars(constants).items() if n.isupper()},
        "progress hook": tqdm_hook(),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "import hooks": (sys.meta_path[:], sys.path_hooks[:], sys.path[:]),
        "Python hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.displayhook),
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch defaults": (torch.get_default_dtype(), torch.is_grad_enabled(),
                           torch.are_deterministic_algorithms_enabled()),
        "event loop": (type(asyncio.get_event_loop_policy()), asyncio.run,
                       kernel.shell_handlers, kernel.control_handlers),
        "magics": {name for table in shell.magics_manager.magics.values() for name in table},
        "input transformers": shell.input_transformers_cleanup[:],
        "events": {name: calls[:] for name, calls in shell.events.callbacks.items()},
        "exception handlers": (shell.custom_exceptions, shell.CustomTB.__name__),
        "matchers": shell.Completer.custom_matchers[:],
        "configurables": [one for one in shell.configurables if "llm_magic" in type(one).__module__],
        "formatters": {
            mime: (set(one.type_printers), set(one.deferred_printers), set(one.singleton_printers))
            for mime, one in shell.display_formatter.formatters.items()
        },
        "kernel hooks": (kernel.pre_handler_hook, kernel.post_handler_hook),
        "threads": {thread.name for thread in threading.enumerate()},
        "attributes of the shell": set(vars(shell)),
    }

def differences(before, after):
    changed = {}
    for name in before:
        old, new = (lines(snapshot[name]) for snapshot in (before, after))
        if old != new:
            removed, added = [x for x in old if x not in new], [x for x in new if x not in old]
            changed[name] = {"removed": removed, "added": added}
    return changed

def lines(value):
    if isinstance(value, (dict, set)):
        return sorted(map(repr, value.items() if isinstance(value, dict) else value))
    return [*map(repr, value)] if isinstance(value, (list, tuple)) else [repr(value)]
"""

# What the libraries change themselves, at their first use, is not compared.
USE_LIBRARIES = """
%pwd
model = transformers.AutoModelForCausalLM.from_pretrained({0!r})
tokenizer = transformers.AutoTokenizer.from_pretrained({0!r})
model.generate(**tokenizer("x", return_tensors="pt"), max_new_tokens=2)
del model, tokenizer
"""


def test_unload_ext_restores_the_process(model_cache: Path, tmp_path: Path) -> None:
    with kernel(LLM_MAGIC_CACHE_DIR=str(model_cache)) as k:
        k.ok(SNAPSHOT)
        k.ok(USE_LIBRARIES.format(str(tiny_llama(tmp_path / "llama"))))
        k.ok("before = snapshot()")
        k.ok("%load_ext llm_magic")
        assert k.value("set(differences(before, snapshot()))") >= {"magics", "kernel hooks"}
        k.ok("%llm_load")
        k.ok("x = %llm -t 0 --max-new-tokens 3 Say hello.")
        k.ok("from llm_magic import llm\nawait llm.agenerate('Hi', max_new_tokens=2)")
        assert k.run("%llm_models -b ollama --base-url http://127.0.0.1:9").status == "error"
        k.ok("%llm_panel")
        changed = k.value("set(differences(before, snapshot()))")
        assert changed >= {"loggers", "warning filters", "threads"}
        k.ok("%unload_ext llm_magic")
        # What ends in a thread that draws may still end.
        until(
            lambda: not k.value("differences(before, snapshot())").get("threads"), "a thread stays"
        )
        assert k.value("differences(before, snapshot())") == {}
