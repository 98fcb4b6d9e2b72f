"""Models and settings: load, use, unload and list models, show status and usage, change settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from IPython.core.magic import magics_class

from llm_magic.errors import ModelError, OptionError, ServerError
from llm_magic.notebook.magics.base import SessionMagics, line_magic

if TYPE_CHECKING:
    from llm_magic.notebook.arguments.parser import Parsed
    from llm_magic.notebook.display.tables import Table
    from llm_magic.session.jobs import Job


@magics_class
class ModelMagics(SessionMagics):
    """The magics for models and generation settings."""

    @line_magic
    def llm_load(self, line: str) -> None:
        """Load a model, or connect to one on a server, and make it the active one."""
        args, session = self.parse("llm_load", line), self.session
        # Errors about the line or the model are shown before the other imports.
        from llm_magic.notebook.display import live_output

        options: Any = {"name": args["name"], "keep": bool(args["keep"]), **args.options}
        default = session.default_model(options.get("backend")) or "the default model"
        label = args["model"] or default
        if args["bg"]:
            from llm_magic.notebook.display.background_output import show_load

            future = session.load_later(args["model"], **options)
            self.areas.append(show_load(self.shell, session, label, future))
            return
        view = live_output.LoadView(self.shell, self.live_area())
        options |= {"on_wait": lambda: view.progress(label, session.progress), "began": self.began}
        before = session.status().active
        with view:
            try:
                result = session.load_with_details(args["model"], **options)
            except (ModelError, ServerError) as error:
                if before is not None and session.status().active is before:
                    error.append(f"{before.name} is still active.")
                raise
        from llm_magic.notebook.display import messages

        view.finish(messages.ready_lines(result, session.jobs.running, session.generation.values))

    @line_magic
    def llm_use(self, line: str) -> Table:
        """Make a loaded model the active one."""
        from llm_magic.notebook.display import messages

        name = self.parse("llm_use", line)["name"]
        self.wait_for_load()
        if name is not None:
            self.session.use(name)
        return messages.use_table(self.session.status())

    @line_magic
    def llm_config(self, line: str) -> Table:
        """Show the generation settings, or change them."""
        from llm_magic.notebook.display import messages

        args = self.parse("llm_config", line)
        generation, before = self.session.generation, self.session.generation.values
        if args["reset"]:
            generation.reset(*self._names_to_reset(args))
            names = [name for name, value in before if value != getattr(generation, name)]
        else:
            changes, names = self._changes(args)
            if not changes:
                return messages.config_table(self.session, names)
            if isinstance(system := changes.get("system"), str):
                changes["system"] = self._filled(system)
            generation.update(**changes)
        active = self.session.status().active
        return messages.changes_table(before, generation.values, names, active)

    def _names_to_reset(self, args: Parsed) -> list[str]:
        """Return the settings that a line with ``--reset`` names; none of them for all."""
        names = [word.rstrip(",").replace("-", "_") for word in args["changes"]]
        if args.options or not all(name.isidentifier() for name in names):
            raise OptionError(
                "--reset and new values cannot be combined. Write only the names to reset."
            )
        return names

    def _changes(self, args: Parsed) -> tuple[dict[str, object], list[str]]:
        """Return the settings to change, and the names of all settings on the line."""
        from llm_magic.notebook.arguments import parser

        changes = parser.assignments(args["changes"])
        if both := changes.keys() & args.options.keys():
            raise OptionError(f"{min(both)} is given twice. Keep one of its values.")
        changes |= args.options
        if "extra" in args.options:
            # Each -p adds to the others.
            changes["extra"] = {**self.session.generation.extra, **args.options["extra"]}
        named = [name for name, _ in parser.named_settings(args["changes"])]
        return changes, [*named, *args.options]

    def _filled(self, text: str) -> str:
        """Return a text with its {references} filled in; notes show those that are not."""
        from llm_magic.notebook.display.answer_view import show_notes
        from llm_magic.prompts.template import fill

        filled = fill(text, self.notebook_names(text))
        show_notes(self.shell, filled.notes)
        return filled.text

    @line_magic
    def llm_status(self, line: str) -> Table:
        """Show the loaded models, where they run, and the memory they use."""
        from llm_magic.notebook.display import messages

        self.parse("llm_status", line, fill=False)
        answering: tuple[Job, ...] = (*self.session.answering, *self.session.mapping)
        return messages.status_table(self.session.status(), answering)

    @line_magic
    def llm_usage(self, line: str) -> Table:
        """Show the tokens, seconds and reported cost of this session's answers, by model."""
        from llm_magic.notebook.display import messages

        args = self.parse("llm_usage", line, fill=False)
        return messages.usage_table(self.session.usage(reset=bool(args["reset"])))

    @line_magic
    def llm_models(self, line: str) -> Table:
        """List models."""
        from llm_magic.notebook.display import messages

        args = self.parse("llm_models", line)
        models = self.session.models(
            args["backend"], base_url=args["base_url"], key_env=args["key_env"]
        )
        return messages.models_table(models, self.session.status().models)

    @line_magic
    def llm_unload(self, line: str) -> None:
        """Unload a model and show how much memory it released."""
        from llm_magic.notebook.display import live_output, messages

        args = self.parse("llm_unload", line)
        session, name = self.session, args["name"]
        if args["all"] and name:
            raise OptionError("--all and the name of a model cannot be combined. Use one of them.")
        self.wait_for_load()
        # A model may have this name.
        is_word = name == "all" and name not in {info.name for info in session.status().models}
        every = bool(args["all"]) or is_word
        answers = session.answers_of(None if every else name, every=every)
        area = self.live_area()
        with live_output.JobsView(area, answers, messages.STOP_HINT) as view:
            unloaded = session.unload_all(view.draw) if every else [session.unload(name, view.draw)]
        lines = [messages.unloaded_line(one, session.jobs.running) for one in unloaded]
        live_output.LoadView(self.shell, area).finish(lines or ["No model was loaded."])
