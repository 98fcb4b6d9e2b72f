"""Models: load, free and list them, and how they generate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from IPython.core.magic import magics_class

from llm_magic.errors import OptionError
from llm_magic.notebook.arguments import parser
from llm_magic.notebook.magics.base import SessionMagics, line_magic

if TYPE_CHECKING:
    from llm_magic.notebook.display.tables import Table


@magics_class
class ModelMagics(SessionMagics):
    """Which models are in this kernel, and with what settings they answer."""

    @line_magic
    def llm_load(self, line: str) -> None:
        """Load a model into this kernel and make it the active one."""
        from llm_magic.notebook.display import live_output, messages

        args = parser.parse("llm_load", line)
        model, name, keep = args["model"], args["name"], bool(args["keep"])
        view = live_output.LoadView(self.shell, live=self.live)
        label = model or self.session.settings.model or "the default model"
        if args["bg"]:
            self.session.load_later(model, name=name, keep=keep, **args.options)
            view.finish([f"Loading {label} · %llm_status shows how far; %%llm waits for it."])
            return
        result = self.session.load_and_tell(
            model,
            name=name,
            keep=keep,
            tick=lambda: view.progress(label, self.session.progress),
            began=self.began,
            **args.options,
        )
        view.finish(messages.ready_lines(result))

    @line_magic
    def llm_config(self, line: str) -> Table:
        """Show the generation settings, or change them."""
        from llm_magic.notebook.display import messages

        args = parser.parse("llm_config", line)
        changes = parser.assignments(args["changes"])
        if args["reset"]:
            if changes:
                raise OptionError("--reset does not go with settings. Use one of them.")
            self.session.generation.reset()
        elif changes:
            self.session.configure(**changes)
        return messages.config_table(self.session)

    @line_magic
    def llm_status(self, line: str) -> Table:
        """Show what is loaded, where, and the memory it takes."""
        from llm_magic.notebook.display import messages

        parser.parse("llm_status", line)
        return messages.status_table(self.session.status())

    @line_magic
    def llm_models(self, line: str) -> Table:
        """List the models that are here."""
        from llm_magic.notebook.display import messages

        args = parser.parse("llm_models", line)
        models = self.session.models(
            args["backend"], base_url=args["base_url"], key_env=args["key_env"]
        )
        return messages.models_table(models, self.session.status().models)

    @line_magic
    def llm_unload(self, line: str) -> None:
        """Free a model and show what came back."""
        from llm_magic.notebook.display import live_output, messages

        args = parser.parse("llm_unload", line)
        session, name = self.session, args["name"]
        if args["all"] and name:
            raise OptionError(f"--all frees every model, not only {name}. Leave one of them away.")
        self.wait_for_load().clear()
        gone = session.unload_all() if args["all"] else [session.unload(name)]
        lines = [messages.unloaded_line(unloaded) for unloaded in gone]
        live_output.LoadView(self.shell, live=False).finish(lines or ["Nothing was loaded."])
